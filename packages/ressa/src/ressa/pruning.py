"""One-shot pruning of a vision-language model's branches, block after block (section 2 of the paper)."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks import pruning as matrices
from model_hooks.errors import RequestError
from ressa import allocation, masks
from ressa.branches import Branches, matches, refuse_experts
from ressa.calibration import Batch, Runner, count_tokens, whole_model

METHODS = ("magnitude", "wanda", "sparsegpt", "random")
ALLOCATIONS = ("uniform", "owl", "parameter_budget")
ONE_OF = {"method": METHODS, "allocation": ALLOCATIONS, "calibration_inputs": ("pruned", "dense"),
          "token_balance": ("none", "equal")}  # fmt: skip


@dataclass(frozen=True)
class Pruning:
    """What to prune, and by which measure.

    Args:
        method: wanda (arXiv 2306.11695), sparsegpt (2301.00774, moves the weights that stay), magnitude or random.
        sparsity: Share of weights that go, in [0, 1).
        pattern: "" for anywhere, "2:4" or another N:M: of every M consecutive inputs N are kept.
        vision, language: A branch's own sparsity; None: as `sparsity`; 0 leaves it dense.
        allocation: uniform; owl (blocks with more outliers keep more); parameter_budget (the sparsity of one branch is
            given, the other's is solved for).
        calibration_inputs: Blocks see what pruned or what dense ones before them give.
        token_balance: equal lets image and text tokens weigh the same in the statistics, however many there are.
        ignore: Paths, parts of paths or patterns with * of matrices that stay dense.
        keep_dense: Only masks are made; the model's weights stay as they are, for the teacher.
        skip_experts: Experts whose weights are one tensor stay dense, instead of being refused.
        seed: Of method random.
    """

    method: str = "wanda"
    sparsity: float = 0.5
    pattern: str = ""
    vision: float | None = None
    language: float | None = None
    allocation: str = "uniform"
    calibration_inputs: str = "pruned"
    token_balance: str = "none"
    ignore: tuple[str, ...] = ()
    keep_dense: bool = False
    skip_experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in ONE_OF.items():
            if getattr(self, name) not in known:
                raise RequestError(f"{name} {getattr(self, name)!r} is not accepted; give {', '.join(known)}")
        for name in ("sparsity", "vision", "language"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                hint = f"; did you mean {value / 100:.2f}?" if 1 <= value < 100 else ""
                raise RequestError(f"--{name} {value:g} is not accepted: a share from 0 to below 1 is needed{hint}")
        if self.pattern and self.allocation != "uniform":
            raise RequestError(
                f"--pattern {self.pattern} fixes every group's zeros; leave --allocation {self.allocation}"
            )
        if self.pattern:
            for value in {self.sparsity, self.vision, self.language} - {None, 0}:
                matrices.parse_pattern(self.pattern, value)  # type: ignore[arg-type]
            if not self.sparsity:
                raise RequestError(f"--pattern {self.pattern} with --sparsity 0 prunes nothing; leave one of them")

    def of(self, branch: str) -> float:
        """The sparsity that is asked of a branch."""
        own = self.vision if branch == "vision" else self.language
        return self.sparsity if own is None else own

    @property
    def groups(self) -> tuple[int, int]:
        """(zeros, of) of the pattern."""
        return matrices.parse_pattern(self.pattern, self.sparsity) if self.pattern else (0, 0)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What `prune` gives.

    Attributes:
        masks: Path -> bool [out, in] on the CPU, True = kept.
        report: sparsity; branches (matrices, weights, zeros, sparsity); tokens (image, text, padding); dead, matrices
            that no data reached, which stay dense; unused, vision blocks that nothing reads; left_dense; experts;
            block_sparsity (of owl); seconds.
        dense: Dense weights by path, with `hold_dense`.
    """

    masks: dict[str, Tensor]
    report: dict[str, Any]
    dense: dict[str, Tensor] = field(default_factory=dict)


def prune(
    model: Any, branches: Branches, batches: Sequence[Batch], how: Pruning, *, image_token_id: int | None = None,
    hold_dense: bool = False, progress: Callable[[int, int], None] | None = None,
) -> Pruned:  # fmt: skip
    """Prune `model` in place, the vision tower first, then the language model.

    Args:
        batches: Model inputs with input_ids, attention_mask and what belongs to images; may be empty for magnitude
            and random.
        how: With keep_dense the weights are left as they were.
        hold_dense: Keep the dense weights on the CPU, for the teacher of a method that moves weights.
        progress: Called with (matrices done, matrices).

    Raises:
        RequestError: a request that cannot be met, or no data: nothing was changed. Or activations that are no numbers:
            blocks before them are pruned already, unless keep_dense or hold_dense, which put the weights back.
    """
    began = time.monotonic()
    work = _Work(model, branches, batches, how, image_token_id)
    dense: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    later: dict[str, Tensor] = {}
    try:
        for path, layer, new in work.matrices():
            if hold_dense or how.keep_dense:
                dense[path] = layer.weight.detach().to("cpu", copy=True)
            made[path] = (new != 0).cpu()
            if how.calibration_inputs == "dense":
                later[path] = new.cpu()  # all blocks and branches must see dense ones before them
            else:
                layer.weight.data.copy_(new)
            if progress:
                progress(len(made), len(work.layers))
    except BaseException:
        work.write(dense)
        raise
    work.write(later)
    _check(model, made, how)
    report = work.report(made) | {"seconds": time.monotonic() - began}
    if how.keep_dense:
        work.write(dense)
    return Pruned(made, report, dense if hold_dense else {})


class _Work:
    """The matrices to prune, in order, and what is found about them."""

    def __init__(
        self, model: Any, branches: Branches, batches: Sequence[Batch], how: Pruning, image_token_id: int | None
    ) -> None:
        self.model, self.branches, self.how = model, branches, how
        self.experts = refuse_experts(branches, how.skip_experts)
        everything = {name: branches.linears(name) for name in ("vision", "language")}
        _refuse_unknown(how.ignore, [path for found in everything.values() for path in found])
        self.all = {path: layer for found in everything.values() for path, layer in found.items()}
        kept = {name: branches.linears(name, how.ignore) for name in everything}
        self.sparsity = self._by_branch(kept)
        self.layers = {p: layer for name, found in kept.items() if self.sparsity[name] for p, layer in found.items()}
        _refuse(model, self.layers, how)
        self.needs_data = how.method in ("wanda", "sparsegpt") or how.allocation == "owl"
        given = bool(batches) or self.needs_data
        self.tokens = count_tokens(batches, image_token_id) if given else {"image": 0, "text": 0, "padding": 0}
        self.runner = Runner(model, batches, image_token_id, equal=how.token_balance == "equal")
        self.blocks = self._by_block()
        self.dead: list[str] = []
        pruned = [b for b in branches.blocks["vision"] if b in self.blocks]
        self.unused = self.runner.unused(pruned) if given and batches else []

    def _by_branch(self, kept: dict[str, dict[str, nn.Linear]]) -> dict[str, float]:
        if self.how.allocation != "parameter_budget":
            return {name: self.how.of(name) for name in kept}
        weights = {name: sum(layer.weight.numel() for layer in found.values()) for name, found in kept.items()}
        return allocation.budget(self.how.sparsity, weights, self.how.vision, self.how.language)

    def _by_block(self) -> dict[str, float]:
        """Sparsity of each block, for all that are pruned."""
        blocks = {b: s for name, s in self.sparsity.items() if s for b in self.branches.blocks[name] if self._in(b)}
        if self.how.allocation != "owl":
            return blocks
        found = whole_model(self.runner, self.layers, self.branches.of)
        for name in ("vision", "language"):
            own = [b for b in self.branches.blocks[name] if b in blocks]
            counts = {b: [allocation.outlier_share(layer.weight, found[p].second_moment())
                          for p, layer in self._in(b).items() if p in found] for b in own}  # fmt: skip
            shares = {b: sum(n for n, _ in c) / max(1, sum(t for _, t in c)) for b, c in counts.items()}
            if shares:
                sizes = {b: sum(layer.weight.numel() for layer in self._in(b).values()) for b in own}
                blocks |= allocation.owl(shares, sizes, self.sparsity[name])
        return blocks

    def _in(self, block: str) -> dict[str, nn.Linear]:
        return {path: layer for path, layer in self.layers.items() if path.startswith(f"{block}.")}

    def matrices(self) -> Iterator[tuple[str, nn.Linear, Tensor]]:
        """(path, layer, its pruned weight); the caller writes it before it asks for the next."""
        stack = ""
        for block, sparsity in self.blocks.items():
            layers, branch = self._in(block), self.branches.of(block)
            if block.rpartition(".")[0] != stack:
                stack = block.rpartition(".")[0]
                self.runner.begin()
            found = {}
            if self.how.method in ("wanda", "sparsegpt"):
                found = self.runner.collect(block, branch, layers, self.how.method == "sparsegpt")
            for path, layer in layers.items():
                if self.how.method in ("wanda", "sparsegpt") and path not in found:
                    self.dead.append(path)
                    continue
                moment = found[path].second_moment() if found else None
                yield path, layer, self._pruned(path, layer.weight.detach(), moment, sparsity)

    def _pruned(self, path: str, weight: Tensor, moment: Tensor | None, sparsity: float) -> Tensor:
        zeros, of = self.how.groups
        if moment is not None:
            moment = moment.to(weight.device)
        if self.how.method == "wanda":
            assert moment is not None
            return matrices.wanda(weight, moment, sparsity, zeros, of)
        if self.how.method == "sparsegpt":
            assert moment is not None
            return matrices.sparsegpt(weight, 2 * moment, sparsity, zeros, of)
        if self.how.method == "magnitude":
            return matrices.magnitude(weight, sparsity, zeros, of)
        generator = torch.Generator().manual_seed(self.how.seed * 1_000_003 + zlib.crc32(path.encode()))
        drawn = torch.rand(weight.shape, generator=generator).add(1).to(weight.device)
        return weight.masked_fill(matrices.magnitude(drawn, sparsity, zeros, of) == 0, 0)

    def write(self, weights: dict[str, Tensor]) -> None:
        for path, weight in weights.items():
            self.model.get_submodule(path).weight.data.copy_(weight)

    def report(self, made: dict[str, Tensor]) -> dict[str, Any]:
        """Counted from the weights as they are now."""
        rows = {}
        for name in ("vision", "language"):
            own = {p: layer.weight for p, layer in self.all.items() if self.branches.of(p) == name}
            gone = sum(int((made[p] == 0).sum()) for p in own if p in made)
            total = sum(w.numel() for w in own.values())
            rows[name] = {"matrices": sum(p in made for p in own), "weights": total, "zeros": gone,
                          "sparsity": gone / max(1, total)}  # fmt: skip
        zeros, weights = sum(row["zeros"] for row in rows.values()), sum(row["weights"] for row in rows.values())
        left = sorted(p for p in self.all if p not in made and p not in self.dead)
        blocks = self.blocks if self.how.allocation == "owl" else {}
        return {"sparsity": zeros / max(1, weights), "branches": rows, "tokens": self.tokens, "dead": self.dead,
                "unused": self.unused, "left_dense": left, "experts": sum(self.experts.values()),
                "block_sparsity": blocks}  # fmt: skip


def _refuse_unknown(ignore: Sequence[str], paths: list[str]) -> None:
    for pattern in ignore:
        if not any(matches(path, pattern) for path in paths):
            raise RequestError(f"--ignore {pattern} fits no matrix; one is {paths[0]}")


def _refuse(model: Any, layers: dict[str, nn.Linear], how: Pruning) -> None:
    """Raise `RequestError`, before anything is changed, for matrices that cannot be pruned as asked."""
    if not layers:
        raise RequestError("nothing is left to prune; give a sparsity above 0 for a branch, or fewer --ignore")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    of = how.groups[1]
    for path, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise RequestError(f"{path} holds {layer.weight.dtype}; load the model without quantisation")
        shared = owners.get(id(layer.weight), [])
        if len(shared) > 1:
            raise RequestError(f"{shared[0]} and {shared[1]} are one tied weight; leave it dense with --ignore {path}")
        if of and layer.in_features % of:
            raise RequestError(
                f"{path}: in_features={layer.in_features} is not divisible by M={of}; skip it with --ignore or choose "
                "another pattern"
            )


def _check(model: Any, made: dict[str, Tensor], how: Pruning) -> None:
    """The weights must have the zeros that were asked for, and be numbers."""
    weights = {path: model.get_submodule(path).weight for path in made}
    masks.check(weights, how.pattern)
    for path, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise RuntimeError(f"{path} holds NaN or infinite weights after pruning; please report it")
        if bool((weight.cpu() != 0).ne(made[path]).any()):
            raise RuntimeError(f"{path} has other zeros than its mask; please report it")
