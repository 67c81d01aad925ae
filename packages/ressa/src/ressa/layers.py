"""A linear layer with a masked adapter: y = x (M o (W + c B A))^T, and the same layer as the dense teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from lean_kernels import apply_mask_, merge_sparse_lora, pack_mask, sparse_lora_matmul, unpack_mask
from model_hooks.errors import RequestError

BACKWARDS = ("exact", "ste", "auto")


def masked_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, bias: Tensor | None, backward: str
) -> Tensor:
    """x (mask o (w + scale b a))^T + bias, [..., out]; w is frozen.

    backward: exact, the gradient of this formula; or ste, without the mask in the gradients of a and b.
    """
    # autocast would give the passes factors of other dtypes than they save
    with torch.autocast(x.device.type, enabled=False):
        return sparse_lora_matmul(x, w, a, b, mask, scale, bias, straight_through=backward == "ste")


class SparseLoraLinear(LoraLinear):
    """PEFT's LoRA layer whose update is masked, for one or more adapters that share the mask.

    Without a mask (a connector's layer) it is plain LoRA.

    Attributes:
        mask: bool [out, in], or int32 bits on a GPU, None for plain LoRA; not saved with the weights.
        mode: student (with adapters), pruned (masked, without them) or dense (neither).
        dense_weight: The dense weight on the CPU, where the base layer's is pruned already.
        backward: exact, ste or auto (ste until `set_backward` says exact).
        update: masked; or dense, LoRA as it is, added to the pruned weight.
        lose_zeros: Merge a dense update all the same.
    """

    def __init__(
        self, base_layer: Any, adapter_name: str, config: Any, mask: Tensor | None = None, dense: Tensor | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # no buffer: wrappers for several processes would send it around before every step
        self.mask = mask
        self.mode, self.backward, self.update = "student", config.backward, config.update
        self.dense_weight = dense
        self.lose_zeros = False
        self._before_merge: Tensor | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.mask is None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        if self.mode == "dense":
            return self._dense(x)
        if self.mask is None:
            if self.mode == "pruned" and not self.merged:
                return self._base(x)
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if adapter_names is not None:
            raise RequestError("masked adapters do not mix in one batch; set one with set_adapter")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self._base(x)
        weight = self._weight()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.mode == "pruned" or self.disable_adapters or not active:
            return F.linear(x.to(weight.dtype), self._pruned_weight(), self._bias()).to(x.dtype)
        return self._student(x.to(weight.dtype), weight, active).to(x.dtype)

    def _student(self, x: Tensor, weight: Tensor, active: list[str]) -> Tensor:
        a, b, scale = self._factors(active, weight.dtype)
        drops = [self.lora_dropout[name] for name in active]
        dropped = self.training and any(isinstance(drop, torch.nn.Dropout) and drop.p for drop in drops)
        if self.update == "masked" and not dropped:
            backward = "exact" if self.backward == "exact" else "ste"
            return masked_linear(x, weight, a, b, self._kernel_mask(), scale, self._bias(), backward)
        out = F.linear(x, self._pruned_weight(), self._bias())
        read = drops[0](x) if dropped else x
        if self.update == "dense":
            return out + scale * F.linear(F.linear(read, a), b)
        return out + F.linear(read, (scale * (b @ a)).masked_fill(~self._bool_mask(), 0))

    def _factors(self, active: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale; those of several adapters one below, or beside, the other."""
        if len(active) == 1:
            a, b = self._pair(active[0])
            return a.to(dtype), b.to(dtype), float(self.scaling[active[0]])
        pairs = [(*self._pair(name), self.scaling[name]) for name in active]
        return torch.cat([a for a, _, _ in pairs]).to(dtype), torch.cat([c * b for _, b, c in pairs], 1).to(dtype), 1.0

    def _pair(self, name: str) -> tuple[Any, Any]:
        """A [r, in] and B [out, r] of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight

    def _pruned_weight(self) -> Tensor:
        """The base weight with zeros; on a CPU a tenth of the time of `masked_fill`."""
        return apply_mask_(self._weight().detach().clone(), self._kernel_mask())

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _base(self, x: Tensor) -> Tensor:
        weight = self._weight()
        return F.linear(x.to(weight.dtype), weight, self._bias()).to(x.dtype)

    def _dense(self, x: Tensor) -> Tensor:
        kept = self.dense_weight if self.dense_weight is not None else self._before_merge
        if kept is None:
            base: Tensor = self.base_layer(x)  # as the dense model calls it
            return base
        return F.linear(x, kept.to(x.device), self._bias())

    def _kernel_mask(self) -> Tensor:
        """The mask as the kernels read it: bits on a GPU, packed once, bools on a CPU."""
        assert self.mask is not None
        device = self._weight().device
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        if device.type == "cuda" and self.mask.dtype == torch.bool:
            self.mask = pack_mask(self.mask)
        return self.mask

    def _bool_mask(self) -> Tensor:
        mask = self._kernel_mask()
        return mask if mask.dtype == torch.bool else unpack_mask(mask, self._weight().shape[1])

    @property
    def has_dense(self) -> bool:
        """Whether the dense weight can be had: held apart, or in the base layer with values where the mask has none."""
        if self.mask is None or self.dense_weight is not None:
            return True
        gone = ~self._bool_mask()
        source = self._before_merge if self._before_merge is not None else self._weight()
        return not bool(gone.any()) or bool((source[gone] != 0).any())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write M o (W + c B A), computed in float32 and rounded once, with exact zeros, over the base weight.

        Raises `RequestError` for a dense update, which would lose the zeros, and for weights that are no numbers.
        """
        if self.mask is None:
            if self._before_merge is None:
                self._before_merge = self._weight().detach().clone()
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_A]
        if not names:
            return
        if not self.lose_zeros:
            self.refuse_dense_update()
        weight = self._weight()
        self._write(weight, self._merged([*self.merged_adapters, *names]))
        self.merged_adapters.extend(names)

    def refuse_dense_update(self) -> None:
        if self.update == "dense" and self.mask is not None:
            raise RequestError(
                "a dense update cannot be merged without losing the zeros; train masked adapters (update='masked'), or "
                "merge with lose_zeros=True"
            )

    def _merged(self, names: list[str]) -> Tensor:
        """The weight with adapters `names` merged, in the storage dtype."""
        weight = self._before_merge if self._before_merge is not None else self._weight()
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b, scale = self._factors(names, wide)
        dense = weight.detach().to(wide)
        if self.update == "dense":
            return dense.masked_fill(~self._bool_mask(), 0).addmm_(b, a, alpha=scale).to(weight.dtype)
        return merge_sparse_lora(dense, a, b, self._kernel_mask(), scale).to(weight.dtype)

    def _write(self, weight: Tensor, merged: Tensor) -> None:
        if not bool(torch.isfinite(merged).all()):
            raise RequestError("merged weights are NaN or infinite; the adapter is broken, nothing was merged here")
        if self._before_merge is None:
            self._before_merge = weight.detach().clone()
        weight.data = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back, bit for bit, the weight from before."""
        if not self.merged:
            return
        assert self._before_merge is not None
        self._weight().data = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "sparse" + super().__repr__().removeprefix("lora.")
