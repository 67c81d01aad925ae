"""Attention to all tokens."""

from __future__ import annotations

from torch import Tensor

from loki.method import Method, Step, masked_attention


class Full(Method):
    reads_all = True

    def allowed(self, step: Step) -> Tensor:
        return step.rows.visible.expand(len(step.q), step.kv_heads, -1, -1)

    def attend(self, step: Step) -> Tensor:
        return masked_attention(step)


METHOD = Full()
