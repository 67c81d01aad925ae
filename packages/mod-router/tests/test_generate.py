"""Decisions live in the cache: whatever `generate` does, it gives what the model without a cache gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mod_router import RoutedCache, RouterConfig, attach, decide, detach, routing_context
from routermodels import FAMILIES, LAYERS, build, ids, left_padded, randomise
from torch import Tensor
from transformers import DynamicCache, StaticCache

from model_hooks.kv import kv_bytes

ATTACHED = RouterConfig(layers=(0, 1, 2))
LENGTHS = [9, 4, 7, 2, 9, 5, 3]


def routed(name: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    return randomise(attach(build(name, attention), ATTACHED, **changes), seed)


def greedy(model: Any, x: Tensor, mask: Tensor | None = None, new: int = 6, **options: Any) -> Tensor:
    return model.generate(input_ids=x, attention_mask=mask, do_sample=False, max_new_tokens=new, **options)


def open_rows(model: Any, x: Tensor, mask: Tensor | None = None) -> dict[int, list[bool]]:
    return {layer: gate.tolist() for layer, gate in decide(model, x, mask).items()}


CASES = [(name, unit) for name in FAMILIES for unit in ("attention", "mlp", "block")]
CASES.remove(("opt", "mlp"))  # its blocks hold their MLP themselves: refused (test_config)


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_untrained_routers_change_nothing_and_detach_gives_everything_back(name: str, unit: Any) -> None:
    model = build(name)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    x, mask = left_padded(LENGTHS)
    want = model(input_ids=x, attention_mask=mask).logits
    attach(model, layers=(0, 1, 2), unit=unit)
    with routing_context() as seen:
        got = model(input_ids=x, attention_mask=mask).logits
    assert torch.equal(got, want)
    assert float(seen.capacity) == 1.0
    assert torch.equal(greedy(model, x, mask), greedy(build(name), x, mask))
    detach(model)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert torch.equal(model(input_ids=x, attention_mask=mask).logits, want)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_is_uncached_with_mixed_decisions(name: str, attention: str) -> None:
    for rows in (1, 4, 7):
        model = routed(name, attention)
        x, mask = left_padded(LENGTHS[:rows])
        out = greedy(model, x, mask, return_dict_in_generate=True)
        assert torch.equal(out.sequences, greedy(model, x, mask, use_cache=False))
        assert {i: d.tolist() for i, d in _decisions(out.past_key_values).items()} == open_rows(model, x, mask)


def _decisions(cache: Any) -> dict[int, Tensor]:
    return {i: layer.decision for i, layer in enumerate(cache.layers) if getattr(layer, "decision", None) is not None}


@pytest.mark.parametrize("unit", ["mlp", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi"])
def test_cached_is_uncached_for_other_units(name: str, unit: str) -> None:
    model = routed(name, unit=unit)
    x, mask = left_padded(LENGTHS)
    assert torch.equal(greedy(model, x, mask), greedy(model, x, mask, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_all_closed_is_the_model_without_these_attentions(name: str) -> None:
    from model_hooks import drop

    model, x = attach(build(name).double(), ATTACHED), ids(3, 8)
    want = drop(build(name).double(), attention=(0, 1, 2))(input_ids=x).logits
    with routing_context(forced={i: torch.zeros(3, dtype=torch.bool) for i in (0, 1, 2)}):
        closed = model(input_ids=x, use_cache=False).logits
        out = model(input_ids=x, use_cache=True)
        step = model(input_ids=x[:, :1], past_key_values=out.past_key_values).logits  # norms of closed units rest here
    torch.testing.assert_close(closed, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.logits, want, atol=1e-6, rtol=1e-6)
    longer = drop(build(name).double(), attention=(0, 1, 2))(input_ids=torch.cat([x, x[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(step, longer, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bytes_are_those_of_the_open_rows(name: str) -> None:
    model, x = attach(build(name), ATTACHED), ids(4, 12)
    whole = kv_bytes(build(name)(input_ids=x, use_cache=True).past_key_values)
    half = torch.tensor([True, False, True, False])
    with routing_context(forced={0: half, 1: half, 2: torch.zeros(4, dtype=torch.bool)}):
        cache = model(input_ids=x, use_cache=True).past_key_values
    if name == "llama":  # a half, a half, none and all of four equal layers
        assert kv_bytes(cache) == whole * 2 / 4
        with routing_context(forced={0: half, 1: half, 2: torch.ones(4, dtype=torch.bool)}):
            three_quarters = model(input_ids=x, use_cache=True).past_key_values
        assert kv_bytes(three_quarters) == whole * 0.75  # half of the layers half-closed
    row = [layer.keys[:1].numel() * 8 for layer in (cache.layers[0], cache.layers[1], cache.layers[3])]
    assert kv_bytes(cache) == 2 * row[0] + 2 * row[1] + 4 * row[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_a_decision_is_the_same_alone_in_any_batch_and_under_any_padding(name: str) -> None:
    model = routed(name)
    x, mask = left_padded(LENGTHS)
    together = open_rows(model, x, mask)
    assert any(len(set(rows)) == 2 for rows in together.values())
    assert open_rows(model, x, mask) == together
    for row, length in enumerate(LENGTHS):
        alone = x[row : row + 1, -length:]
        right = torch.cat([alone, torch.zeros(1, 5, dtype=torch.long)], 1)
        right_mask = (torch.arange(length + 5) < length).long()[None]
        for found in (open_rows(model, alone), open_rows(model, right, right_mask)):
            assert {layer: rows[0] for layer, rows in found.items()} == {i: r[row] for i, r in together.items()}


@pytest.mark.parametrize("pool", ["prompt_mean", "last", "ema"])
def test_what_follows_the_prompt_does_not_decide(pool: Any) -> None:
    model, prompts = routed(pool=pool), ids(6, 7)
    lens = torch.full((6,), 7)
    want = open_rows(model, prompts)
    for seed in range(3):
        longer = torch.cat([prompts, ids(6, 9, seed=seed + 1)], 1)
        assert {i: g.tolist() for i, g in decide(model, longer, prompt_lens=lens).items()} == want
    assert open_rows(model, torch.cat([prompts, ids(6, 40, seed=9)], 1)) != want  # a longer prompt may


def test_the_mean_over_everything_looks_at_the_answer() -> None:
    model, prompts = routed(pool="masked_mean"), ids(8, 7)
    longer = torch.cat([prompts, ids(8, 40, seed=1)], 1)
    assert {i: g.tolist() for i, g in decide(model, longer, prompt_lens=torch.full((8,), 7)).items()} != open_rows(
        model, prompts
    )


def test_a_prompt_of_one_token() -> None:
    model, x = routed(), ids(5, 1)
    assert torch.equal(greedy(model, x), greedy(model, x, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_prompt_in_chunks_is_decided_as_a_whole(name: str) -> None:
    model, x = routed(name), ids(3, 15)
    whole = greedy(model, x, return_dict_in_generate=True)
    chunks = greedy(model, x, return_dict_in_generate=True, prefill_chunk_size=5)
    assert torch.equal(whole.sequences, chunks.sequences)
    assert kv_bytes(whole.past_key_values) == kv_bytes(chunks.past_key_values)
    by_first = routed(name, route_on="first-chunk")
    found = greedy(by_first, x, return_dict_in_generate=True, prefill_chunk_size=5).past_key_values
    assert {i: d.tolist() for i, d in _decisions(found).items()} == open_rows(by_first, x[:, :5])


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2"])
def test_beams(name: str) -> None:
    model = routed(name)
    x, mask = left_padded([9, 4, 7])
    beams = {"num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(greedy(model, x, mask, **beams), greedy(model, x, mask, use_cache=False, **beams))


def test_drafts_of_an_assistant_do_not_decide() -> None:
    model, assistant = routed(), build("llama")
    for seed in range(6):
        x = ids(1, 8, seed=seed)
        drafted = greedy(model, x, new=12, assistant_model=assistant)
        assert torch.equal(drafted, greedy(model, x, new=12, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_second_turn_goes_by_the_first_ones_decision(name: str) -> None:
    model, x = routed(name), ids(3, 9)
    cache = RoutedCache(model)
    first = greedy(model, x, new=4, past_key_values=cache)
    decisions = {i: d.clone() for i, d in cache.decisions.items()}
    turn = torch.cat([first, ids(3, 5, seed=4)], 1)
    second = greedy(model, turn, new=4, past_key_values=cache)
    with routing_context(prompt_lens=torch.full((3,), 9)):
        logits = model(input_ids=second[:, :-1], use_cache=False).logits
    assert torch.equal(logits[:, -4:].argmax(-1), second[:, -4:])
    assert all(torch.equal(cache.decisions[i], d) for i, d in decisions.items())


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    model, x = routed(), ids(5, 9)
    want = greedy(model, x)
    for index in ([0, 1, 2, 3, 4], [4, 2], [3], [1, 1, 0]):
        cache = RoutedCache(model)
        model(input_ids=x, past_key_values=cache)
        cache.batch_select_indices(torch.tensor(index))
        step = model(input_ids=want[index, 9:10], past_key_values=cache).logits[:, -1]
        assert torch.equal(step.argmax(-1), want[index, 10])
        cache.batch_repeat_interleave(2)
        cache.crop(-1)
        twice = model(input_ids=want[index, 9:10].repeat_interleave(2, 0), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(twice[::2], step, atol=1e-4, rtol=1e-4)


def test_two_generations_at_once_do_not_meet() -> None:
    model = routed()
    streams = [ids(2, 8, seed=s) for s in (1, 2)]
    want = [greedy(model, x) for x in streams]
    assert open_rows(model, streams[0]) != open_rows(model, streams[1])
    caches = [RoutedCache(model), RoutedCache(model)]
    told: list[Tensor] = list(streams)
    steps = list(streams)
    for _ in range(6):
        for i, cache in enumerate(caches):
            out = model(input_ids=steps[i], past_key_values=cache, use_cache=True)
            steps[i] = out.logits[:, -1:].argmax(-1)
            told[i] = torch.cat([told[i], steps[i]], 1)
    assert [t.tolist() for t in told] == [w.tolist() for w in want]


def watch_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls, from now on, that wait for the device."""
    looks: list[str] = []
    for name in ("tolist", "item", "__bool__", "nonzero", "__int__", "__float__"):
        stock = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _stock: Any = stock, _name: str = name, **kwargs: Any) -> Any:
            looks.append(_name)
            return _stock(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return looks


def test_decoding_does_not_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = routed(), ids(4, 8)
    looks = watch_looks(monkeypatch)
    out = model(input_ids=x, use_cache=True)
    assert len(looks) <= 3  # one a gate
    looks.clear()
    model(input_ids=x[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert looks == []


def test_an_empty_stock_cache_becomes_a_routed_one_and_others_are_refused() -> None:
    model, x = routed(), ids(3, 8)
    given = DynamicCache(config=model.config)
    assert torch.equal(greedy(model, x, past_key_values=given), greedy(model, x))
    assert set(_decisions(given)) == {0, 1, 2}
    full = build()(input_ids=x, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="DynamicCache with 8 tokens cannot hold the decisions"):
        model(input_ids=x[:, :1], past_key_values=full)
    static = StaticCache(config=model.config, max_cache_len=16)
    build()(input_ids=x, past_key_values=static)
    with pytest.raises(TypeError, match="StaticCache with 8 tokens"):
        model(input_ids=x, past_key_values=static)
    with pytest.raises(TypeError, match="without its gate"):
        detach(model)(input_ids=x[:, :1], past_key_values=given)


@pytest.mark.parametrize("unit", ["attention", "mlp", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_a_static_cache_gives_what_a_growing_one_does_and_saves_nothing(name: str, unit: Any) -> None:
    model = routed(name, unit=unit)
    x, mask = left_padded(LENGTHS)
    want = greedy(model, x, mask, return_dict_in_generate=True)
    cache = StaticCache(config=model.config, max_cache_len=24)
    for _ in range(2):  # reset, it decides anew
        assert torch.equal(greedy(model, x, mask, past_key_values=cache), want.sequences)
        assert all(torch.equal(_decisions(cache)[i], d) for i, d in _decisions(want.past_key_values).items())
        whole = sum(2 * layer.keys.numel() * 4 for layer in cache.layers)
        assert kv_bytes(cache) == whole
        cache.reset()
        assert _decisions(cache) == {}
    beams = {"num_beams": 2, "cache_implementation": "static"}
    assert torch.equal(greedy(model, x, mask, **beams), greedy(model, x, mask, num_beams=2))


def test_decoding_with_a_static_cache_does_not_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = routed(), ids(4, 8)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=x, past_key_values=cache)
    looks = watch_looks(monkeypatch)
    mask = torch.ones(4, 1, 1, 12, dtype=torch.bool)
    model(input_ids=x[:, :1], past_key_values=cache, attention_mask=mask, position_ids=torch.full((1, 1), 8))
    assert looks == []


def test_a_logit_that_is_no_number_names_its_layer() -> None:
    model = routed()
    model.model.layers[1].self_attn.depth_router.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="layer 1"):
        model(input_ids=ids(2, 5))


def test_layers_that_are_not_gated_and_copies_have_their_own_state() -> None:
    import copy

    model = routed()
    twin = copy.deepcopy(model)
    x = ids(5, 8)
    assert torch.equal(greedy(twin, x), greedy(model, x))
    randomise(twin, seed=5)
    assert open_rows(twin, x) != open_rows(model, x)
    assert LAYERS - 1 not in decide(model, x)


def test_positions_of_three_axes() -> None:
    """Qwen-VL's rotary positions are [3, rows, tokens]: a batch of three rows is the hard one."""
    import transformers
    from routermodels import SMALL, VOCAB

    from model_hooks import UnsupportedArchitectureError

    text = SMALL | {"vocab_size": VOCAB + 3}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=VOCAB, video_token_id=VOCAB + 1
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    with pytest.raises(UnsupportedArchitectureError, match="three axes"):
        attach(model, ATTACHED, level="token")
    attach(model, ATTACHED)
    x = ids(3, 9)
    mixed = False
    for seed in range(3):
        randomise(model, seed)
        mixed = mixed or any(0 < sum(rows) < 3 for rows in open_rows(model, x).values())
        assert torch.equal(greedy(model, x), greedy(model, x, use_cache=False))
    assert mixed
