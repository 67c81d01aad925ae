"""Quest (arXiv 2406.10774): pages of keys are ranked by a bound on their scores, and the best pages are read.

A page's bound for a query is the sum over dimensions of the greater of q·min and q·max. The page at work is always
read, as are those with the tokens of `sink` and `recent`. `block` sets the page's size, 16 unless given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loki.method import Method, Step, agree, best_blocks, spans, spread, to_blocks

PAGE = 16


class Quest(Method):
    uses = frozenset({"select", "group_reduce", "block"})

    def allowed(self, step: Step) -> Tensor:
        page = step.config.block if step.config.block > 1 else PAGE
        low, high = bounds(step, page)
        dtype = low.dtype
        heads = step.kv_heads if step.config.select == "group" else step.q.shape[1]
        kept = torch.empty(len(step.q), heads, step.queries, step.tokens, dtype=torch.bool, device=step.q.device)
        for part in spans(step.queries, step.q.shape[0] * step.q.shape[1] * step.tokens):
            visible = step.rows.visible[:, :, part]
            q = step.q[:, :, part].to(dtype).unflatten(1, (step.kv_heads, -1))  # [B, Hkv, G, Q', D]
            upper = q.clamp_min(0) @ high + q.clamp_max(0) @ low
            present = to_blocks(visible, page, False).any(-1)
            scores = agree(step, upper.flatten(1, 2), present)
            place = visible.cumsum(-1)
            ends = (place <= step.config.sink) | (place > place[..., -1:] - max(1, step.config.recent))
            pages = best_blocks(scores, ends & visible, visible, step.read[:, :, part] // page * page, page)
            kept[:, :, part] = spread(pages, page, step.tokens) & visible
        return kept


def bounds(step: Step, page: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each key dimension over the tokens of a page, [B, Hkv, 1, D, pages], padding left out."""
    dtype = torch.float64 if step.q.dtype == torch.float64 else torch.float32
    keys = step.keys.to(dtype).transpose(-1, -2)  # [B, Hkv, D, S]
    real = step.rows.visible.any(2, keepdim=True)  # [B, 1, 1, S]
    low = to_blocks(keys.masked_fill(~real, torch.inf), page, torch.inf).amin(-1)
    high = to_blocks(keys.masked_fill(~real, -torch.inf), page, -torch.inf).amax(-1)
    empty = low > high  # nothing but padding: never visible, so any finite number does
    return low.masked_fill(empty, 0.0).unsqueeze(2), high.masked_fill(empty, 0.0).unsqueeze(2)


METHOD = Quest()
