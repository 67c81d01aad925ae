"""`linear_ce`: cross-entropy, its parts, entropy, rank and argmax of each token, from hidden states and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import linear_ce as ref

FIELDS = ("loss", "lse", "target_logit", "entropy", "rank", "argmax")


class TokenLosses(NamedTuple):
    """One number a row [T], 0 in ignored rows; None for what was not asked for.

    loss, lse, target_logit and entropy (in nats) are float32, or float64 for float64 inputs; rank, the number of logits
    greater than the target's, and argmax are int64. `counted` [T] is False in ignored rows.
    """

    counted: Tensor
    loss: Tensor | None = None
    lse: Tensor | None = None
    target_logit: Tensor | None = None
    entropy: Tensor | None = None
    rank: Tensor | None = None
    argmax: Tensor | None = None


def linear_ce(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    return_: Sequence[str] = FIELDS,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenLosses:
    """Losses of T tokens without all their logits in memory; the logits are float32 for operands of 16 bits too.

    Args:
        h: hidden states [T, H].
        weight: of the head, [V, H], in h's dtype.
        target: [T] integers, the token that each row should give; rows with `ignore_index` cost nothing.
        softcap, logit_scale, bias: logits are softcap·tanh(logit_scale·(h·weightᵀ + bias) / softcap); bias [V].
        return_: which fields are wanted, of loss, lse, target_logit, entropy, rank, argmax.
        vocab_start, vocab_size: weight holds the tokens from vocab_start on of vocab_size in all (a shard of the
            vocabulary). A target in another shard has the logit -inf here; `merge_shards` puts the shards together.
        backend: "auto", "torch" or "triton".

    Gradients flow into h, weight and bias through loss, lse, target_logit and entropy.

    Raises:
        IndexError: a target outside the vocabulary (a GPU looks with LEAN_KERNELS_DEBUG=1).
        ValueError, TypeError: shapes, types or settings that do not fit, naming the argument.
        RuntimeError: tensors on different devices.
    """
    unknown = set(return_) - set(FIELDS)
    if unknown:
        raise ValueError(f"return_ names {', '.join(sorted(unknown))}; it may name {', '.join(FIELDS)}")
    _check(h, weight, target, bias, softcap)
    _rt.same_device(h=h, weight=weight, target=target, bias=bias)
    size = vocab_start + len(weight) if vocab_size is None else vocab_size
    if not 0 <= vocab_start <= size - len(weight):
        raise ValueError(f"tokens {vocab_start} to {vocab_start + len(weight)} are no part of a vocabulary of {size}")
    if size != len(weight) and {"rank", "argmax"} & set(return_):
        raise ValueError("rank and argmax need the whole vocabulary in one weight; leave them out of return_")
    found = _linear_ce(
        h, weight, target, bias, ignore_index, softcap, float(logit_scale), vocab_start, size,
        "entropy" in return_, "rank" in return_, "argmax" in return_, backend,
    )  # fmt: skip
    fields = {name: value for name, value in zip(FIELDS, found) if name in return_}
    return TokenLosses(counted=target != ignore_index, **fields)


def merge_shards(shards: Sequence[TokenLosses]) -> TokenLosses:
    """The losses over a whole vocabulary from those of its shards, of which lse and target_logit must be there.

    The entropy is merged where all shards have it. rank and argmax cannot be merged.
    """
    lses = [shard.lse for shard in shards if shard.lse is not None]
    logits = [shard.target_logit for shard in shards if shard.target_logit is not None]
    if not shards or len(lses) < len(shards) or len(logits) < len(shards):
        raise ValueError("merge_shards needs lse and target_logit of every shard; name them in return_")
    counted, stacked = shards[0].counted, torch.stack(lses)
    lse = stacked.logsumexp(0).where(counted, 0.0)
    target_logit = torch.stack(logits).amax(0)
    entropy = None
    entropies = [shard.entropy for shard in shards if shard.entropy is not None]
    if len(entropies) == len(shards):
        # a shard's mean logit is lse - entropy; the shards' shares weigh them
        means = (stacked - lse).exp() * (stacked - lse - torch.stack(entropies))
        entropy = (-means.sum(0)).where(counted, 0.0)
    return TokenLosses(counted, (lse - target_logit).where(counted, 0.0), lse, target_logit, entropy)


@torch.library.custom_op("lean_kernels::linear_ce", mutates_args=())
def _linear_ce(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
    vocab_size: int,
    entropy: bool,
    rank: bool,
    argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _rt.checks_indices(target):
        _check_targets(target, ignore_index, vocab_size)
    chosen = _rt.choose(backend, h)
    compute = ref.linear_ce if chosen == "torch" else _rt.kernels("linear_ce").linear_ce
    loss, lse, target_logit, spread, place, best = compute(
        h, weight, target, bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        vocab_start=vocab_start, entropy=entropy, rank=rank, argmax=argmax,
    )  # fmt: skip
    return loss, lse, target_logit, spread, place, best


@_linear_ce.register_fake
def _(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, softcap: float | None,
    logit_scale: float, vocab_start: int, vocab_size: int, entropy: bool, rank: bool, argmax: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, total = ref.accumulator(h.dtype), h.shape[0]
    real = [h.new_empty(total, dtype=dtype) for _ in range(3)]
    spread = h.new_empty(total if entropy else 0, dtype=dtype)
    return (*real, spread, *(h.new_empty(total if asked else 0, dtype=torch.int64) for asked in (rank, argmax)))


@torch.library.custom_op("lean_kernels::linear_ce_backward", mutates_args=())
def _linear_ce_backward(
    of_loss: Tensor,
    of_lse: Tensor,
    of_target: Tensor,
    of_entropy: Tensor,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return ref.linear_ce_backward(
        (of_loss, of_lse, of_target, of_entropy), h, weight, target, bias,
        ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, vocab_start=vocab_start,
    )  # fmt: skip


@_linear_ce_backward.register_fake
def _(
    of_loss: Tensor, of_lse: Tensor, of_target: Tensor, of_entropy: Tensor, h: Tensor, weight: Tensor, target: Tensor,
    bias: Tensor | None, *settings: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    db = h.new_empty(0, dtype=ref.accumulator(h.dtype)) if bias is None else bias.new_empty(bias.shape)
    return h.new_empty(h.shape), weight.new_empty(weight.shape), db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, target, bias, *settings = inputs
    ctx.save_for_backward(h, weight, target, bias)
    ctx.settings = settings[:4]
    ctx.mark_non_differentiable(output[4], output[5])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    h, weight, target, bias = ctx.saved_tensors
    dh, dw, db = _linear_ce_backward(*grads[:4], h, weight, target, bias, *ctx.settings)
    return dh, dw, None, None if bias is None else db, *([None] * 9)


_linear_ce.register_autograd(_backward, setup_context=_setup)


def _check(h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if not h.is_floating_point():
        raise TypeError(f"h is {h.dtype}; it must be float16, bfloat16, float32 or float64")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.dtype != h.dtype:
            raise TypeError(f"{name} is {given.dtype}, but h is {h.dtype}; give them one dtype")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target is {target.dtype}; it must be int64 or int32")
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H], V > 0")
    if target.shape != h.shape[:1]:
        raise ValueError(f"target is {tuple(target.shape)}; it must hold one token for each row of h: [{len(h)}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}; it must hold one number a token: [{len(weight)}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")


def _check_targets(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target[{row}] is {int(target[row])}; it must be 0 to {vocab_size - 1}, or {ignore_index} to be ignored"
        )
