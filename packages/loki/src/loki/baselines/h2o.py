"""H2O (arXiv 2306.14048): tokens that drew the most attention so far are kept, with the most recent; others are lost.

The budget is that of the other methods, half of it for heavy hitters and half for recent tokens, and grows with the
row. Each KV head keeps its own tokens and counts the mean attention of its group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loki.method import Method, Step, attention_weights, keep_top, masked_attention
from model_hooks.errors import RequestError


class H2O(Method):
    evicts = True

    def allowed(self, step: Step) -> Tensor:
        """For queries one after another; what is kept and how heavy it is stays in `step.state`."""
        alive, heavy = self.recall(step)
        read = step.read.expand(len(alive), -1, -1)
        kept = alive.new_empty(len(step.q), step.kv_heads, step.queries, step.tokens)
        for i in range(step.queries):
            now = slice(i, i + 1)
            visible = step.rows.visible[:, :, now]
            here = alive[:, :, None] & visible
            counts = read[:, :, now]
            keep = keep_top(heavy[:, :, None], here, counts, 0, counts - counts // 2)
            alive &= keep[:, :, 0] | ~visible[:, :, 0]
            kept[:, :, now] = keep
            heavy += column_sums(_query(step, i), keep)
        if step.state is not None:
            step.state.update(alive=alive, heavy=heavy)
        return kept

    def recall(self, step: Step) -> tuple[Tensor, Tensor]:
        """Who is kept and how heavy, [B, Hkv, S] each; new tokens are kept and weigh nothing."""
        shape = (len(step.q), step.kv_heads, step.tokens)
        alive = torch.ones(shape, dtype=torch.bool, device=step.q.device)
        heavy = torch.zeros(shape, dtype=torch.float32, device=step.q.device)
        state = step.state or {}
        if "alive" in state:
            known = state["alive"].shape[-1]
            alive[..., :known], heavy[..., :known] = state["alive"], state["heavy"]
        elif not step.first:
            raise RequestError("h2o has not seen the prompt; use the cache that `generate` or loki.LokiCache makes")
        return alive, heavy

    def prompt(self, step: Step) -> Tensor | None:
        """The prompt attends to all that is kept, and its attention is counted."""
        if step.state is None:
            raise RequestError("h2o keeps what it counts in the cache; use the one that loki.LokiCache makes")
        alive, heavy = self.recall(step)
        allowed = alive[:, :, None].expand(-1, -1, step.queries, -1)
        heavy += column_sums(step, allowed)
        step.state.update(alive=alive, heavy=heavy)
        return None if step.first else masked_attention(step, allowed)


def column_sums(step: Step, allowed: Tensor) -> Tensor:
    """Attention that each token draws from all queries, the mean over a group, [B, Hkv, S]."""
    parts = [weights.mean(2).sum(2).float() for _, weights in attention_weights(step, allowed)]
    return torch.stack(parts).sum(0)


def _query(step: Step, i: int) -> Step:
    rows = replace(step.rows, queries=1, mask=step.rows.visible[:, :, i : i + 1])
    return replace(step, q=step.q[:, :, i : i + 1], rows=rows)


METHOD = H2O()
