"""A routed model as the draft of its own base: text that is the base's, word for word, and cheaper to have.

The draft proposes some tokens with layers closed; the base reads them all in one pass and keeps those that it would
have written itself (speculative decoding). Both are the same weights.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor

from model_hooks.errors import RequestError

from .attaching import base_of, detach
from .cache import RoutedCache
from .gate import runtime_of


def sharing_copy(model: Any) -> Any:
    """A copy of `model` with modules of its own and the very same weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def _refuse_full_windows(model: Any, tokens: float) -> None:
    windows = [w for layer in RoutedCache(model).layers if (w := getattr(layer, "sliding_window", None))]
    if windows and tokens > min(windows):
        raise RequestError(
            f"prompt and new tokens may be {tokens:g} tokens, and layers of this model look back {min(windows)}: "
            "rejected drafts cannot be taken back from a full window; give a smaller max_new_tokens"
        )


def generate_lossless(model: Any, input_ids: Tensor, **options: Any) -> tuple[Tensor, int]:
    """What the base of the routed `model` would generate, drafted by the routed model; and the passes of the base.

    Args:
        input_ids: one prompt, [1, T], since transformers drafts for one sequence.
        options: of transformers' `generate`; num_assistant_tokens is how many tokens are drafted at once.

    Returns:
        Token ids [1, T + new], and how often the base ran: once a token without a draft.

    Raises:
        RequestError: no routers are attached, more than one prompt is given, or the text would outgrow a window of
            attention (transformers cannot take rejected drafts back from a full one).
    """
    runtime_of(model)
    if len(input_ids) != 1:
        raise RequestError(f"{len(input_ids)} prompts: a draft works on one, so give them one by one")
    routed = base_of(model)
    if routed is not model:
        raise RequestError("with LoRA on the model its base cannot be told apart; merge the adapter first")
    _refuse_full_windows(routed, input_ids.shape[1] + options.get("max_new_tokens", math.inf))
    base = detach(sharing_copy(routed))
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    base.register_forward_pre_hook(count)
    drafted = options.pop("num_assistant_tokens", None)
    before = routed.generation_config.num_assistant_tokens
    try:
        if drafted is not None:
            routed.generation_config.num_assistant_tokens = drafted
        out: Tensor = base.generate(input_ids=input_ids, assistant_model=routed, **options)
        return out, passes
    finally:
        routed.generation_config.num_assistant_tokens = before
