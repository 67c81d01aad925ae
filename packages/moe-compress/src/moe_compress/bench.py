"""What trimming buys on this machine, with the same kernels on both sides, and what measuring costs.

All times are ratios of medians taken in one process, in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks import anatomy
from model_hooks.experts import ExpertCall, MoeLayer, moe_layers, watching_experts
from model_hooks.watch import ResidualWatcher, watch
from moe_compress.selection import Plan
from moe_compress.trimming import apply
from paper_tables.probe import speed, token_ids
from paper_tables.timing import interleaved

BATCH = 4  # sequences


def probe_mixtral(layers: int = 8, hidden_size: int = 256, experts: int = 8) -> Any:
    """A Mixtral with random weights in float32: speed does not depend on what the weights are."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=2048, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 64, max_position_embeddings=2048,
        num_local_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def usual_plans(model: Any) -> dict[str, Plan]:
    """A quarter of the experts, of the MoE sublayers and of the blocks gone."""
    parts = anatomy(model)
    layers = moe_layers(parts)
    some = tuple(parts.original_index[layer.block] for layer in layers[: max(1, len(layers) // 4)])
    kept = {parts.original_index[layer.block]: tuple(range(_three_quarters(layer))) for layer in layers}
    names = {f"{len(next(iter(kept.values())))} of {layers[0].num_experts} experts": Plan(keep=kept)}
    return names | {
        f"{len(some)} MoE layers dropped": Plan(layers=some),
        f"{len(some)} blocks dropped": Plan(blocks=some),
    }


def _three_quarters(layer: Any) -> int:
    return max(layer.top_k, layer.num_experts * 3 // 4 // layer.num_groups * layer.num_groups)


def bench_speed(
    parent: Any, plans: Mapping[str, Plan], *, context: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each plan: shares of parameters and of mixture bytes, and speed in both phases."""
    from paper_tables.metrics import parameters

    variants = {name: apply(copy.deepcopy(parent), plan) for name, plan in plans.items()}
    measured = speed(parent, variants, context=context, new_tokens=new_tokens, rounds=rounds)
    return [
        {"model": name, "parameters": parameters(model) / parameters(parent),
         **{phase: timing.speedup for phase, timing in measured[name].items()}}
        for name, model in variants.items()
    ]  # fmt: skip


def bench_stats(model: Any, *, samples: int = 8, length: int = 128, rounds: int = 5) -> list[dict[str, Any]]:
    """Time of the scoring pass beside plain forwards; at 64 experts, by the tokens of a batch, that of hooks on experts
    that are Linears beside a pass that sums what they sum, and beside the scoring pass, which compares layers, blocks
    and experts as well. The more tokens an expert has, the more of both is the same arithmetic."""
    own, many = passes(model, samples, length), probe_mixtral(2, 64, 64)
    timed = interleaved({name: own[name] for name in ("eager", "score")}, rounds=rounds, warmup=1, base="eager")
    rows = [{"pass": "scoring / eager forwards", "ratio": 1 / timed["score"].speedup, "target": "at most 2"}]
    for short in (length // 8, length // 4, length):
        more = samples * 8 * length // short  # so much that reading the anatomy once weighs little
        small = {"hooks": hooks(many, more, short), **passes(many, more, short)}
        hooked = interleaved({name: small[name] for name in ("hooks", "sums", "score")}, rounds=rounds, warmup=1)
        for name, what in (("sums", "the same sums"), ("score", "scoring")):
            pair = f"hooks on every Linear / {what}, 64 experts, batches of {BATCH * short} tokens"
            rows.append({"pass": pair, "ratio": hooked[name].speedup, "target": "at least 3"})
    return rows


def passes(model: Any, samples: int, length: int) -> dict[str, Callable[[], None]]:
    """The same data through the experts function as it is, and through the watched one."""
    from moe_compress.stats import TrimStats

    ids, parts = token_ids(model, samples, length), anatomy(model)
    layers = moe_layers(parts)
    model.set_experts_implementation("eager")
    experts, hidden = max(layer.num_experts for layer in layers), model.config.get_text_config().hidden_size

    def watched(watcher: Any) -> None:
        with watching_experts(model, layers, watcher):
            watch(model, ids, watcher, batch_size=BATCH)

    return {
        "eager": lambda: forwards(parts.decoder, ids),
        "score": lambda: watched(TrimStats(len(parts.blocks), hidden, experts)),
        "sums": lambda: watched(LinearSums()),
    }


class LinearSums(ResidualWatcher):
    """What the hooks of `LinearExperts` sum, without any: squares of inputs and sizes of outputs of all experts."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def see(self, *_: Any) -> None:
        pass

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        sizes = torch.linalg.vector_norm(call.y.float(), dim=-1)
        for name, values in (("x", call.x.float().square()), ("h", call.h.float().square()), ("y", sizes)):
            key = f"{layer.block}.{name}"
            found = call.sums(values)
            self.sums[key] = self.sums[key] + found if key in self.sums else found


def hooks(model: Any, samples: int, length: int) -> Callable[[], None]:
    """The same data through experts made Linears with a hook on each, as code from before fused experts does it."""
    ids, split = token_ids(model, samples, length), copy.deepcopy(model)
    parts = anatomy(split)
    for layer in moe_layers(parts):
        name = next(name for name, child in layer.module.named_children() if child is layer.bank)
        setattr(layer.module, name, LinearExperts(layer.bank))
    return lambda: forwards(parts.decoder, ids)


@torch.no_grad()
def forwards(decoder: Any, ids: Tensor) -> None:
    """What `watch` runs as well: no head, so that no side pays for logits that the other never makes."""
    for part in ids.split(BATCH):
        decoder(input_ids=part, use_cache=False)


class LinearExperts(nn.Module):
    """Fused experts as three Linears each, whose hooks sum squares of inputs and sizes of the expert's outputs."""

    def __init__(self, bank: Any) -> None:
        super().__init__()
        half, self.act = bank.down_proj.shape[-1], bank.act_fn
        weights = [(up[:half], up[half:], down) for up, down in zip(bank.gate_up_proj, bank.down_proj)]
        self.experts = nn.ModuleList(nn.ModuleList(map(_linear, three)) for three in weights)
        self.sums: dict[nn.Module, list[Tensor]] = {}
        self.last: set[nn.Module] = set()  # down_proj of each
        for three in self.experts:
            for module in three.children():
                module.register_forward_hook(self._seen)
            self.last.add(module)

    def _seen(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found = [inputs[0].float().square().sum(0).double()]
        if module in self.last:
            found.append(torch.linalg.vector_norm(output.float(), dim=-1).double().sum())
        before = self.sums.get(module)
        self.sums[module] = found if before is None else [a + b for a, b in zip(before, found)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, d], [T, k], [T, k] -> [T, d]."""
        out = torch.zeros_like(hidden_states)
        for number, three in enumerate(self.experts):
            gate, up, down = three.children()
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                x = hidden_states[tokens]
                out.index_add_(0, tokens, down(self.act(gate(x)) * up(x)) * top_k_weights[tokens, places, None])
        return out


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return made


def run(model: Any, *, context: int = 256, new_tokens: int = 16, rounds: int = 7) -> dict[str, Any]:
    """All of it."""
    from paper_tables.machine import describe, machine

    plans = usual_plans(model)
    rows = bench_speed(model, plans, context=context, new_tokens=new_tokens, rounds=rounds)
    found = {"machine": describe(machine()), "context": context, "new_tokens": new_tokens}
    return {**found, "scoring": bench_stats(model, rounds=max(3, rounds // 2)), "speed": rows}
