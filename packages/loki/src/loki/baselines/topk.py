"""Exact top-k: tokens are picked by their true scores, at the price of computing them all. Loki's upper bound."""

from __future__ import annotations

from loki.method import Step
from loki.sparse import Sparse


class TopK(Sparse):
    needs_basis = False
    turned = False

    def dimensions(self, step: Step) -> int:
        return step.q.shape[-1]


METHOD = TopK()
