"""lm-eval on a routed model, fairly: the context of a question decides, and all its answers run the same layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .context import routing_context

Request = tuple[tuple[str, str], list[int], list[int]]


@cache
def routed_lm() -> Any:
    """The class `RoutedLM`, an HFLM of lm-eval; made on demand, since lm-eval is an extra."""
    from lm_eval.models.huggingface import HFLM

    class RoutedLM(HFLM):
        """HFLM whose log-likelihoods are routed on the context alone. Its `generate_until` needs no change: `generate`
        of a routed model decides on the prompt."""

        def _loglikelihood_tokens(
            self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            size = override_bs or int(self.batch_size)
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for start in range(0, len(order), size):
                part = order[start : start + size]
                for place, result in zip(part, self._score([requests[i] for i in part])):
                    found[place] = result
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], result)
            return found

        @torch.no_grad()
        def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
            rows = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
            longest = max(len(row) for row in rows) - 1
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):  # the last token is predicted, not read
                ids[place, : len(row) - 1] = torch.tensor(row[:-1])
                mask[place, : len(row) - 1] = 1
            lens = torch.tensor([max(1, len(r) - len(q[2])) for r, q in zip(rows, requests)])
            with routing_context(prompt_lens=lens):
                logits = self.model(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
                ).logits
            return [self._answer(logits[i], row, len(requests[i][2])) for i, row in enumerate(rows)]

        @staticmethod
        def _answer(logits: torch.Tensor, row: list[int], length: int) -> tuple[float, bool]:
            length = min(length, len(row) - 1)
            log_p = logits[len(row) - 1 - length : len(row) - 1].float().log_softmax(-1)  # [length, vocabulary]
            answer = torch.tensor(row[-length:], device=log_p.device)
            return float(log_p.gather(1, answer[:, None]).sum()), bool((log_p.argmax(-1) == answer).all())

    return RoutedLM
