"""The paper's measurement, in one streaming pass: how little does each unit turn the residual stream?

    sim(u) = mean over tokens of cos(x_t, y_t)        x, y: residual stream before and after unit u, [T, H]

for every attention sublayer, every MLP and every block at once, and for every run of blocks

    C[i, g] = mean over tokens of cos(h_i, h_{i+g})   h_i: input of block i, h_L: output of the last block

Cosines are taken in float32; what is kept are float64 sums and counts, so the memory does not grow with the data and
partial results of batches, processes or runs add up.
"""

from __future__ import annotations

import torch
from model_hooks.watch import ResidualWatcher
from torch import Tensor

EPS = 1e-8
CHUNK = 64  # tokens whose gap cosines are summed in float32 before the float64 sum


def cosine(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: cosine of `before` and `after`, the relative change |after - before| / |before|, and the change.

    Args:
        before, after: [..., H], any floating type; computed in float32.

    Returns:
        cosine [...], ratio [...], delta [..., H].
    """
    x, y = before.float(), after.float()
    delta = y - x
    size = torch.linalg.vector_norm(x, dim=-1)
    cos = torch.linalg.vecdot(x, y) / (size * torch.linalg.vector_norm(y, dim=-1)).clamp_min(EPS)
    return cos, torch.linalg.vector_norm(delta, dim=-1) / size.clamp_min(EPS), delta


class ResidualSimilarity(ResidualWatcher):
    """Similarity of every unit and every run of blocks; also the mean change of every sublayer.

    Sums, all float64 (`L` blocks, `G` groups of samples for the bootstrap, `H` hidden size):

        tokens              [G]       tokens seen
        attention, mlp, block  [G, L]  sum of cosines
        *.ratio             [L]       sum of |delta| / |x|
        *.delta             [L, H]    sum of delta (sublayers only)
        gaps                [L+1, L+1]  sum of cos(h_i, h_j), for j > i

    Args:
        num_layers: blocks in the model that is watched.
        hidden_size: width of its residual stream.
        groups: sample k belongs to group k mod `groups`; the memory stays the same for any number of samples.
        gaps: keep the inputs of all blocks of the batch at work, in the model's own precision, for `C`.
        deltas: sum the changes, for `llm_drop.repair`.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, *, groups: int = 16, gaps: bool = True, deltas: bool = True
    ) -> None:
        self.num_layers, self.groups, self.with_gaps, self.with_deltas = num_layers, groups, gaps, deltas
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
        self.sums: dict[str, Tensor] = {"tokens": zeros(groups), "samples": zeros(1)}
        for unit in ("attention", "mlp", "block"):
            self.sums[unit] = zeros(groups, num_layers)
            self.sums[f"{unit}.ratio"] = zeros(num_layers)
        if deltas:
            self.sums["attention.delta"] = zeros(num_layers, hidden_size)
            self.sums["mlp.delta"] = zeros(num_layers, hidden_size)
        if gaps:
            self.sums["gaps"] = zeros(num_layers + 1, num_layers + 1)
        self._states: list[Tensor] = []  # h_0 .. h_i of the batch at work, [B, T, H] each

    def see(self, index: int, unit: str, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add one unit's residual stream, [B, T, H] before and after it; `mask` [B, T] is true on real tokens."""
        mask = mask.to(before.device)
        cos, ratio, delta = cosine(before, after)
        weight = mask.double()
        rows = torch.where(mask, cos.double(), 0.0).sum(-1)  # [B]; where() keeps what padding holds out of the sums
        self.sums[unit][:, index] += self._by_group(rows)
        self.sums[f"{unit}.ratio"][index] += torch.where(mask, ratio.double(), 0.0).sum().cpu()
        if f"{unit}.delta" in self.sums:
            flat = torch.where(mask[..., None], delta, 0.0).flatten(0, 1)  # [B*T, H]
            self.sums[f"{unit}.delta"][index] += flat.sum(0, dtype=torch.float64).cpu()
        if unit == "block":
            self._see_block(index, before, after, weight, mask)

    def _by_group(self, rows: Tensor) -> Tensor:
        """Sums of the batch's samples, [B], gathered by group, [G]."""
        group = (torch.arange(len(rows)) + int(self.sums["samples"])) % self.groups
        return torch.zeros(self.groups, dtype=torch.float64).index_add_(0, group, rows.cpu())

    def _see_block(self, index: int, before: Tensor, after: Tensor, weight: Tensor, mask: Tensor) -> None:
        last = index == self.num_layers - 1
        if self.with_gaps:
            self._states.append(before)
            if last:
                self.sums["gaps"] += gap_cosines([*self._states, after], mask)
                self._states.clear()
        if last:
            self.sums["tokens"] += self._by_group(weight.sum(-1))
            self.sums["samples"] += len(before)


def gap_cosines(states: list[Tensor], mask: Tensor) -> Tensor:
    """Sum over real tokens of cos(h_i, h_j), [L+1, L+1] float64, from the states h_i, [B, T, H] each.

    With every state normalised, the sum over tokens of all pairs of cosines is one matrix product over (token, H).
    """
    device = states[-1].device
    flat = [s.flatten(0, 1) for s in states]  # [N, H]
    keep = mask.flatten().to(device)
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for start in range(0, len(keep), CHUNK):
        part = slice(start, start + CHUNK)
        unit = torch.stack([_normalised(s[part].to(device), keep[part]) for s in flat]).flatten(1)  # [L+1, n*H]
        total += (unit @ unit.T).double().cpu()
    return total


def _normalised(x: Tensor, keep: Tensor) -> Tensor:
    x = x.float()
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)
    return torch.where(keep[:, None], x, 0.0)
