"""SnapKV (arXiv 2404.14469): the last queries of a prompt vote for the tokens of it that are kept; later ones all are.

Votes are the attention of the last 32 queries, the mean over a group, smoothed over 5 neighbours. The budget is that of
the other methods for the prompt's length, and includes the window that votes. It is a method of decoding: there is no
masked form, because one vote decides for all queries that follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loki.method import Method, Step, attention_weights, keep_top, masked_attention
from model_hooks.errors import RequestError

WINDOW = 32
POOL = 5


class SnapKV(Method):
    evicts = True
    masked = False

    def allowed(self, step: Step) -> Tensor:
        if "alive" not in (step.state or {}):
            raise RequestError("snapkv has not seen the prompt; use the cache that `generate` or loki.LokiCache makes")
        return self.alive(step)[:, :, None].expand(-1, -1, step.queries, -1)

    def alive(self, step: Step) -> Tensor:
        """[B, Hkv, S]; tokens that came after the vote are kept."""
        alive = torch.ones(len(step.q), step.kv_heads, step.tokens, dtype=torch.bool, device=step.q.device)
        if step.state and "alive" in step.state:
            known = step.state["alive"]
            alive[..., : known.shape[-1]] = known
        return alive

    def prompt(self, step: Step) -> Tensor | None:
        """The prompt attends to all that is kept, then votes."""
        if step.state is None:
            raise RequestError("snapkv keeps its choice in the cache; use the one that loki.LokiCache makes")
        before = self.alive(step)[:, :, None]
        allowed = before.expand(-1, -1, step.queries, -1)
        votes = [
            weights[..., max(0, step.queries - WINDOW - part.start) :, :].mean(2).sum(2)
            for part, weights in attention_weights(step, allowed)
        ]
        smooth = torch.nn.functional.avg_pool1d(torch.stack(votes).sum(0), POOL, stride=1, padding=POOL // 2)
        last = step.rows.visible[:, :, -1:] & before
        window = min(WINDOW, step.queries)
        kept = keep_top(
            smooth[:, :, None], last, step.read[..., -1:], 0, torch.minimum(step.read[..., -1:], torch.tensor(window))
        )
        step.state["alive"] = kept[:, :, 0] | ~step.rows.visible[:, :, -1]  # a static cache has room for later tokens
        return None if step.first else masked_attention(step, allowed)


METHOD = SnapKV()
