"""Self-speculative decoding: the dropped model drafts, its parent verifies; they share every weight.

Greedy speculative decoding gives exactly the parent's own greedy text. The draft costs no memory for weights, only the
KV cache of the attention layers that it kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_drop.plan import Plan
from llm_drop.repair import apply

if TYPE_CHECKING:
    from torch import Tensor


def sharing_copy(model: Any) -> Any:
    """A second module tree over the same parameters and buffers: structure can be changed, weights are not copied."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class Drafted:
    """What came out of `generate`.

    Args:
        sequences: [batch, T], prompt included; the parent's own greedy text.
        new_tokens: tokens generated.
        parent_steps: forward passes of the parent.
        draft_steps: forward passes of the draft, one per drafted token.
    """

    sequences: Tensor
    new_tokens: int
    parent_steps: int
    draft_steps: int

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the parent accepted. Each parent step also adds a token of its own."""
        return max(0, self.new_tokens - self.parent_steps) / self.draft_steps if self.draft_steps else 0.0


def draft_of(model: Any, plan: Plan) -> Any:
    """The dropped model as a draft for `model`, which stays as it is."""
    return apply(sharing_copy(model), plan, check=False)


def generate(model: Any, draft: Any, input_ids: Tensor, *, max_new_tokens: int = 64, **kwargs: Any) -> Drafted:
    """Greedy text of `model`, drafted by `draft` (transformers' assisted generation).

    Args:
        input_ids: [1, T]; assisted generation takes one sequence at a time.
        kwargs: further arguments of `model.generate`.
    """
    steps = {"parent": 0, "draft": 0}

    def counter(name: str) -> Any:
        def count(*_: Any) -> None:
            steps[name] += 1

        return count

    hooks = [model.register_forward_hook(counter("parent")), draft.register_forward_hook(counter("draft"))]
    try:
        sequences = model.generate(
            input_ids, assistant_model=draft, do_sample=False, max_new_tokens=max_new_tokens, **kwargs
        )
    finally:
        for hook in hooks:
            hook.remove()
    return Drafted(sequences, sequences.shape[1] - input_ids.shape[1], steps["parent"], steps["draft"])
