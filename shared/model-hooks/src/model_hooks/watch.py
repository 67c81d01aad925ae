"""Watch a model's residual stream while data runs through it: one pass, memory flat in the number of samples.

A watcher is shown the stream before and after every unit (attention sublayer, feed-forward, block) as the running model
really adds it, and keeps float64 sums. Sums of batches, of processes and of runs add up to the same result.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed, nn

from .errors import FingerprintMismatch, RequestError, UnsupportedArchitectureError
from .files import atomic_write
from .identity import fingerprint
from .structure import Anatomy, Block, Sublayer, anatomy
from .trace import eval_mode, first_tensor, small_input, unpack

Unit = Literal["attention", "mlp", "block"]
Progress = Callable[[int, int], None]
JOURNAL_SECONDS = 10.0  # between two writes of the journal
NOTHING = torch.zeros(0)


class Sums(Protocol):
    """What can be added up over processes and kept in a journal."""

    sums: dict[str, Tensor]


class ResidualWatcher:
    """What `watch` shows the residual stream to. A subclass fills `sums` and says in `see` what it adds to them.

    Attributes:
        sums: float64 tensors on the CPU that start at zero and only ever are added to. They are all that is kept from
            batch to batch: what is reduced over processes and written to the journal.
        whole_batches: it compares units of different blocks, so it must be shown a batch's blocks one after another
            (`watch` does; `model_hooks.layerwise` shows a block all batches before it turns to the next).
        samples: global numbers of the samples in the batch at work, [B].
        mask: its real tokens, [B, T] bool on the CPU; empty between batches.
    """

    sums: dict[str, Tensor]
    whole_batches = False
    samples: Tensor
    mask = NOTHING.bool()

    def begin(self, samples: Tensor) -> None:
        """A batch starts; `samples` [B] are the numbers of its rows in all the data."""
        self.samples = samples

    def see(self, index: int, unit: Unit, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Block `index` has run `unit`, which turned `before` into `after`, both [B, T, H].

        `mask` [B, T], on the CPU, is true on real tokens. Neither tensor may be written to. Units come in the order in
        which they end; sublayers that were dropped do not come.
        """
        raise NotImplementedError

    def end(self) -> None:
        """The batch is done: bring `sums` up to date."""


def watch(
    model: Any,
    sequences: Tensor,
    watcher: ResidualWatcher,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 4,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Run `sequences` through the decoder of `model` (without its head) and fill `watcher.sums`.

    The result depends neither on the batch split nor on the padding side, and where torch.distributed is initialised
    every process runs its share of the samples and ends with the sums of all.

    Args:
        model: any model that `anatomy` reads, dropped sublayers allowed. It comes back as it was.
        sequences: token ids, [samples, T].
        attention_mask: [samples, T], 0 on padding; all tokens count without it.
        journal: file that holds the sums so far. A run that was killed goes on from it, with the result of an
            uninterrupted run; it is removed in the end. Each process has its own.
        progress: called with (batches done, batches) of this process.

    Raises:
        RequestError: no data, or token ids that the model does not have.
        FingerprintMismatch: the journal is of another model, other data or another watcher.
        UnsupportedArchitectureError: the model's parts were not recognised.
    """
    mask = check_data(model, sequences, attention_mask)
    parts = anatomy(model)
    share = own_share(len(sequences))
    state = None if journal is None else Journal(journal, model, sequences, mask, watcher)
    start = state.restore(watcher) if state else 0
    batches = share[start:].split(batch_size) if start < len(share) else ()
    done = -(-start // batch_size)
    with torch.no_grad(), eval_mode(model), Hooks(parts.blocks, parts, watcher) as hooks:
        for number, samples in enumerate(batches, done + 1):
            hooks.run(samples, sequences, mask)
            start += len(samples)
            if state:
                state.keep(watcher, start)
            if progress:
                progress(number, done + len(batches))
    reduce_sums(watcher)
    if state:
        state.remove()


def check_data(model: Any, sequences: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask, [samples, T] bool on the CPU; raises `RequestError` for data that the model cannot read."""
    shape = tuple(sequences.shape)
    if sequences.dim() != 2 or sequences.numel() == 0 or sequences.is_floating_point():
        raise RequestError(f"the data has shape {shape} ({sequences.dtype}); token ids [samples, length] are needed")
    if attention_mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    elif tuple(attention_mask.shape) == shape:
        mask = attention_mask.to("cpu", torch.bool)
    else:
        raise RequestError(f"attention_mask has shape {tuple(attention_mask.shape)}; the data has {shape}")
    if not mask.any():
        raise RequestError("every token of the data is padding; there is nothing to watch")
    weight = model.get_input_embeddings().weight
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 a process holds a part
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise RequestError(f"token id {wrong} is not in the model's vocabulary of {vocabulary}: wrong tokenizer?")
    return mask


def own_share(samples: int) -> Tensor:
    """Numbers of the samples that this process runs: contiguous, all where there is one process."""
    if not _distributed():
        return torch.arange(samples)
    return torch.arange(samples).tensor_split(distributed.get_world_size())[distributed.get_rank()]


def reduce_sums(watcher: Sums) -> None:
    """Add up the sums of all processes, in place."""
    if not _distributed():
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    for total in watcher.sums.values():
        moved = total.to(device)
        distributed.all_reduce(moved)
        total.copy_(moved)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class Hooks:
    """Hooks on `blocks` that show `watcher` the residual stream; a context manager, which removes them."""

    def __init__(self, blocks: tuple[Block, ...], parts: Anatomy, watcher: ResidualWatcher) -> None:
        self.blocks, self.parts, self.watcher = blocks, parts, watcher
        self.mask = torch.zeros(0, 0, dtype=torch.bool)  # of the batch at work
        self.device = small_input(parts.model).device
        self.takes_positions = "position_ids" in inspect.signature(parts.decoder.forward).parameters
        self.stack = ExitStack()

    def __enter__(self) -> Hooks:
        with ExitStack() as stack:
            for block in self.blocks:
                _BlockHooks(block, self).attach(stack, _middle(block, self.parts))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def run(self, samples: Tensor, sequences: Tensor, mask: Tensor) -> None:
        """One forward pass of the decoder over rows `samples`."""
        self.mask = mask[samples]
        arguments = {"input_ids": sequences[samples.to(sequences.device)].to(self.device)}
        if not bool(self.mask.all()):  # without padding attention may take its faster causal path
            arguments["attention_mask"] = self.mask.long().to(self.device)
            if self.takes_positions:  # so that learned positions do not depend on the padding side
                arguments["position_ids"] = (self.mask.long().cumsum(-1) - 1).clamp_min(0).to(self.device)
        self.watcher.mask = self.mask
        self.watcher.begin(samples)
        self.parts.decoder(**arguments, use_cache=False)
        self.watcher.end()
        self.watcher.mask = NOTHING.bool()

    def see(self, index: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        self.watcher.see(index, unit, before.to(after.device), after, self.mask)


def _middle(block: Block, parts: Anatomy) -> str | None:
    """The module in a sequential block whose input is the stream between attention and feed-forward."""
    if block.layout == "parallel":
        return None
    if block.mlp:
        return (*block.mlp.pre, block.mlp.name)[0]
    dropped = (e["name"] for e in parts.edits if e["block"] == block.index and e["kept"]["kind"] == "attention")
    return next(dropped, None)  # the stand-in of a dropped feed-forward is still called


class _BlockHooks:
    """One block. Sequential: the stream is read where the feed-forward half reads it, so nothing is computed twice.
    Parallel: both halves read the block's input, and what each adds is taken where it leaves the half."""

    def __init__(self, block: Block, hooks: Hooks) -> None:
        self.block, self.hooks = block, hooks
        self.x = self.mid = NOTHING
        self.version = 0

    def attach(self, stack: ExitStack, middle: str | None) -> None:
        module = self.block.module
        stack.callback(module.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(self.leave).remove)
        if middle:
            entry = module.get_submodule(middle)
            stack.callback(entry.register_forward_pre_hook(self.between, with_kwargs=True).remove)
        if self.block.layout == "parallel":
            for sublayer in self.block.sublayers:
                after = [module.get_submodule(n) for n in (sublayer.name, *sublayer.post)]
                last = [m for m in after if not isinstance(m, nn.Dropout)][-1]  # which both halves may share
                stack.callback(last.register_forward_hook(self.adds(sublayer)).remove)

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        assert x is not None
        self.x = self.mid = x
        self.version = _version(x)

    def between(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mid = first_tensor(args, kwargs)
        assert mid is not None
        self.mid = mid if mid.shape == self.x.shape else mid.reshape(self.x.shape)
        if self.block.attention:
            self.hooks.see(self.block.index, "attention", self.x, self.mid)

    def adds(self, sublayer: Sublayer) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            added, _ = unpack(output)
            assert added is not None
            after = self.x.to(added.device) + sublayer.scale * added.reshape(self.x.shape)
            self.hooks.see(self.block.index, sublayer.kind, self.x, after)

        return hook

    def leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        y, _ = unpack(output)
        assert y is not None
        if _version(self.x) != self.version:
            raise UnsupportedArchitectureError(f"{self.block.name} overwrites its input; its change cannot be watched")
        if self.block.mlp and self.block.layout != "parallel":
            self.hooks.see(self.block.index, "mlp", self.mid, y)
        self.hooks.see(self.block.index, "block", self.x, y)
        self.x = self.mid = NOTHING  # only the batch at work is held


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Journal:
    """The sums so far and the number of samples in them, in one safetensors file that is replaced as a whole."""

    def __init__(self, path: Path, model: Any, sequences: Tensor, mask: Tensor, watcher: Sums) -> None:
        self.path = Path(path)
        rank = "only"
        if _distributed() and distributed.get_world_size() > 1:
            rank = f"{distributed.get_rank()}-of-{distributed.get_world_size()}"
            self.path = self.path.with_name(f"{self.path.name}.{rank}")
        shapes = {name: tuple(total.shape) for name, total in watcher.sums.items()}
        data = hashlib.blake2b(str(tuple(sequences.shape)).encode(), digest_size=8)
        for part in (sequences.to("cpu", torch.int64), mask):
            data.update(part.contiguous().numpy().tobytes())
        how = f"{type(watcher).__name__} {shapes} {rank} {getattr(model, 'dtype', None)}"
        settings = hashlib.blake2b(how.encode(), digest_size=8)
        self.identity = {"model": fingerprint(model), "data": data.hexdigest(), "settings": settings.hexdigest()}
        self.written = time.monotonic()

    def restore(self, watcher: Sums) -> int:
        """Fill `watcher.sums` from the file, if there is one; the number of samples that are in them."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            raise RequestError(f"{self.path} is not a journal of this program; name another file") from None
        for what, mine in self.identity.items():
            if about.get(what) != mine:
                raise FingerprintMismatch(
                    f"the journal {self.path} is of other {what} ({about.get(what)}, now {mine}); remove it first"
                )
        for name, total in watcher.sums.items():
            total.copy_(sums[name])
        return int(about["samples"])

    def keep(self, watcher: Sums, samples: int) -> None:
        """Write the file, if the last time was long enough ago."""
        from safetensors.torch import save

        if time.monotonic() - self.written < JOURNAL_SECONDS:
            return
        atomic_write(self.path, save(watcher.sums, self.identity | {"samples": str(samples)}))
        self.written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
