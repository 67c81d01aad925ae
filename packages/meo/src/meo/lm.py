"""lm-eval on a model with banks: at level prefix a question's context decides, as the prompt does in generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .context import with_options

Request = tuple[tuple[str, str], list[int], list[int]]


@cache
def prompted_lm() -> Any:
    """The class `PromptedLM`, an HFLM of lm-eval; made on demand, since lm-eval is an extra."""
    from lm_eval.models.huggingface import HFLM

    class PromptedLM(HFLM):
        """HFLM that tells the gates of level prefix where a question ends. Its `generate_until` needs no change:
        `generate` decides on the prompt."""

        def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            places: dict[int, list[int]] = {}  # by the tokens of the context that are left where it is cut
            for place, (_, context, answer) in enumerate(requests):
                left = min(len(context), self.max_length + 1 - len(answer))
                places.setdefault(max(1, left), []).append(place)
            found: dict[int, tuple[float, bool]] = {}
            for length, own in places.items():
                with with_options(prompt_lens=torch.tensor([length])):
                    part = super()._loglikelihood_tokens([requests[i] for i in own], *args, **kwargs)
                found |= dict(zip(own, part))
            return [found[place] for place in range(len(requests))]

    return PromptedLM
