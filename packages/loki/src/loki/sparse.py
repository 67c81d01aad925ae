"""Loki itself: tokens are picked by the first d of D turned dimensions and read whole (Algorithm 1 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lean_kernels import loki_decode

from .method import OWN, Method, Step, keep_top_blocks, masked_attention, scores_of, spans


class Sparse(Method):
    """Few queries go through `lean_kernels.loki_decode`; a whole text goes through its dense, masked form."""

    needs_basis = True
    turned = True
    uses = frozenset(OWN)

    def dimensions(self, step: Step) -> int:
        return step.d

    def allowed(self, step: Step) -> Tensor:
        if step.projection is not None:  # keys lie as they are: the query is projected and compared with all of them
            q, k = step.projected, step.keys
        else:
            d = self.dimensions(step)
            q, k = step.q[..., :d], step.keys[..., :d]
        heads = step.kv_heads if step.config.select == "group" else step.q.shape[1]
        kept = torch.empty(len(q), heads, step.queries, step.tokens, dtype=torch.bool, device=q.device)
        for part in spans(step.queries, q.shape[0] * q.shape[1] * step.tokens):
            scores = scores_of(step, part, q, k)
            visible, counts = step.rows.visible[:, :, part], step.read[:, :, part]
            if step.config.mass is not None:
                counts = torch.minimum(counts, self.needed(step, part, q, k, scores))
            kept[:, :, part] = keep_top_blocks(scores, visible, counts, step.config, step.config.block)
        return kept

    def needed(self, step: Step, part: slice, q: Tensor, k: Tensor, scores: Tensor) -> Tensor:
        """The fewest tokens that hold the share `mass` of the approximate attention, [B, H, Q'] (ours)."""
        visible = step.rows.visible[:, :, part]
        if step.config.select == "group" and step.config.group_reduce == "softmax_mean":
            shares = scores
        else:
            shares = (scores * step.scale).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
        held = shares.sort(-1, descending=True).values.cumsum(-1)
        assert step.config.mass is not None
        fewest = (held < step.config.mass * held[..., -1:]).sum(-1) + 1
        return fewest.clamp_min(max(1, step.config.min_k))

    def decode(self, step: Step) -> Tensor:
        if step.projection is not None or step.config.mass is not None:
            return masked_attention(step, self.allowed(step))
        config, rows = step.config, step.rows
        counts = [rows.read_by_query(step.k_amount, config, i) for i in range(step.queries)]
        fixed: dict[str, Any] = {
            "d": self.dimensions(step), "scale": step.scale, "select": config.select, "reduce": config.group_reduce,
            "sink": config.sink, "recent": config.recent, "block": config.block, "softcap": step.softcap,
            "start": rows.start, "backend": config.backend,
        }  # fmt: skip
        if all(isinstance(n, int) and n == counts[0] for n in counts):
            return _output(loki_decode(step.q, step.k, step.v, rows.lens, topk=counts[0], mask=rows.mask, **fixed))
        parts = []
        for i, topk in enumerate(counts):  # each query reads its own number of tokens
            mask = None if rows.mask is None else rows.mask[:, :, i : i + 1]
            lens = rows.lens - (step.queries - 1 - i)
            query = step.q[:, :, i : i + 1]
            parts.append(_output(loki_decode(query, step.k, step.v, lens, topk=topk, mask=mask, **fixed)))
        return torch.cat(parts, dim=2)


def _output(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)  # no log-sum-exp was asked for
    return result


METHOD = Sparse()
