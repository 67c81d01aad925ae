"""Walk through the layers of a checkpoint, one resident at a time, with the hidden states of all samples.

The decoder's own forward runs for every layer, with all other layers passing on what they get: so masks, positions and
rotary embeddings are exactly those that it computes. Between two layers the states of all samples, [samples, T, H], are
in RAM, or in two memory-mapped files (`room`), of which a killed walk finds the one that its last layer left whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomic_write
from .layer_stream import LayerStream
from .lean import _pack
from .structure import Anatomy, Block
from .trace import eval_mode, first_tensor, unpack
from .watch import Hooks, ResidualWatcher, check_data, own_share

PROGRESS = "walk.json"  # in `room`: how many layers are done


class _Blind(ResidualWatcher):
    """Sees nothing: for a pass whose outputs alone are wanted."""

    def __init__(self) -> None:
        self.sums = {}

    def see(self, index: int, unit: Any, before: Tensor, after: Tensor, mask: Tensor) -> None:
        pass


class LayerWalk:
    """A walk through `stream`'s layers.

    for block in walk.layers():        # its weights are resident
        walk.show(watcher)             # all samples run through it, as often as wanted
        ...                            # it may be changed in place; what goes on to the next layer is what it gives now

    Args:
        sequences, attention_mask: token ids and mask, [samples, T].
        room: folder for the states; a walk that finds one of its own there goes on where that was stopped.
    """

    def __init__(
        self, stream: LayerStream, sequences: Tensor, *, attention_mask: Tensor | None = None, batch_size: int = 4,
        room: Path | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.sequences, self.batch_size, self.room = stream, sequences, batch_size, room
        self.mask = check_data(stream.model, sequences, attention_mask)
        self.parts: Anatomy = stream.anatomy()
        self.share = own_share(len(sequences))
        self._states: Tensor | None = None  # [samples, T, H] into the layer at work; none before the first
        self._next: Tensor | None = None
        self._rows = torch.zeros(0, dtype=torch.long)  # of the batch at work, in this process's share
        self._carry = self._carried = False
        self._block = self.parts.blocks[0]

    @property
    def done(self) -> int:
        """Layers that an earlier walk in `room` finished."""
        file = self.room / PROGRESS if self.room else None
        return int(json.loads(file.read_text())["done"]) if file is not None and file.is_file() else 0

    def layers(self) -> Iterator[Block]:
        """The blocks that are left, one after another."""
        start = self.done
        if start:
            self._states = self._place(start)
        with torch.no_grad(), eval_mode(self.stream.model):
            for block in self.parts.blocks[start:]:
                with self.stream.resident(block.name), self._only(block):
                    self._block, self._carried = block, False
                    yield block
                    if not self._carried:
                        self.show(_Blind(), carry=True)
                self._states, self._next = self._next, None
                if self.room:
                    atomic_write(self.room / PROGRESS, json.dumps({"done": block.index + 1}))

    def show(self, watcher: ResidualWatcher, *, carry: bool = False) -> None:
        """Run all samples through the layer at work. `carry`: its outputs are what goes on, whatever it becomes."""
        assert self.room or not self._carried, "in RAM the outputs have taken the place of the inputs"
        self._carry, self._carried = carry, carry or self._carried
        with Hooks((self._block,), self.parts, watcher) as hooks:
            for rows in torch.arange(len(self.share)).split(self.batch_size) if len(self.share) else ():
                self._rows = rows
                hooks.run(self.share[rows], self.sequences, self.mask)

    @contextmanager
    def _only(self, block: Block) -> Iterator[None]:
        with ExitStack() as undo:
            for other in self.parts.blocks:
                if other is not block:
                    other.module.forward = _pass_on(other.returns)
                    undo.callback(other.module.__dict__.pop, "forward")
            if block.index:
                give = block.module.register_forward_pre_hook(self._give, with_kwargs=True, prepend=True)
                undo.callback(give.remove)
            undo.callback(block.module.register_forward_hook(self._take).remove)
            yield

    def _give(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._states is not None
        passed = first_tensor(args, kwargs)
        assert passed is not None
        carried = self._states[self._rows].to(passed.device)
        return tuple(carried if a is passed else a for a in args), {
            k: carried if v is passed else v for k, v in kwargs.items()
        }

    def _take(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self._carry:
            return
        y, _ = unpack(output)
        assert y is not None
        if self._next is None:  # in RAM a batch's outputs take the place of its inputs
            self._next = self._place(self._block.index + 1, y) if self.room or self._states is None else self._states
        self._next[self._rows] = y.to(self._next.device)

    def _place(self, index: int, like: Tensor | None = None) -> Tensor:
        """Where the inputs of block `index` are kept. Their width and dtype are those of the embeddings' output."""
        weight = self.stream.model.get_input_embeddings().weight
        width, dtype = (weight.shape[-1], weight.dtype) if like is None else (like.shape[-1], like.dtype)
        shape = (len(self.share), self.sequences.shape[1], width)
        if self.room is None:
            return torch.empty(shape, dtype=dtype)
        self.room.mkdir(parents=True, exist_ok=True)
        name = str(self.room / f"{index % 2}.states")
        return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def _pass_on(returns: int) -> Callable[..., Any]:
    """A forward that gives back the hidden states that it gets."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = first_tensor(args, kwargs)
        assert hidden_states is not None
        return _pack(hidden_states, returns)

    return forward
