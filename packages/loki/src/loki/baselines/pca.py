"""PCAAttn of the paper (section 3.2 and appendix): all tokens are read, scored by the first d dimensions alone."""

from __future__ import annotations

from torch import Tensor

from loki.method import Method, Step, masked_attention


class PCA(Method):
    needs_basis = True
    turned = True
    approximates = True

    def allowed(self, step: Step) -> Tensor:
        return step.rows.visible.expand(len(step.q), step.kv_heads, -1, -1)

    def attend(self, step: Step) -> Tensor:
        if step.projection is not None:  # keys lie as they are
            return masked_attention(step, None, step.projected)
        return masked_attention(step, None, step.q[..., : step.d], step.keys[..., : step.d])


METHOD = PCA()
