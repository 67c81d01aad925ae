"""What one pass over the data says of every expert, MoE sublayer and block.

Everything is a float64 sum or count that starts at zero, so that batches, processes and stopped runs add up; padding
is not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_hooks.experts import ExpertCall, MoeLayer, routed_output
from model_hooks.similarity import ResidualSimilarity, real_tokens
from model_hooks.watch import Unit

EXPERT_SUMS = ("count", "gate", "weighted_norm", "norm", "cosine")


class TrimStats(ResidualSimilarity):
    """Similarities of sublayers and blocks, and for every expert, over L blocks of at most E experts, `sums` of

        experts.count          pairs (token, expert) that were routed
        experts.gate           routing score: the full softmax over all experts before top-k, chosen or not; of DeepSeek
                               routers the weights of the chosen ones (the paper's S_i, section 3)
        experts.weighted_norm  gate * |E(x)|              (REAP, arXiv 2510.13999, before the mean)
        experts.norm           |E(x)|
        experts.cosine         cos(y, y - gate * E(x))    y: output of all routed experts

    each [L, E]. `sample` keeps the first `sample_tokens` inputs of each mixture, [N, d].
    """

    def __init__(
        self, num_layers: int, hidden_size: int, num_experts: int, *, gaps: bool = True, sample_tokens: int = 0
    ) -> None:
        super().__init__(num_layers, hidden_size, groups=1, gaps=gaps, deltas=False)
        for name in EXPERT_SUMS:
            self.sums[f"experts.{name}"] = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.sample_tokens = sample_tokens
        self.sample: dict[int, Tensor] = {}  # block -> [N, d]

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        """Add what the experts of one layer did in one batch."""
        norm = torch.linalg.vector_norm(call.y.float(), dim=-1)  # [S]
        whole = call.output.float().index_select(0, call.tokens)  # [S, d]
        without = whole - call.gates.float()[:, None] * call.y.float()
        found = {
            "count": torch.tensor(call.counts, dtype=torch.float64),
            "gate": gate_scores(layer, call),
            "weighted_norm": call.sums(call.gates.float() * norm),
            "norm": call.sums(norm),
            "cosine": call.sums(torch.nn.functional.cosine_similarity(whole, without, dim=-1)),
        }
        for name, value in found.items():
            self.sums[f"experts.{name}"][layer.block, : len(value)] += value.cpu()
        kept = self.sample.get(layer.block, call.hidden_states[:0])
        if len(kept) < self.sample_tokens:
            more = call.hidden_states[: self.sample_tokens - len(kept)]
            self.sample[layer.block] = torch.cat([kept, more.clone()])


class StreamStats(TrimStats):
    """`TrimStats` that also sums, in `stream` [L], the squared size of the residual stream before each mixture."""

    def __init__(self, num_layers: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_layers, *args, **kwargs)
        self.sums["stream"] = torch.zeros(num_layers, dtype=torch.float64)

    def see(self, index: int, unit: Unit, before: Tensor, after: Tensor, mask: Tensor) -> None:
        super().see(index, unit, before, after, mask)
        if unit == "mlp":
            self.sums["stream"][index] += real_tokens(before, mask).double().square().sum().cpu()


def gate_scores(layer: MoeLayer, call: ExpertCall) -> Tensor:
    """Sum over tokens of each expert's routing score, [E] float64: see `TrimStats`."""
    if hasattr(layer.router, "routed_scaling_factor"):  # DeepSeek's
        return call.sums(call.gates)
    return call.logits.double().softmax(-1).sum(0)


@torch.no_grad()
def reconstruction_errors(layer: MoeLayer, hidden_states: Tensor) -> list[float]:
    """Relative squared error of the routed output on `hidden_states` [N, d] when one expert is gone and its tokens
    choose among the others, for each expert (the leave-one-out form of NAEE, arXiv 2402.14800)."""
    whole = routed_output(layer, hidden_states).double()
    size = whole.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    everyone = range(layer.num_experts)
    others = ([e for e in everyone if e != gone] for gone in everyone)
    return [
        float((routed_output(layer, hidden_states, keep).double() - whole).square().sum() / size) for keep in others
    ]
