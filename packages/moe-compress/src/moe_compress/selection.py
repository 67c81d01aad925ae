"""What to take out of a model, chosen from scores: experts (Expert Drop), MoE sublayers (Layer Drop), blocks (Block
Drop). Section 3 of arXiv 2406.02500. Equal scores: the lower index goes first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model_hooks.errors import RequestError
from moe_compress.scores import METRICS
from paper_tables.errors import nearest

if TYPE_CHECKING:
    from moe_compress.scores import Experts, Scores

FORMAT = "moe-compress plan 1"
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Plan:
    """What goes, by original block index; experts are numbered as they are in the scored model.

    Attributes:
        keep: block -> experts that stay, sorted; other blocks keep all.
        layers: blocks that lose their MoE sublayer.
        blocks: blocks that go altogether.
        how: the request, for people.
        preserve_gate: routers keep the rows of all experts, and those that go stay as zeros: a token that chooses one
            gets nothing for it, and its other weights do not grow. An ablation: nothing becomes smaller.
        fingerprint: of the scored model; empty where the plan was written by hand.
    """

    keep: dict[int, tuple[int, ...]] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    how: str = ""
    model: str = ""
    fingerprint: str = ""
    preserve_gate: bool = False

    def describe(self) -> str:
        """One line for people."""
        counts = {block: len(kept) for block, kept in self.keep.items()}
        said = f"{next(iter(counts.values()))} experts a layer kept" if len(set(counts.values())) == 1 else (
            "experts kept by layer: " + ", ".join(f"{b}: {n}" for b, n in counts.items())
        )  # fmt: skip
        said += ", routers as they were" * self.preserve_gate
        parts = [said] if counts else []
        parts += [f"MoE layers {', '.join(map(str, self.layers))} dropped"] if self.layers else []
        parts += [f"blocks {', '.join(map(str, self.blocks))} dropped"] if self.blocks else []
        return "; ".join(parts) or "nothing dropped"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        from model_hooks.files import atomic_write, refuse_existing

        refuse_existing(path, overwrite)
        atomic_write(path, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file; make one with `moe-compress trim --plan-only`") from None
        except ValueError as error:
            raise RequestError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise RequestError(f"{path}: not a plan of this version ({FORMAT!r})")
        record["keep"] = {int(k): tuple(v) for k, v in record["keep"].items()}
        for name in ("layers", "blocks"):
            record[name] = tuple(record[name])
        return cls(**record)


def select_experts(
    scores: Scores, keep: int | Mapping[int, int], *, scope: str = "layer", metric: str = "gate",
    reverse: bool = False, allow_lower_topk: bool = False, allow_empty: bool = False, preserve_gate: bool = False,
) -> Plan:  # fmt: skip
    """Expert Drop.

    Args:
        keep: experts that stay in a layer (scope "layer"; a mapping gives each layer its own), or on average (scope
            "global": the scores of all layers are compared, so that layers keep different numbers, at least one).
        metric: one of `METRICS`.
        reverse: drop the most important ones, as an ablation.
        allow_lower_topk: let a layer keep fewer experts than a token used; its top-k falls to what is left.
        allow_empty: with scope "global", let a layer lose all of its experts; its MoE layer is dropped then.
        preserve_gate: leave the routers as they are; see `Plan`.

    Raises:
        RequestError: a count out of range, a scope or metric unknown, or a count that the router's groups exclude.
    """
    if scope not in SCOPES:
        raise RequestError(f"scope {scope!r} is not accepted{nearest(scope, SCOPES)}")
    if metric not in METRICS:
        raise RequestError(f"metric {metric!r} is not accepted{nearest(metric, METRICS)}")
    counts = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(scores.experts, keep)
    if scope == "global" and isinstance(keep, Mapping):
        raise RequestError("counts for each layer and scope global exclude each other; give one number")
    for block, count in counts.items():
        if block not in scores.experts:
            raise RequestError(f"block {block} has no experts; those with experts are {sorted(scores.experts)}")
        _check_count(block, scores.experts[block], count, allow_lower_topk)
    sign = -1.0 if reverse else 1.0
    importance = {b: [sign * v for v in scores.experts[b].importance(metric, scores.tokens)] for b in counts}
    for block, values in importance.items():
        if not all(map(math.isfinite, values)):
            raise RequestError(f"the experts of block {block} have a score that is no finite number")
    slices = {b: _slices(values, scores.experts[b].groups) for b, values in importance.items()}
    if scope == "global":
        assert isinstance(keep, int)
        counts = _global_counts(scores, slices, importance, keep, allow_lower_topk or allow_empty, allow_empty)
    kept = {}
    for block, count in counts.items():
        groups = scores.experts[block].groups
        gone = {e for row in slices[block][: len(slices[block]) - count // groups] for e in row}
        kept[block] = tuple(e for e in range(len(scores.experts[block])) if e not in gone)
    how = (
        f"keep {keep if isinstance(keep, int) else 'by layer'} experts, scope {scope}, by {metric}"
        + " reversed" * reverse
    )
    fewer = {b: k for b, k in kept.items() if 0 < len(k) < len(scores.experts[b])}
    empty = tuple(b for b, k in kept.items() if not k)
    if len(empty) == len(scores.mlp):
        raise RequestError(f"cannot drop all experts of all {len(empty)} MoE layers; keep more")
    return _of(scores, Plan(keep=fewer, layers=empty, how=how, preserve_gate=preserve_gate))


def _check_count(block: int, experts: Experts, count: int, allow_lower_topk: bool) -> None:
    total, groups = len(experts), experts.groups
    if not 1 <= count <= total:
        raise RequestError(f"cannot keep {count} of the {total} experts of block {block}; allowed: 1..{total}")
    if count < experts.top_k and not allow_lower_topk:
        raise RequestError(
            f"keeping {count} experts is fewer than a token uses (top-{experts.top_k}); keep {experts.top_k} or more, "
            "or give --allow-lower-topk"
        )
    if count % groups:
        near = sorted({count // groups * groups, -(-count // groups) * groups} - {0})
        raise RequestError(
            f"keep a multiple of {groups} experts, since the router of block {block} has {groups} groups; nearest: "
            f"{', '.join(map(str, near))}"
        )
    least = groups * max(2, -(-experts.top_k // experts.topk_group)) if groups > 1 else 1
    if count < least:
        raise RequestError(f"the router of block {block} needs at least {least} experts in its {groups} groups")


def _slices(values: Sequence[float], groups: int) -> list[list[int]]:
    """Experts in the order in which they go, as many from each group at a time: without groups, one by one."""
    size = len(values) // groups
    order = [sorted(range(g * size, (g + 1) * size), key=values.__getitem__) for g in range(groups)]
    return [list(row) for row in zip(*order, strict=True)]


def _global_counts(
    scores: Scores, slices: Mapping[int, list[list[int]]], importance: Mapping[int, Sequence[float]], keep: int,
    allow_lower_topk: bool, allow_empty: bool,
) -> dict[int, int]:  # fmt: skip
    """Experts that each layer keeps when the scores of all layers are in one ranking."""
    left = {block: len(scores.experts[block]) for block in slices}
    least = {}
    for block, experts in scores.experts.items():
        floor = 1 if allow_lower_topk else experts.top_k
        if experts.groups > 1:
            floor = experts.groups * max(2, -(-experts.top_k // experts.topk_group))
        least[block] = 0 if allow_empty and experts.groups == 1 else floor
    to_drop = sum(left.values()) - keep * len(left)
    ranking = sorted(
        (sum(importance[block][e] for e in row) / len(row), block, place, len(row))
        for block, rows in slices.items() for place, row in enumerate(rows)
    )  # fmt: skip
    for _, block, _, size in ranking:
        if to_drop >= size and left[block] - size >= least[block]:
            left[block] -= size
            to_drop -= size
    return left


def select_layers(scores: Scores, n: int) -> Plan:
    """Layer Drop: the `n` MoE sublayers that change the residual stream least. Dense layers are never chosen."""
    if not 1 <= n < len(scores.mlp):
        raise RequestError(f"cannot drop {n} of {len(scores.mlp)} MoE layers; allowed: 1..{len(scores.mlp) - 1}")
    _refuse_not_finite("MoE layer", scores.mlp)
    chosen = sorted(sorted(scores.mlp, key=lambda i: -scores.mlp[i])[:n])
    return _of(scores, Plan(layers=tuple(chosen), how=f"drop {n} MoE layers"))


def select_blocks(scores: Scores, n: int, *, consecutive: bool = False) -> Plan:
    """Block Drop: the `n` blocks that change the residual stream least, or the best run of `n` blocks."""
    depth = len(scores.block)
    if not 1 <= n < depth:
        raise RequestError(f"cannot drop {n} of {depth} blocks; allowed: 1..{depth - 1}")
    _refuse_not_finite("block", scores.block)
    if not consecutive:
        chosen = sorted(sorted(scores.block, key=lambda i: -scores.block[i])[:n])
        return _of(scores, Plan(blocks=tuple(chosen), how=f"drop {n} blocks"))
    if not scores.gaps:
        raise RequestError(
            "these scores hold no similarities over runs of blocks (layerwise, or blocks gone already); leave out "
            "consecutive"
        )
    first = max(range(depth - n + 1), key=lambda i: scores.gaps[i][n - 1])
    return _of(scores, Plan(blocks=tuple(range(first, first + n)), how=f"drop a run of {n} blocks"))


def _refuse_not_finite(what: str, values: Mapping[int, float]) -> None:
    for index, value in values.items():
        if not math.isfinite(value):
            raise RequestError(f"the similarity of {what} {index} is {value}; score the model in float32")


def _of(scores: Scores, plan: Plan) -> Plan:
    return replace(plan, model=scores.model, fingerprint=scores.fingerprint)
