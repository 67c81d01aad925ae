"""Dropping equals zeroing, whole blocks leave a stock model, plans compose, and a wrong plan changes nothing."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, HIDDEN, LAYERS, build, ids, parent, small, spread, vlm
from hypothesis import given, settings
from hypothesis import strategies as st

from model_hooks import RequestError, UnsupportedArchitectureError, anatomy, drop

Plan = dict[str, list[int]]
PLANS: list[Plan] = [{"attention": [0]}, {"mlp": [LAYERS - 1]}, {"attention": [0, 2], "mlp": [1, 2]}]


@torch.no_grad()
def zeroed(model: Any, attention: Any = (), mlp: Any = ()) -> Any:
    """`model` with the weights of the sublayers and of their norms zero, in place: each then adds zero.

    Gemma's norms scale by 1 + weight, so theirs becomes -1.
    """
    a = anatomy(model)
    for kind, indices in (("attention", attention), ("mlp", mlp)):
        for index in indices:
            sublayer, block = getattr(a.blocks[index], kind), a.blocks[index].module
            for p in sublayer.module.parameters():
                p.zero_()
            for norm in sublayer.post:
                for p in block.get_submodule(norm).parameters():
                    p.fill_(-1 if "Gemma" in type(model).__name__ else 0)
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=tokens, **kwargs).logits


@torch.no_grad()
def greedy(model: Any, tokens: torch.Tensor, steps: int = 6, **kwargs: Any) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=steps, do_sample=False, **kwargs)


def snapshot(model: Any) -> tuple[Any, ...]:
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    return type(model), copy.deepcopy(model.config.to_dict()), [type(m) for m in model.modules()], weights


def assert_same(model: Any, before: tuple[Any, ...]) -> None:
    kind, config, modules, weights = before
    assert type(model) is kind
    assert model.config.to_dict() == config
    assert [type(m) for m in model.modules()] == modules
    now = model.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[n], w) for n, w in weights.items())


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_dropping_equals_zeroing(name: str, plan: Plan) -> None:
    tokens = ids(2, 9)
    want = logits(zeroed(build(name), **plan), tokens)
    dropped = drop(build(name), **plan)
    torch.testing.assert_close(logits(dropped, tokens), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, logits(parent(name), tokens), atol=1e-2)  # the units did matter
    assert anatomy(dropped).dropped_attention == tuple(plan.get("attention", ()))
    assert anatomy(dropped).dropped_mlp == tuple(plan.get("mlp", ()))


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi"])
def test_dropping_nothing_is_bit_identical(name: str) -> None:
    model = build(name)
    before = snapshot(model)
    assert drop(model) is model
    assert_same(model, before)
    assert torch.equal(logits(model, ids(2, 9)), logits(parent(name), ids(2, 9)))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_language_model_of_a_vlm(name: str) -> None:
    tokens, plan = ids(1, 7), {"attention": [1], "mlp": [2]}
    want = logits(zeroed(copy.deepcopy(vlm(name)), **plan), tokens)
    dropped = drop(copy.deepcopy(vlm(name)), **plan)
    torch.testing.assert_close(logits(dropped, tokens), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy(dropped, tokens), greedy(dropped, tokens, use_cache=False))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "olmo3", "qwen3", "smollm3", "gpt2", "opt", "deepseek_v2", "mixtral"]
)
def test_whole_blocks_leave_a_stock_model(name: str) -> None:
    gone, tokens = [0, 2], ids(2, 9)
    want = logits(zeroed(build(name), attention=gone, mlp=gone), tokens)
    model = drop(build(name), attention=gone, mlp=gone)
    assert type(model) is type(parent(name))
    assert not model.config.lean["edits"]
    stack = model.get_submodule(anatomy(parent(name)).stack_name)
    assert len(stack) == model.config.num_hidden_layers == 2
    assert [m.layer_idx for b in stack for m in b.modules() if hasattr(m, "layer_idx")][-1] == 1
    torch.testing.assert_close(logits(model, tokens), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy(model, tokens), greedy(model, tokens, use_cache=False))
    stock = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()  # the config says it all
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock, tokens), logits(model, tokens))


def test_per_layer_settings_follow_their_blocks() -> None:
    gemma = drop(build("gemma3"), attention=[0, 1], mlp=[0, 1])
    assert gemma.config.layer_types == ["sliding_attention", "full_attention"]
    gemma = drop(build("gemma3"), attention=[1, 3], mlp=[1, 3])
    assert gemma.config.layer_types == ["sliding_attention"] * 2
    smol = small("SmolLM3Config", no_rope_layers=[1, 0, 0, 1])
    model = drop(spread(transformers.SmolLM3ForCausalLM(smol)), attention=[0], mlp=[0])
    assert model.config.no_rope_layers == [0, 0, 1]
    deep = drop(build("deepseek_v3"), attention=[0], mlp=[0])
    assert deep.config.first_k_dense_replace == 0


def test_experts_in_every_second_block_survive_renumbering() -> None:
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
    whole = spread(transformers.Qwen3MoeForCausalLM(small("Qwen3MoeConfig", head_dim=8, **extra)))
    model = drop(copy.deepcopy(whole), attention=[0], mlp=[0])
    assert [bool(b.experts) for b in anatomy(model).blocks] == [True, False, True]
    assert (model.config.decoder_sparse_step, model.config.mlp_only_layers) == (1, [1])
    want = logits(zeroed(whole, attention=[0], mlp=[0]), ids(1, 9))
    torch.testing.assert_close(logits(model, ids(1, 9)), want, atol=1e-5, rtol=1e-5)


def test_blocks_that_depend_on_their_number_are_not_moved() -> None:
    """DiffLlama's lambda and GPT-2's scaling by the inverse of the block's number have no place in a stock config."""
    gpt2 = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True, n_positions=64
    )
    for model in (
        spread(transformers.DiffLlamaForCausalLM(small("DiffLlamaConfig"))),
        spread(transformers.GPT2LMHeadModel(gpt2)),
    ):
        before = snapshot(model)
        with pytest.raises(UnsupportedArchitectureError, match="block 1 would not be the same block in a shallower"):
            drop(model, attention=[0], mlp=[0])
        assert_same(model, before)
        last = drop(copy.deepcopy(model), attention=[3], mlp=[3])  # the others keep their numbers
        want = logits(zeroed(model, attention=[3], mlp=[3]), ids(1, 9))
        torch.testing.assert_close(logits(last, ids(1, 9)), want, atol=1e-5, rtol=1e-5)


sublayers = st.lists(st.sampled_from([(k, i) for k in ("attention", "mlp") for i in range(LAYERS)]), unique=True)


@settings(max_examples=20)
@given(
    order=sublayers.filter(lambda s: len(s) > 0 and len({i for k, i in s if k == "attention"}) < LAYERS), data=st.data()
)
def test_successive_drops_compose_in_original_indices(order: list[tuple[str, int]], data: Any) -> None:
    steps = data.draw(st.lists(st.integers(0, 2), min_size=len(order), max_size=len(order)))
    at_once: Plan = {k: [i for kind, i in order if kind == k] for k in ("attention", "mlp")}
    parts = [
        {k: [i for (kind, i), s in zip(order, steps) if kind == k and s == step] for k in at_once} for step in range(3)
    ]
    one = drop(build("llama"), **at_once)
    many = functools.reduce(lambda model, plan: drop(model, **plan), parts, build("llama"))
    assert anatomy(one).original_index == anatomy(many).original_index
    assert anatomy(one).dropped_attention == anatomy(many).dropped_attention == tuple(sorted(at_once["attention"]))
    assert anatomy(one).dropped_mlp == anatomy(many).dropped_mlp == tuple(sorted(at_once["mlp"]))
    assert type(one) is type(many)
    assert type(one.config) is type(many.config)
    assert torch.equal(logits(one, ids(1, 8)), logits(many, ids(1, 8)))
    want = logits(zeroed(build("llama"), **at_once), ids(1, 8))
    torch.testing.assert_close(logits(many, ids(1, 8)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "phi", "granite", "mixtral", "opt"])
def test_a_constant_stands_for_what_was_dropped(name: str) -> None:
    """The vector is what is added to the residual stream: with it, the output equals a block hooked to add it."""
    generator = torch.Generator().manual_seed(1)
    bias = {key: torch.randn(HIDDEN, generator=generator) for key in (("attention", 1), ("mlp", 1), ("mlp", 2))}
    model = drop(build(name), attention=[1], mlp=[1, 2], bias=bias)
    reference = zeroed(build(name), attention=[1], mlp=[1, 2])
    stack = anatomy(reference).blocks
    stack[1].module.register_forward_hook(lambda m, a, y: _plus(y, bias["attention", 1] + bias["mlp", 1]))
    stack[2].module.register_forward_hook(lambda m, a, y: _plus(y, bias["mlp", 2]))
    tokens = ids(2, 7)
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), atol=1e-4, rtol=1e-4)
    assert len(anatomy(model).blocks) == LAYERS  # block 1 holds constants, so it stays
    assert torch.equal(greedy(model, tokens), greedy(model, tokens, use_cache=False))


def test_a_block_that_loses_its_second_half_later_leaves_a_stock_model() -> None:
    model = drop(drop(build("llama"), attention=[1]), mlp=[1])
    once = drop(build("llama"), attention=[1], mlp=[1])
    assert type(model) is type(once) is transformers.LlamaForCausalLM
    assert type(model.config) is transformers.LlamaConfig
    assert model.config.to_dict() | {"architectures": None} == once.config.to_dict()
    assert torch.equal(greedy(model, ids(1, 5)), greedy(once, ids(1, 5)))


def _plus(y: Any, vector: torch.Tensor) -> Any:
    return y + vector if isinstance(y, torch.Tensor) else (y[0] + vector, *y[1:])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attention": [4]}, r"attention \[4\] out of range; this model has blocks 0 to 3"),
    ({"mlp": [-1]}, r"mlp \[-1\] out of range; this model has blocks 0 to 3"),
    ({"attention": [1, 1]}, r"attention \[1\] given more than once"),
    ({"attention": [0, 1, 2, 3]}, "at least one attention layer must stay; 4 of 4"),
    ({"attention": [0], "bias": {("mlp", 0): torch.zeros(HIDDEN)}}, "bias given for mlp 0, which is not dropped"),
    ({"attention": [0], "bias": {("attention", 0): torch.zeros(3)}}, r"must be 32 finite numbers, got shape \(3,\)"),
    ({"attention": [0], "bias": {("attention", 0): torch.full((HIDDEN,), float("nan"))}}, "32 finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_plan_changes_nothing(plan: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(RequestError, match=message) as caught:
        drop(model, **plan)
    assert "\n" not in str(caught.value)
    assert_same(model, before)


def test_a_bad_plan_for_a_dropped_model_changes_nothing() -> None:
    model = drop(build("llama"), attention=[0, 1, 2], mlp=[1])
    before = snapshot(model)
    for plan, message in (
        ({"attention": [1]}, r"attention \[1\] already dropped"),
        ({"mlp": [0, 1]}, r"mlp \[1\] already dropped"),
        ({"attention": [3]}, "at least one attention layer must stay; 1 of 1"),
        ({"attention": [4]}, "blocks 0 to 3"),
    ):
        with pytest.raises(RequestError, match=message):
            drop(model, **plan)
        assert_same(model, before)


def test_a_dropped_model_trains() -> None:
    """Gradients reach every weight that stayed, with and without gradient checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        model = drop(build("olmo2"), attention=[0, 2], mlp=[1]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[-1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
