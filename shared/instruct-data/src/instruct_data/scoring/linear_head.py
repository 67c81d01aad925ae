"""The head of a model where it is one matrix: `lean_kernels.linear_ce` then gives losses without logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lean_kernels import linear_ce


class LinearHead(NamedTuple):
    """Logits are softcap·tanh(scale·(hidden · weightᵀ + bias) / softcap), as far as the model's configuration tells."""

    layer: nn.Linear
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> LinearHead | None:
        """The head of `model`; None where it is more than its matrix, or where its own product is the quicker one.

        A CPU multiplies half precision several times as fast as float32, which `linear_ce` multiplies in.
        """
        layer = output_embedding(model)
        plain = type(layer) is nn.Linear and "forward" not in layer.__dict__  # accelerate puts its own there
        if not plain or layer._forward_hooks or layer._forward_pre_hooks or layer.weight.is_meta:
            return None
        if layer.weight.device.type == "cpu" and layer.weight.dtype not in (torch.float32, torch.float64):
            return None
        config = model.config.get_text_config()
        # Cohere's models multiply, Granite's divide
        scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        return cls(layer, scale, getattr(config, "final_logit_softcapping", None))

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [n] in nats, float32 (float64 for float64), of hidden states [n, hidden_size]."""
        weight, bias = self.layer.weight, self.layer.bias
        losses = linear_ce(
            hidden.to(weight.device), weight, targets.to(weight.device), bias=bias, logit_scale=self.scale,
            softcap=self.softcap, return_=("loss",),
        ).loss  # fmt: skip
        assert losses is not None
        return losses


def output_embedding(model: Any) -> Any:
    """The module that gives logits, None for a model without one."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
