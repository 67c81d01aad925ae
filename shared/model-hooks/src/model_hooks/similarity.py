"""The measurement of layer-dropping papers, in one streaming pass: how little does each unit turn the residual stream?

    sim(u) = mean over tokens of cos(x_t, y_t)        x, y: residual stream before and after unit u, [T, H]

for every attention sublayer, every MLP and every block at once, and for every run of blocks

    C[i, g] = mean over tokens of cos(h_i, h_{i+g})   h_i: input of block i, h_L: output of the last block

Cosines are taken in float32, those of runs by `lean_kernels`; what is kept are float64 sums and counts, so the memory
does not grow with the data and partial results of batches, processes or runs add up.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lean_kernels import CosineAccumulator

from .watch import ResidualWatcher, Unit

EPS = 1e-8
ROOM = {"cpu": 1 << 21, "cuda": 1 << 26}  # values of all states laid side by side at a time


class ResidualSimilarity(ResidualWatcher):
    """Similarity of every unit and every run of blocks; also the mean change of every sublayer.

    `sums` holds, for G groups of samples and L blocks of width H:

        tokens              [G]
        attention, mlp, block  [G, L]  sum of cosines
        *.ratio             [L]       sum of |delta| / |x|
        *.delta             [L, H]    sum of delta (sublayers only)
        gaps                [L+1, L+1]  sum of cos(h_i, h_j), for j > i

    Args:
        num_layers: blocks in the model that is watched.
        hidden_size: width of its residual stream.
        groups: sample k of the data belongs to group k mod `groups`; the memory is the same for any number of samples.
        gaps: keep the inputs of all blocks of the batch at work, in the model's own precision, for `C`.
        deltas: sum the changes, for what takes the place of a dropped sublayer.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, *, groups: int = 16, gaps: bool = True, deltas: bool = True
    ) -> None:
        self.num_layers, self.groups = num_layers, groups
        self.whole_batches = gaps

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.sums: dict[str, Tensor] = {"tokens": zeros(groups)}
        for unit in ("attention", "mlp", "block"):
            self.sums[unit] = zeros(groups, num_layers)
            self.sums[f"{unit}.ratio"] = zeros(num_layers)
        if deltas:
            self.sums["attention.delta"] = zeros(num_layers, hidden_size)
            self.sums["mlp.delta"] = zeros(num_layers, hidden_size)
        if gaps:
            self.sums["gaps"] = zeros(num_layers + 1, num_layers + 1)
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=3)  # stream, its real tokens, their sizes
        self._states: list[Tensor] = []  # h_0 .. h_i, [N, H]
        self._pending: list[tuple[Tensor, Tensor]] = []  # (a part of `sums`, what to add): moved once a batch
        self._scratch = torch.zeros(0)

    def see(self, index: int, unit: Unit, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add what one unit does to the residual stream, [B, T, H]; `mask` [B, T] is true on real tokens."""
        x, x_size = self._real_tokens(before, mask)
        y, y_size = self._real_tokens(after, mask)
        delta = torch.sub(y, x, out=self._room(y))
        cos = torch.linalg.vecdot(x, y) / (x_size * y_size).clamp_min(EPS)  # [N]
        ratio = torch.linalg.vector_norm(delta, dim=-1) / x_size.clamp_min(EPS)
        self._add(self.sums[unit][:, index], self._by_group(cos, mask))
        self._add(self.sums[f"{unit}.ratio"][index], ratio.sum(dtype=torch.float64))
        if f"{unit}.delta" in self.sums:
            self._add(self.sums[f"{unit}.delta"][index], delta.sum(0))
        if unit == "block":
            self._see_block(index, before, after, mask, self._by_group(torch.ones_like(cos), mask))

    def end(self) -> None:
        """Move what the batch added to the sums: a device is waited for once a batch, not once a unit."""
        for total, value in self._pending:
            total += value.cpu()
        for batch in (self._pending, self._recent, self._states):
            batch.clear()

    def _see_block(self, index: int, before: Tensor, after: Tensor, mask: Tensor, tokens: Tensor) -> None:
        if self.whole_batches:
            self._states.append(real_tokens(before, mask))
        if index < self.num_layers - 1:
            return
        self._add(self.sums["tokens"], tokens)
        if self.whole_batches:
            self._states.append(real_tokens(after, mask))
            self._add(self.sums["gaps"], gap_cosines(self._states))

    def _add(self, total: Tensor, value: Tensor) -> None:
        self._pending.append((total, value))

    def _by_group(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sums of the values of tokens, [N], by the group of their sample, [G]."""
        group = (self.samples % self.groups).repeat_interleave(mask.sum(-1)).to(values.device)
        return torch.zeros(self.groups, dtype=torch.float64, device=values.device).index_add_(0, group, values.double())

    def _real_tokens(self, stream: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Real tokens [N, H] and their sizes |x| [N], in float32; kept, as one unit's output is the next's input."""
        for seen, tokens, size in self._recent:
            if seen is stream:
                return tokens, size
        tokens = real_tokens(stream, mask).float()
        size = torch.linalg.vector_norm(tokens, dim=-1)
        self._recent.append((stream, tokens, size))
        return tokens, size

    def _room(self, like: Tensor) -> Tensor:
        """Memory for one tensor of this shape, used again and again: fresh pages cost more than the arithmetic."""
        if self._scratch.device != like.device or len(self._scratch) < like.numel():
            self._scratch = torch.empty(like.numel(), device=like.device)
        return self._scratch[: like.numel()].view_as(like)


def real_tokens(stream: Tensor, mask: Tensor) -> Tensor:
    """[B, T, H] -> [N, H]: the tokens that are not padding, in the stream's own precision."""
    return stream.flatten(0, 1) if bool(mask.all()) else stream[mask.to(stream.device)]


def gap_cosines(states: list[Tensor]) -> Tensor:
    """Sum over tokens of cos(h_i, h_j), [L+1, L+1] float64, from the states h_i [N, H], on the last one's device."""
    last = states[-1]
    if not len(last):
        return torch.zeros(len(states), len(states), dtype=torch.float64)
    step = max(1, ROOM.get(last.device.type, ROOM["cuda"]) // (len(states) * last.shape[-1]))
    room = last.new_empty(len(states), min(step, len(last)), last.shape[-1])
    sums = CosineAccumulator("gram")
    for start in range(0, len(last), step):
        parts = [tokens[start : start + step].to(last.device) for tokens in states]
        sums.update(torch.stack(parts, out=room[:, : len(parts[0])]))
    return sums.result().sum
