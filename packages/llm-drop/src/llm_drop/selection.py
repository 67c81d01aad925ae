"""What the paper does with the measured similarities: drop what changes the residual stream least.

    S(u) = 1 - mean over tokens of cos(x, x + u(x))              (section 3: importance of a unit u)

A unit is a block, an attention sublayer or a feed-forward sublayer, each with its norms and its residual connection.
Block, attention and MLP drop sort one kind of unit; joint drop sorts both kinds of sublayer in one list. All
selections below come from one `Scores`, that is from one pass over the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from llm_drop.plan import ONE_MUST_STAY, Plan
from model_hooks import RequestError

if TYPE_CHECKING:
    from llm_drop.scoring import Scores

Unit = tuple[str, int]  # ("attention" | "mlp" | "block", original index)
Objective = Literal["cosine", "norm"]


def least(importance: Mapping[Unit, float], n: int) -> list[Unit]:
    """The `n` units of least importance. Equal importance: the one that comes first in the mapping goes first."""
    for (kind, index), value in importance.items():
        if not math.isfinite(value):
            raise RequestError(f"the importance of {kind} {index} is {value}; the scores must be finite numbers")
    return sorted(importance, key=importance.__getitem__)[:n]  # sorted() is stable


def select(
    scores: Scores,
    *,
    attention: int | None = None,
    mlp: int | None = None,
    blocks: int | None = None,
    joint: int | None = None,
    consecutive: bool = False,
    objective: Objective = "cosine",
) -> Plan:
    """Choose what to drop: `attention` and/or `mlp` sublayers, or whole `blocks`, or `joint` sublayers of both kinds.

    Args:
        scores: what `llm_drop.score` measured.
        consecutive: with `blocks`: the run of blocks i..i+n-1 for which cos(h_i, h_{i+n}) is largest.
        objective: "cosine" (the paper's), or "norm": mean over tokens of |u(x)| / |x|, measured in the same pass.

    Raises:
        RequestError: nothing or too much is asked for (the message states the allowed range), kinds are mixed,
            or a score is not finite.
    """
    asked = {"attention": attention, "mlp": mlp, "blocks": blocks, "joint": joint}
    chosen = {name: n for name, n in asked.items() if n is not None}
    if not chosen or (len(chosen) > 1 and set(chosen) != {"attention", "mlp"}):
        raise RequestError(
            f"asked for {chosen or 'nothing'}; give attention and/or mlp, or blocks, or joint, each at least 1"
        )
    if consecutive and set(chosen) != {"blocks"}:
        raise RequestError("consecutive selection is of whole blocks; give blocks=N with it")
    for name, n in chosen.items():
        _in_range(name, n, _most(name, scores))

    if consecutive:
        first = _best_run(scores, chosen["blocks"])
        units: list[Unit] = [("block", i) for i in range(first, first + chosen["blocks"])]
    else:
        units = []
        for name, n in chosen.items():
            units += least(_candidates(name, scores, objective), n)
    how = " ".join(f"{name} {n}" for name, n in chosen.items())
    how += " consecutive" * consecutive + f" by {objective}" * (objective != "cosine")
    plan = plan_of(units, scores, how, objective)
    if 0 < len(scores.attention) == len(plan.attention):  # of a model that had lost some, a few blocks may hold all
        joints = f"1..{_largest_joint(_candidates('joint', scores, objective), len(scores.attention))}"
        raise RequestError(
            f"{how} would drop every attention layer; {ONE_MUST_STAY}: ask for {joints if joint else 'fewer'}"
        )
    return plan


def plan_of(units: Iterable[Unit], scores: Scores, how: str, objective: Objective = "cosine") -> Plan:
    """The plan that drops these units of the scored model; of a block, the sublayers that it still has."""
    units = list(units)
    importance = scores.importance(objective)
    return Plan(
        scores.num_layers,
        attention=tuple(i for kind, i in units if kind != "mlp" and i in scores.attention),
        mlp=tuple(i for kind, i in units if kind != "attention" and i in scores.mlp),
        how=how,
        model=scores.model,
        fingerprint=scores.fingerprint,
        importance=sum(importance[unit] for unit in units),
    )


def select_iteratively(
    measure: Callable[[Plan | None], Scores], step: Mapping[str, int], rounds: int, objective: Objective = "cosine"
) -> Plan:
    """Iterative dropping: measure the model as it stands, drop, measure again.

    Args:
        measure: scores of the model with a plan applied (None: nothing dropped yet). Dropped units are absent from
            what it returns; whatever is left of their blocks acts on the data, as it will in the final model.
        step: what each round drops, as keywords of `select` (`{"attention": 1}`).
        rounds: number of rounds; one pass over the data each.
    """
    taken: Plan | None = None
    first: Scores | None = None
    for _ in range(rounds):
        scores = measure(taken)
        first = first or scores
        plan = select(scores, objective=objective, **step)  # type: ignore[arg-type]
        before = taken or Plan(scores.num_layers, importance=0.0)
        taken = Plan(
            scores.num_layers,
            before.attention + plan.attention,
            before.mlp + plan.mlp,
            how=" ".join(f"{name} {n * rounds}" for name, n in step.items()) + " iterative",
            model=first.model,
            fingerprint=first.fingerprint,
            importance=(before.importance or 0.0) + (plan.importance or 0.0),
        )
    if taken is None:
        raise RequestError(f"iterative selection needs at least 1 round, got {rounds}")
    return taken


def _candidates(name: str, scores: Scores, objective: Objective) -> dict[Unit, float]:
    """The units that a request may take, with their importance, in the order that decides ties."""
    kinds = {"blocks": ("block",), "joint": ("attention", "mlp")}.get(name, (name,))
    importance = scores.importance(objective)
    return {unit: value for unit, value in importance.items() if unit[0] in kinds}


def _most(name: str, scores: Scores) -> int:
    attention, mlp, blocks = len(scores.attention), len(scores.mlp), len(scores.block)
    with_attention = sum(index in scores.attention for index in scores.block)
    return {
        "attention": attention - 1,
        "mlp": mlp,
        "blocks": blocks - 1 if with_attention == attention else blocks,
        "joint": attention + mlp - 1,
    }[name]


def _in_range(name: str, n: int, most: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
        why = f"; {ONE_MUST_STAY}" if name != "mlp" else ""
        raise RequestError(f"{name} {n} is out of range; allowed: 1..{most}{why}")


def _largest_joint(importance: Mapping[Unit, float], attention: int) -> int:
    """How many sublayers go before the last attention would."""
    order = least(importance, len(importance))
    last = [place for place, (kind, _) in enumerate(order) if kind == "attention"][attention - 1]
    return last


def _best_run(scores: Scores, n: int) -> int:
    """First block of the run of `n` whose input and output are most similar. Equal similarity: the earliest run."""
    if len(scores.block) != scores.num_layers:
        raise RequestError("consecutive selection needs the scores of a model from which nothing was dropped")
    if not scores.gaps:
        raise RequestError("these scores hold no similarities over gaps; score again with gaps")
    column = {start: row[n - 1] for start, row in enumerate(scores.gaps) if len(row) >= n}
    for start, value in column.items():
        if not math.isfinite(value):
            raise RequestError(f"the similarity of blocks {start}..{start + n - 1} is {value}; it must be finite")
    return max(column, key=column.__getitem__)
