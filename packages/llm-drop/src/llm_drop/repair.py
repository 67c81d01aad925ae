"""Constant-bias repair: a dropped sublayer leaves behind the mean of what it used to add.

Of all constants c, the one with the least mean squared error to what the sublayer added is its mean over tokens,

    argmin_c  mean_t |u(x_t) - c|^2  =  mean_t u(x_t),

which the scoring pass has measured already. It costs one vector per dropped sublayer and no training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_drop.plan import Plan
from llm_drop.scoring import Scores
from llm_drop.selection import Unit
from model_hooks import RequestError

if TYPE_CHECKING:
    from torch import Tensor


def constants(plan: Plan, scores: Scores) -> dict[Unit, Tensor]:
    """The vector, [H], that takes the place of each sublayer of `plan`."""
    missing = [unit for unit in plan.units if unit not in scores.deltas]
    if missing:
        kind, index = missing[0]
        raise RequestError(
            f"the scores hold no mean change of {kind} {index}; score again, and keep the .safetensors beside the JSON"
        )
    return {unit: scores.deltas[unit] for unit in plan.units}


def apply(model: Any, plan: Plan, *, repair: Scores | None = None, check: bool = True) -> Any:
    """Drop what `plan` says from `model`, in place, and return it; with `repair`, leave the mean changes behind.

    Args:
        check: compare the model's fingerprint with the plan's and the scores' first (reads all weights).

    Raises:
        FingerprintMismatch: the plan or the scores were made from another model.
        RequestError: an index is out of range or dropped already. The model is untouched in every such case.
    """
    from model_hooks import FingerprintMismatch, anatomy, drop, fingerprint

    if check and (plan.fingerprint or repair is not None):
        found = fingerprint(model)
        if plan.fingerprint and found != plan.fingerprint:
            raise FingerprintMismatch(
                f"the plan was made from {plan.model} ({plan.fingerprint}), this model is {found}; "
                "score it and plan again"
            )
        if repair is not None:
            repair.check(model=found)
    if (layers := anatomy(model).num_original_layers) != plan.num_layers:
        raise FingerprintMismatch(f"the plan is for {plan.num_layers} layers, the model has {layers}; plan again")
    bias: Any = constants(plan, repair) if repair is not None else None
    return drop(model, attention=plan.attention, mlp=plan.mlp, bias=bias)
