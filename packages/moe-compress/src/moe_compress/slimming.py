"""Expert Slimming: what is asked for, and how one block is pruned or quantised (arXiv 2406.02500)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from model_hooks import pruning
from model_hooks.errors import RequestError
from model_hooks.experts import MoeLayer
from moe_compress import quantising
from moe_compress.moments import Matrix, Moment, Moments, expert_inputs, matrices_of, moment_of
from moe_compress.quantising import Grid
from paper_tables.errors import nearest

PRUNING = ("magnitude", "wanda", "sparsegpt")
QUANTISING = ("rtn", "gptq", "awq")
NEEDS_DATA = ("wanda", "sparsegpt", "gptq", "awq")
NEEDS_OUTER = ("sparsegpt", "gptq")
POLICIES = ("shrink", "all-tokens", "plain", "error")
SCOPES = ("experts", "block")


@dataclass(frozen=True)
class Slimming:
    """How to slim the experts of a model.

    Args:
        method: magnitude, wanda, sparsegpt (pruning); rtn, gptq, awq (quantisation).
        sparsity: share of each matrix that becomes zero.
        pattern: "" (anywhere), "2:4" or "4:8".
        bits: of a weight, 2 to 8.
        layer_bits: by block (original number), where they differ; 16 leaves a block as it is.
        group: inputs that share a scale.
        symmetric: codes without zero points; others are read by `moe-compress` alone.
        scope: "experts" (routed and shared), or "block": attention and dense feed-forwards too.
        exclude: parts of names of matrices that are left as they are, such as "shared_expert".
        min_tokens: an expert with fewer calibration tokens is under-covered; 0: 4 * d_in / group, at least 256.
        policy: what then: shrink (its moments are mixed with those of all tokens, weight min/(n+min)), all-tokens
            (those alone), plain (magnitude or round-to-nearest), error.
        propagate: what reaches the next layer: "compressed" or "dense" outputs of this one.

    Raises:
        RequestError: a value is not accepted.
    """

    method: str = "gptq"
    sparsity: float = 0.5
    pattern: str = ""
    bits: int = 4
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    group: int = 128
    symmetric: bool = True
    scope: str = "experts"
    exclude: tuple[str, ...] = ()
    min_tokens: int = 0
    policy: str = "shrink"
    damping: float = 0.01
    propagate: str = "compressed"

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("method", self.method, PRUNING + QUANTISING), ("policy", self.policy, POLICIES),
            ("scope", self.scope, SCOPES), ("propagate", self.propagate, ("compressed", "dense")),
        ):  # fmt: skip
            if value not in accepted:
                raise RequestError(f"{name} {value!r} is not accepted{nearest(value, accepted)}")
        if self.prunes:
            pruning.parse_pattern(self.pattern, self.sparsity)
        wrong = [b for b in (self.bits, *self.layer_bits.values()) if b not in (*quantising.BITS, 16)]
        if wrong or self.group < 1 or self.min_tokens < 0:
            raise RequestError(
                f"bits {wrong[0] if wrong else self.bits}, group {self.group}, min_tokens {self.min_tokens}: 2 to 8 "
                "bits, a group of at least 1 and a count of at least 0 are needed"
            )

    @property
    def prunes(self) -> bool:
        return self.method in PRUNING

    def bits_of(self, block: int) -> int:
        """Bits of a block's weights; 16: it is left alone."""
        return self.layer_bits.get(block, self.bits)

    def codes_of(self, block: int) -> quantising.Codes:
        """How a block's weights are written."""
        return quantising.Codes(self.bits_of(block), self.group, self.symmetric)

    def least(self, width: int) -> int:
        """Calibration tokens from which on an expert counts as covered."""
        return self.min_tokens or max(256, 4 * width // self.group)

    def check(self, matrices: list[Matrix]) -> None:
        """Raise `RequestError` where a matrix's inputs cannot be cut into groups."""
        of = pruning.parse_pattern(self.pattern, self.sparsity)[1] if self.prunes else self.group
        for matrix in matrices:
            width = matrix.weight.shape[1]
            if of and width % of:
                what = f"pattern {self.pattern}" if self.prunes else f"group {self.group}"
                raise RequestError(f"{what} does not divide the {width} inputs of {matrix.name}; choose another")


Show = Callable[[Moments], None]  # runs all calibration data through the block


def slim_block(
    how: Slimming, model: Any, block: Any, layer: MoeLayer | None, index: int, show: Show, *, workspace: float = 4e9
) -> tuple[dict[str, Any], dict[str, Grid]]:
    """Slim one block, in place.

    Args:
        block: `model_hooks.Block`, its weights resident. index: its original number, for messages.
        show: as named; called once for each wave of matrices.
        workspace: bytes for moments of inputs and their factors at once; experts are taken in waves that fit.

    Returns:
        A report (tokens of each expert, what was under-covered, relative error by kind of matrix), and for each
        parameter that was quantised, [.., rows, d_in], its grid, [.., rows, d_in / group].
    """
    if not how.prunes and how.bits_of(index) == 16:
        return {"matrices": 0}, {}
    everything = how.scope == "block"
    matrices = matrices_of(block.module, layer, everything=everything, exclude=how.exclude)
    report: dict[str, Any] = {"matrices": len(matrices)}
    if how.method == "awq" and layer is not None:
        from moe_compress.awq import smooth

        sampling = Moments([], outer=False, sample_tokens=512)
        with sampling.watching(model, block.module, layer):
            show(sampling)
        report["awq"] = smooth(block, layer, sampling.sample, how.codes_of(index))
    grids: dict[str, Grid] = {}
    wrong: dict[str, list[float]] = {}
    for wave in _waves(matrices, _room(how, matrices, workspace), everything):
        moments = _collect(how, model, block, layer, wave, show)
        _cover(how, layer, wave, moments, index, report)
        for matrix in wave:
            grid, error = _slim_matrix(how, matrix, moments, layer, how.codes_of(index))
            wrong.setdefault(matrix.name.rpartition(".")[2], []).append(error)
            if grid is not None:
                _keep(grids, block.module, matrix, grid)
        del moments  # before the next wave's are made
    report["error"] = {kind: sum(errors) / len(errors) for kind, errors in wrong.items()}
    return report, grids


def least_workspace(how: Slimming, matrices: list[Matrix]) -> float:
    """Bytes that the moments of one expert's inputs and their factors take."""
    if how.method not in NEEDS_OUTER:
        return 0.0
    by_expert: dict[int | None, list[Matrix]] = {}
    for matrix in matrices:
        by_expert.setdefault(matrix.expert, []).append(matrix)
    return _factors(how, matrices) + max(map(_moments_size, by_expert.values()), default=0.0)


def _moments_size(matrices: list[Matrix]) -> float:
    return sum({m.key: 4.0 * m.weight.shape[1] ** 2 for m in matrices}.values())


def _factors(how: Slimming, matrices: list[Matrix]) -> float:
    """Bytes of what is made of the widest moment while one matrix is slimmed."""
    copies = {"gptq": 1, "sparsegpt": 2}[how.method]
    return copies * max((4.0 * m.weight.shape[1] ** 2 for m in matrices), default=0.0)


def _room(how: Slimming, matrices: list[Matrix], workspace: float) -> float:
    """Bytes of `workspace` that are left for moments."""
    return workspace - _factors(how, matrices) if how.method in NEEDS_OUTER else float("inf")


def _waves(matrices: list[Matrix], workspace: float, everything: bool) -> list[list[Matrix]]:
    """Attention first, since the experts see what it gives afterwards; then experts, as many as fit at once."""
    first = [m for m in matrices if m.expert is None] if everything else []
    rest = [m for m in matrices if not (everything and m.expert is None)]
    by_key: dict[Any, list[Matrix]] = {}
    for matrix in rest:
        by_key.setdefault(matrix.expert, []).append(matrix)
    waves, used = ([first] if first else []), float("inf")
    for group in by_key.values():
        needed = _moments_size(group)
        if used + needed > workspace or not waves or waves[-1] is first:
            waves.append([])
            used = 0.0
        waves[-1] += group
        used += needed
    return waves


def _collect(
    how: Slimming, model: Any, block: Any, layer: MoeLayer | None, wave: list[Matrix], show: Show
) -> Moments:  # fmt: skip
    width = max((m.weight.shape[1] for m in wave), default=0)
    moments = Moments(wave, outer=how.method in NEEDS_OUTER, sample_tokens=max(512, how.least(width)))
    if how.method in NEEDS_DATA:
        with moments.watching(model, block.module, layer):
            show(moments)
    moments.finish()
    return moments


def _cover(
    how: Slimming, layer: MoeLayer | None, wave: list[Matrix], moments: Moments, index: int, report: dict[str, Any]
) -> None:
    """Deal with the experts that too few tokens reached, as the policy says; `report` tells of them."""
    if how.method not in NEEDS_DATA or layer is None:
        return
    for matrix in wave:
        if matrix.expert is None:
            continue
        found, expert, source = moments.found[matrix.key], matrix.expert, matrix.source
        least = how.least(matrix.weight.shape[1])
        report.setdefault("tokens", {})[expert] = found.n
        if found.n >= least or (expert, source) in report.get("mixed", ()):
            continue
        if how.policy == "error":
            raise RequestError(
                f"layer {index} expert {expert}: {found.n} calibration tokens, {least} are wanted; give more data or "
                "another --policy"
            )
        report.setdefault("under_covered", {})[expert] = how.policy
        if how.policy != "plain":
            share = 1.0 if how.policy == "all-tokens" else least / (found.n + least)
            everyone = moment_of(expert_inputs(layer, expert, moments.sample)[source], moments.outer)
            moments.found[matrix.key] = found.mixed(everyone, share)
            report.setdefault("mixed", set()).add((expert, source))


def _slim_matrix(
    how: Slimming, matrix: Matrix, moments: Moments, layer: MoeLayer | None, codes: quantising.Codes
) -> tuple[Grid | None, float]:
    """Slim one matrix in place; its grid where it was quantised, and |change| / |weights|, of outputs where inputs
    are known."""
    before = matrix.weight.clone()
    moment = moments.found[matrix.key] if how.method in NEEDS_DATA else None
    if (
        moment is not None
        and how.policy == "plain"
        and moment.n < how.least(before.shape[1])
        and matrix.expert is not None
    ):
        moment = None
    grid = None
    if how.prunes:
        matrix.weight.copy_(_pruned(how, before, moment))
    else:
        found = _quantised(how, matrix, moment, moments, layer, codes)
        matrix.weight.copy_(found.weight)
        grid = found.grid
    return grid, _error(before, matrix.weight, moment)


def _pruned(how: Slimming, weight: Tensor, moment: Moment | None) -> Tensor:
    zeros, of = pruning.parse_pattern(how.pattern, how.sparsity)
    if how.method == "magnitude" or moment is None:
        return pruning.magnitude(weight, how.sparsity, zeros, of)
    if how.method == "wanda":
        return pruning.wanda(weight, moment.square / max(moment.n, 1), how.sparsity, zeros, of)
    assert moment.outer is not None
    return pruning.sparsegpt(weight, moment.outer, how.sparsity, zeros, of, damping=how.damping)


def _quantised(
    how: Slimming, matrix: Matrix, moment: Moment | None, moments: Moments, layer: MoeLayer | None,
    codes: quantising.Codes,
) -> quantising.Quantised:  # fmt: skip
    if how.method == "rtn" or moment is None:
        return quantising.rtn(matrix.weight, codes)
    if how.method == "gptq":
        assert moment.outer is not None
        return quantising.gptq(matrix.weight, moment.outer.clone(), codes, damping=how.damping)
    if matrix.expert is None or layer is None or not len(moments.sample):
        return quantising.rtn(matrix.weight, codes)
    routed = (layer.router(moments.sample)[2] == matrix.expert).any(-1)
    sample = moments.sample[routed] if int(routed.sum()) >= 16 else moments.sample
    inputs = expert_inputs(layer, matrix.expert, sample)[matrix.source]
    return quantising.clipped(matrix.weight, inputs, codes)


def _error(before: Tensor, after: Tensor, moment: Moment | None) -> float:
    """Relative squared error: of the outputs where the inputs' products are known, else of the weights."""
    change, weight = (after - before).float(), before.float()
    if moment is not None and moment.outer is not None:
        size = (weight @ moment.outer).mul(weight).sum()
        return float((change @ moment.outer).mul(change).sum() / size.clamp_min(1e-30))
    scale = 1.0 if moment is None else moment.square
    return float((change.square() * scale).sum() / (weight.square() * scale).sum().clamp_min(1e-30))


def _keep(grids: dict[str, Grid], block: Any, matrix: Matrix, grid: Grid) -> None:
    """Put a matrix's grid where it belongs among those of its parameter."""
    parameter = block.get_parameter(matrix.parameter)
    if matrix.expert is None:
        grids[matrix.parameter] = grid
        return
    if matrix.parameter not in grids:
        shape = (*parameter.shape[:-1], grid.scale.shape[-1])
        grids[matrix.parameter] = Grid(
            grid.scale.new_zeros(shape), None if grid.zero is None else grid.zero.new_zeros(shape)
        )
    whole = grids[matrix.parameter]
    first = parameter.shape[1] // 2 if matrix.name.endswith("up_proj") else 0
    rows = slice(first, first + grid.scale.shape[0])
    whole.scale[matrix.expert, rows] = grid.scale
    if whole.zero is not None and grid.zero is not None:
        whole.zero[matrix.expert, rows] = grid.zero
