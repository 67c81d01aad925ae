"""Fitting the basis: keys stream through the attention interface, and only their sums are kept (section 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from model_hooks.trace import eval_mode
from model_hooks.watch import Journal, Progress, check_data, own_share, reduce_sums

from .attention import Call
from .basis import Basis, Provenance, principal_components, shape_of, structure
from .sessions import attach, attention_modules, check_model, decoder_of, detach, disable

Batch = tuple[Tensor, Tensor]  # token ids and mask, [B, T] each


class KeyStatistics:
    """Sums over the keys of every layer and KV head: enough for mean and covariance, and they add up.

    Attributes:
        layers: what the rows are about.
        sums: float64, on the CPU: `count` [L], `sum` [L, Hkv, D], `outer` [L, Hkv, D, D] of keys.
    """

    def __init__(self, layers: Iterable[int], heads: int, width: int) -> None:
        self.layers = tuple(layers)
        shape = (len(self.layers), heads, width)
        sizes = {"count": shape[:1], "sum": shape, "outer": (*shape, width)}
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def see(self, layer: int, keys: Tensor, mask: Tensor) -> None:
        """Add keys [B, Hkv, T, D] where `mask` [B, T] is true.

        Raises `RequestError`, naming layer and head, for numbers that are not finite.
        """
        row = self.layers.index(layer)
        mask = mask.to(keys.device)
        for head in range(keys.shape[1]):  # one at a time: the float64 copy of all would be the largest tensor here
            rows = keys[:, head][mask].double()
            total = rows.sum(0)
            if not bool(total.isfinite().all()):
                raise RequestError(f"layer {layer}, KV head {head}: keys are not finite; run the model in float32")
            self.sums["sum"][row, head] += total.cpu()
            self.sums["outer"][row, head] += (rows.T @ rows).cpu()
        self.sums["count"][row] += int(mask.sum())

    def only(self, rows: Tensor) -> KeyStatistics:
        """Those of the layers that are true in `rows` [L]."""
        _, heads, width = self.sums["sum"].shape
        kept = KeyStatistics([], heads, width)
        kept.layers = tuple(layer for layer, keep in zip(self.layers, rows.tolist(), strict=True) if keep)
        kept.sums = {name: total[rows] for name, total in self.sums.items()}
        return kept

    def __add__(self, other: KeyStatistics) -> KeyStatistics:
        """The statistics of both texts together."""
        if self.layers != other.layers:
            raise RequestError("statistics of other layers cannot be added")
        _, heads, width = self.sums["sum"].shape
        both = KeyStatistics(self.layers, heads, width)
        both.sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        return both

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [L, Hkv, D] and covariance [L, Hkv, D, D]."""
        count = self.sums["count"][:, None, None]
        mean = self.sums["sum"] / count
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        covariance = (self.sums["outer"] - count.unsqueeze(-1) * outer) / (count.unsqueeze(-1) - 1)
        return mean, covariance

    def fit(self, **about: Any) -> Basis:
        """The basis; `about` goes into its provenance.

        Raises `RequestError` for fewer tokens than a key has dimensions; warns below ten times as many.
        """
        width, tokens = self.sums["sum"].shape[-1], int(self.sums["count"].min())
        if tokens < max(2, width):
            raise RequestError(f"{tokens} tokens are too few for keys of {width} dimensions; calibrate on more text")
        if tokens < 10 * width:
            warnings.warn(
                f"{tokens} tokens are few for keys of {width} dimensions; {10 * width} are enough", stacklevel=3
            )
        mean, covariance = self.covariance()
        components, values = principal_components(covariance)
        basis = Basis(
            components.float().contiguous(),
            values.float(),
            mean.float(),
            self.layers,
            Provenance(tokens=tokens, **about),
        )
        basis.validate("the basis fitted")
        return basis


def calibrate(
    model: Any,
    data: Tensor | Iterable[Any],
    *,
    attention_mask: Tensor | None = None,
    rotary: str = "post",
    batch_size: int = 4,
    name: str = "",
    text: str = "",
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Basis:
    """Fit a basis to the keys that `model` makes of a text.

    Args:
        model: any model whose attention goes through transformers' attention interface. It comes back as it was,
            except that Loki, if it was enabled, is switched off.
        data: token ids [samples, T]; or batches, each token ids [B, T] or a mapping with `input_ids` and, if there is
            padding, `attention_mask`.
        attention_mask: [samples, T] for data in one tensor, 0 on padding.
        rotary: take keys "post" or "pre" rotary embedding. Either basis is used on keys after it.
        name, text: of model and text, for the provenance.
        journal, progress: as in `model_hooks.watch.watch`; data in one tensor alone can be gone on with.

    Raises:
        RequestError: data that the model cannot read, too few tokens, keys that are not finite.
        NotImplementedError: a model on which Loki does not work.
    """
    if rotary not in ("post", "pre"):
        raise RequestError(f"rotary={rotary!r}: keys are taken 'post' or 'pre' rotary embedding")
    statistics = collect(
        model, data, attention_mask=attention_mask, rotary=rotary, batch_size=batch_size, journal=journal,
        progress=progress,
    )  # fmt: skip
    name = name or str(getattr(model.config, "_name_or_path", ""))
    return statistics.fit(model=name, structure=structure(model), rotary=rotary, text=text)


@torch.no_grad()
def collect(
    model: Any,
    data: Tensor | Iterable[Any],
    *,
    attention_mask: Tensor | None = None,
    rotary: str = "post",
    batch_size: int = 4,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> KeyStatistics:
    """The sums that `calibrate` fits the basis to; arguments as there."""
    decoder = check_model(model)
    modules = attention_modules(model, decoder, sliding=True)
    _, heads, width = shape_of(model)
    statistics = KeyStatistics(sorted(modules), heads, width)
    collectors = {index: (modules[index], Collector(index, statistics)) for index in modules}
    state: Journal | None = None
    start, total = 0, None
    if isinstance(data, Tensor):
        real = check_data(model, data, attention_mask)
        share = own_share(len(data))
        _same_shares(model, len(data))
        state = None if journal is None else Journal(journal, model, data, real, statistics)
        start = state.restore(statistics) if state else 0
        rows = [part for part in share[start:].split(batch_size) if len(part)]
        batches: Iterable[Batch] = ((data[part], real[part]) for part in rows)
        total = -(-len(share) // batch_size)
    else:
        batches = _batches(model, data)
    done = -(-start // batch_size)
    with eval_mode(model), _collecting(model, collectors, rotary):
        for ids, mask in batches:
            _run(decoder, ids, mask, [collector for _, collector in collectors.values()])
            start, done = start + len(ids), done + 1
            if state:
                state.keep(statistics, start)
            if progress:
                progress(done, total or done)
    reduce_sums(statistics)
    if state:
        state.remove()
    ran = statistics.sums["count"] > 0
    if not ran.any():
        raise RequestError("no batch held a token; there is nothing to calibrate on")
    return statistics if ran.all() else statistics.only(ran)  # some models have attention modules that never run


def _same_shares(model: Any, samples: int) -> None:
    """Under ZeRO-3 processes gather each layer's weights together, so one with fewer batches would stop the others."""
    from torch import distributed

    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if sharded and samples % processes:
        raise RequestError(
            f"{samples} sequences cannot be shared evenly by {processes} processes, as ZeRO-3 needs; give a multiple"
        )


class Collector:
    """What an attention module carries while keys are collected. `mask` is that of the batch at work."""

    def __init__(self, layer: int, statistics: KeyStatistics) -> None:
        self.layer, self.statistics = layer, statistics
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.unrotated = False  # this call is one without rotary embedding: its keys count, its output does not
        self.collects = True  # in calls as the model makes them

    def __call__(self, module: nn.Module, call: Call) -> Tensor | None:
        if call.key.shape[-1] != self.statistics.sums["sum"].shape[-1]:
            raise NotImplementedError(
                f"layer {self.layer} has keys of width {call.key.shape[-1]}, the config says "
                f"{self.statistics.sums['sum'].shape[-1]}; Loki needs one width for all layers"
            )
        if self.collects or self.unrotated:
            self.statistics.see(self.layer, call.key, self.mask)
        return torch.zeros_like(call.query) if self.unrotated else None


class _collecting:
    """Collectors on the modules of `model`, and for keys before the rotary embedding a hook that makes them."""

    def __init__(self, model: Any, collectors: dict[int, tuple[list[nn.Module], Collector]], rotary: str) -> None:
        self.model, self.decoder = model, decoder_of(model)
        self.collectors, self.rotary = collectors, rotary
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        disable(self.model)
        attach(self.model, self.decoder, self.collectors, self)
        if self.rotary == "pre":
            for modules, collector in self.collectors.values():
                for module in modules:
                    self.hooks.append(module.register_forward_pre_hook(_without_rotary(collector), with_kwargs=True))

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.model.__dict__.pop("_loki_runtime", None)
        detach(self.decoder, self.former)

    former = "sdpa"  # set by attach


def _without_rotary(collector: Collector) -> Any:
    """A hook that calls the module once more with a rotation by zero: the keys that then reach the attention function
    are those before the rotary embedding, whatever the family makes of it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedding = kwargs.get("position_embeddings")
        collector.collects = embedding is None  # no rotary embedding: before and after it are the same
        if embedding is None or collector.unrotated:
            return
        if isinstance(embedding, Tensor):  # complex numbers
            still: Any = torch.ones_like(embedding)
        else:
            still = (torch.ones_like(embedding[0]), torch.zeros_like(embedding[1]))
        collector.unrotated = True
        try:
            module(*args, **{**kwargs, "position_embeddings": still})
        finally:
            collector.unrotated = False

    return hook


def _run(decoder: Any, ids: Tensor, mask: Tensor, collectors: list[Collector]) -> None:
    device = decoder.get_input_embeddings().weight.device
    for collector in collectors:
        collector.mask = mask
    arguments = {"input_ids": ids.to(device)}
    if not bool(mask.all()):
        arguments["attention_mask"] = mask.long().to(device)
        arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0).to(device)
    decoder(**arguments, use_cache=False)


def _batches(model: Any, data: Iterable[Any]) -> Iterator[Batch]:
    for batch in data:
        ids, mask = (batch["input_ids"], batch.get("attention_mask")) if isinstance(batch, Mapping) else (batch, None)
        ids = torch.as_tensor(ids)
        ids = ids[None] if ids.dim() == 1 else ids
        yield ids, check_data(model, ids, None if mask is None else torch.as_tensor(mask).reshape(ids.shape))
