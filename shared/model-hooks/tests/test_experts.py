"""Experts are found, watched and dropped alike in six families, and what is saved is what was computed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_hooks import Card, RequestError, UnsupportedArchitectureError, anatomy, drop, experts, load, save
from model_hooks.expert_surgery import check_keep, drop_experts
from model_hooks.experts import ExpertCall, MoeLayer, layer_of, moe_layers, watching_experts
from model_hooks.layerwise import watch_layerwise
from model_hooks.watch import ResidualWatcher, watch

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
EXPERTS = {"mixtral": "num_local_experts", "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}


def build(name: str, experts: int = 6, **changes: Any) -> Any:
    return families.build(name, **{EXPERTS.get(name, "num_experts"): experts, **changes})


def layers_of(model: Any) -> dict[int, MoeLayer]:
    return {layer.block: layer for layer in moe_layers(anatomy(model))}


class Sums(ResidualWatcher):
    """Of every expert: pairs, sums of squares of inputs and of hidden states, products of inputs, gates."""

    def __init__(self, blocks: int, experts: int, width: int, inner: int) -> None:
        zeros = lambda *shape: torch.zeros(blocks, experts, *shape, dtype=torch.float64)  # noqa: E731
        self.sums = {"counts": zeros(), "x2": zeros(width), "h2": zeros(inner), "gates": zeros()}
        self.sums["xx"] = zeros(width, width)

    def see(self, *args: Any) -> None:
        pass

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        self.sums["counts"][layer.block] += torch.tensor(call.counts)
        self.sums["x2"][layer.block] += call.sums(call.x.double() ** 2)
        self.sums["h2"][layer.block] += call.sums(call.h.double() ** 2)
        self.sums["gates"][layer.block] += call.sums(call.gates)
        for expert in range(len(call.counts)):
            x = call.x[call.part(expert)].double()
            self.sums["xx"][layer.block, expert] += x.T @ x


def sums_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, batch_size: int = 4) -> dict[str, Any]:
    layers = moe_layers(anatomy(model))
    bank = layers[0].bank.down_proj
    watcher = Sums(len(anatomy(model).blocks), bank.shape[0], bank.shape[1], bank.shape[2])
    with watching_experts(model, layers, watcher):
        watch(model, ids, watcher, attention_mask=mask, batch_size=batch_size)
    return watcher.sums


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_are_found_and_watching_changes_no_logit(name: str) -> None:
    model = build(name)
    layers = layers_of(model)
    assert set(layers) == ({1, 2, 3} if name.startswith("deepseek") else {0, 1, 2, 3})
    assert {layer.num_experts for layer in layers.values()} == {6}
    assert {layer.top_k for layer in layers.values()} == {2}
    assert bool(layers[1].shared) == (name in ("qwen2_moe", "deepseek_v2", "deepseek_v3"))
    ids = families.ids(2, 9)
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    watcher = Sums(4, 6, 32, layers[1].bank.down_proj.shape[-1])
    watcher.mask = torch.ones(2, 9, dtype=torch.bool)
    with watching_experts(model, tuple(layers.values()), watcher):
        watched = model(ids).logits
    torch.testing.assert_close(watched, eager, atol=1e-5, rtol=1e-5)
    assert int(watcher.sums["counts"].sum()) == len(layers) * 2 * 9 * 2
    assert torch.equal(model(ids).logits, eager)  # nothing of it stays


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_sums_are_those_of_single_linears(name: str) -> None:
    """The reference runs every expert of block 2 by hand on the tokens that its router sends it."""
    model = build(name)
    layer = layers_of(model)[2]
    ids = families.ids(3, 8)
    kept: dict[str, Any] = {}
    hooks = [
        layer.bank.register_forward_pre_hook(lambda m, args: kept.update(args=args)),
        model.register_forward_hook(lambda m, args, out: kept.update(done=True)),
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    states, index, _ = kept["args"]
    found = sums_of(model, ids, batch_size=2)
    for expert in range(6):
        x = states[(index == expert).any(-1)].double()
        gate, up = (x @ layer.bank.gate_up_proj[expert].double().T).chunk(2, -1)
        h = F.silu(gate) * up
        assert found["counts"][2, expert] == len(x)
        torch.testing.assert_close(found["xx"][2, expert], x.T @ x, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found["h2"][2, expert], (h**2).sum(0), atol=1e-4, rtol=1e-4)


class Last(ResidualWatcher):
    """Keeps the last call."""

    call: ExpertCall

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        self.call = call


@torch.no_grad()
def last_call(layer: MoeLayer, states: torch.Tensor, index: torch.Tensor, mask: torch.Tensor) -> ExpertCall:
    """The experts of a layer on `states` [T, d], sent where `index` [T, k] says with gates 1/2, 1/4, ..."""
    watcher = Last()
    watcher.mask = mask
    with watching_experts(layer.module, (layer,), watcher):
        layer.router(states)
        layer.bank(states, index, 0.5 ** torch.arange(1, index.shape[1] + 1).expand(index.shape))
    return watcher.call


@functools.cache
def lively_layer(dtype: torch.dtype, width: int = 64) -> MoeLayer:
    """A Mixtral's mixture of 8 experts whose weights keep numbers near 1."""
    model = build("mixtral", 8, intermediate_size=width)
    model.set_experts_implementation("eager")  # transformers' own choice takes no width of 42 and no float64
    layer = layers_of(model)[0]
    for weight in layer.module.to(dtype).experts.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(0))
    return layer


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), grouped=st.booleans(), seed=st.integers(0, 999),
    tokens=st.integers(1, 30), k=st.integers(1, 3), used=st.integers(3, 8), skew=st.sampled_from([0, 4]),
    padding=st.booleans(),
)  # fmt: skip
def test_groups_and_the_loop_give_what_float64_gives(
    dtype: torch.dtype, grouped: bool, seed: int, tokens: int, k: int, used: int, skew: int, padding: bool
) -> None:
    """Of 8 experts `used` are chosen at all, by far the last ones most where the routing is skewed."""
    torch.manual_seed(seed)
    layer, states = lively_layer(dtype), torch.randn(tokens, 32).to(dtype)
    index = (torch.randn(tokens, used) + skew * torch.arange(used)).topk(k).indices
    mask = torch.rand(1, tokens) < 0.6 if padding else torch.ones(1, tokens, dtype=torch.bool)
    with (
        mock.patch.object(experts, "FEW_PAIRS", 1000 if grouped else 0),
        mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as product,
    ):
        call = last_call(layer, states, index, mask)
    assert product.call_count == (2 if grouped else 0)

    states, index = states[mask.flatten()].double(), index[mask.flatten()]
    places = [(index == expert).nonzero() for expert in range(8)]  # (token, rank) of each pair
    chosen, rank = torch.cat(places).T
    counts = torch.tensor([len(place) for place in places])
    up, down = (w.detach().double().repeat_interleave(counts, 0) for w in layer.bank.parameters())  # of each pair
    x = states[chosen]
    gate, value = torch.einsum("sd,sfd->sf", x, up).chunk(2, -1)
    h = F.silu(gate) * value
    y = torch.einsum("sf,sdf->sd", h, down)
    output = torch.zeros_like(states).index_add_(0, chosen, y * 0.5 ** (rank + 1.0)[:, None])
    assert call.counts == tuple(counts.tolist())
    assert torch.equal(call.tokens, chosen)
    assert torch.equal(call.x.double(), x)
    error = 1e-6 if dtype == torch.float32 else 2e-2  # of the largest number
    for found, wanted in ((call.h, h), (call.y, y), (call.output, output)):
        assert found.dtype == dtype
        size = float(wanted.abs().max()) if len(wanted) else 1.0
        torch.testing.assert_close(found.double(), wanted, atol=size * error, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "dtype", "width", "products"),
    [
        (8 * experts.FEW_PAIRS, torch.float32, 64, 2),
        (8 * experts.FEW_PAIRS + 1, torch.float32, 64, 0),  # many pairs an expert: a loop costs nothing
        (8, torch.float64, 64, 0),  # a type that torch's product refuses
        (8, torch.float32, 42, 0),  # rows of down_proj that start anywhere
    ],
)
def test_few_pairs_an_expert_are_run_as_groups(
    tokens: int, dtype: torch.dtype, width: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, product = lively_layer(dtype, width), mock.Mock(wraps=F.grouped_mm)
    monkeypatch.setattr(F, "grouped_mm", product)
    states, index = torch.ones(tokens, 32, dtype=dtype), torch.arange(tokens)[:, None] % 8
    call = last_call(layer, states, index, torch.ones(1, tokens).bool())
    assert product.call_count == products
    torch.testing.assert_close(call.output[call.tokens], call.y / 2)


def test_sums_depend_neither_on_batches_nor_on_padding_nor_on_streaming(tmp_path: Path) -> None:
    model = build("mixtral")
    ids = families.ids(5, 8)
    whole = sums_of(model, ids, batch_size=5)
    split = sums_of(model, ids, batch_size=2)
    padded = torch.cat([torch.zeros(5, 3, dtype=torch.long), ids], 1)
    mask = padded != 0
    mask[:, 3:] = True
    left = sums_of(model, padded, mask)
    model.save_pretrained(tmp_path / "model")
    from model_hooks.layer_stream import LayerStream

    stream = LayerStream(tmp_path / "model")
    layers = moe_layers(stream.anatomy())
    streamed = Sums(4, 6, 32, layers[0].bank.down_proj.shape[-1])
    with watching_experts(stream.model, layers, streamed):
        watch_layerwise(stream, ids, streamed)
    for name, value in whole.items():
        for other in (split, left, streamed.sums):
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_experts_are_never_chosen_ones_and_reload_exactly(name: str, tmp_path: Path) -> None:
    """A model without experts is the model whose router never chooses them; uniform counts make a stock checkpoint."""
    model = build(name)
    ids = families.ids(2, 7)
    keep = {block: [0, 2, 3, 5] for block in layers_of(model)}
    masked = masked_logits(model, keep, ids)
    drop_experts(model, keep)
    torch.testing.assert_close(model(ids).logits, masked, atol=1e-5, rtol=1e-5)
    assert not type(model).__name__.startswith("Lean")
    save(model, tmp_path / "m", card=Card("base", "experts"))
    again, _ = load(tmp_path / "m", tokenizer=False)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-6)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **kwargs), again.generate(ids, use_cache=False, **kwargs))


def masked_logits(model: Any, keep: dict[int, Sequence[int]], ids: torch.Tensor) -> torch.Tensor:
    """Logits of a copy whose routers find the other experts impossible: their logits come from a bias of -inf."""
    model = copy.deepcopy(model)
    for block, layer in layers_of(model).items():
        gone = torch.tensor([e not in keep[block] for e in range(layer.num_experts)])
        layer.router.forward = masked_router(layer.router, gone)
    return model(ids).logits


def masked_router(router: Any, gone: torch.Tensor) -> Any:
    linear, forward = F.linear, type(router).forward

    def run(hidden_states: torch.Tensor) -> Any:
        F.linear = lambda *args: linear(*args).masked_fill(gone, float("-inf"))  # type: ignore[assignment]
        try:
            return forward(router, hidden_states)
        finally:
            F.linear = linear  # type: ignore[assignment]

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_by_layer_reload_exactly_and_generate(name: str, tmp_path: Path) -> None:
    model = build(name)
    ids = families.ids(2, 7)
    keep = {1: [1], 2: [0, 5, 2], 3: [0, 1, 2, 3, 4, 5]}
    if name == "deepseek_v3":  # its groups must keep two
        keep[1] = [1, 4]
    masked = masked_logits(model, {0: range(6), **keep}, ids) if len(keep[1]) > 1 else None
    drop_experts(model, keep)
    if masked is not None:
        torch.testing.assert_close(model(ids).logits, masked, atol=1e-5, rtol=1e-5)
    assert model.config.lean["experts"] == [None, len(keep[1]), 3, None]
    save(model, tmp_path / "m", card=Card("base", "experts"))
    again, _ = load(tmp_path / "m", tokenizer=False)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-6)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **kwargs), again.generate(ids, use_cache=False, **kwargs))


def test_the_balance_loss_knows_how_many_experts_are_left() -> None:
    ids = torch.arange(16).view(1, -1)
    model = build("mixtral", output_router_logits=True)
    drop_experts(model, {block: [0, 2, 5] for block in layers_of(model)})
    found = model(input_ids=ids, labels=ids)
    assert found.aux_loss.item() > 0
    assert torch.isfinite(found.loss)
    drop_experts(model, {next(iter(layers_of(model))): [0, 1]})  # other numbers by layer have no such loss
    assert model(input_ids=ids, labels=ids).aux_loss is None


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_drops_of_all_kinds_compose_in_any_order(name: str, tmp_path: Path) -> None:
    orders = [("experts", "block", "mlp"), ("mlp", "experts", "block"), ("block", "mlp", "experts")]
    found = []
    for order in orders:
        model = build(name)
        originals = {1: [0, 1, 3], 3: [1, 2, 4, 5]}
        for what in order:
            if what == "block":
                drop(model, attention=[2], mlp=[2])
            elif what == "mlp":
                drop(model, mlp=[3])
            else:
                present = dict(zip(anatomy(model).original_index, anatomy(model).blocks, strict=True))
                now = {b.index: originals[o] for o, b in present.items() if o in originals and b.experts}
                drop_experts(model, now)
        found.append(model)
    ids = families.ids(2, 6)
    for number, model in enumerate(found):
        torch.testing.assert_close(model(ids).logits, found[0](ids).logits, atol=1e-6, rtol=1e-6)
        save(model, tmp_path / str(number), card=Card("base", "all"))
        again, _ = load(tmp_path / str(number), tokenizer=False)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-6)


def test_groups_keep_as_many_each() -> None:
    model = build("deepseek_v3", 8, n_group=2, topk_group=1, num_experts_per_tok=2)
    layer = layers_of(model)[1]
    assert (layer.num_groups, layer.topk_group) == (2, 1)
    ids = families.ids(2, 7)
    keep = {block: [0, 2, 5, 7] for block in layers_of(model)}
    masked = masked_logits(model, keep, ids)
    with pytest.raises(RequestError, match="each group must keep as many"):
        drop_experts(model, {1: [0, 1, 2, 5]})
    with pytest.raises(RequestError, match="needs at least 4"):
        drop_experts(model, {1: [0, 5]})
    drop_experts(model, keep)
    torch.testing.assert_close(model(ids).logits, masked, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1, 6), max_size=7))
def test_only_real_choices_are_kept(keep: list[int]) -> None:
    layer = layers_of(families.parent("mixtral"))[0]
    valid = keep and len(set(keep)) == len(keep) and all(0 <= e < 4 for e in keep)
    if valid:
        check_keep(layer, keep)
    else:
        with pytest.raises(RequestError, match="cannot keep"):
            check_keep(layer, keep)


def test_what_is_no_mixture_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="no MoE layers found in LlamaForCausalLM"):
        moe_layers(anatomy(families.parent("llama")))
    model = build("mixtral")
    model.model.layers[0].mlp.experts.is_transposed = True
    with pytest.raises(UnsupportedArchitectureError, match="MixtralExperts have a layout"):
        layer_of(model.model.layers[0].mlp)
    with pytest.raises(RequestError, match="block 9 has no experts"):
        drop_experts(build("mixtral"), {9: [0]})
