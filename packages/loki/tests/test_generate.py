"""Unmodified `generate()` on seven families: with all tokens read it is ordinary attention, whatever is asked of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from loki import LokiCache, disable, enable, session
from loki.attention import attend
from loki.cache import convert
from loki.sessions import runtime_of
from lokimodels import FAMILIES, basis_of, build, decoded, tokens
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

PADDED = torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens(1, 15, seed=3)], dim=1)
BOTH = torch.cat([PADDED, tokens(1, 24, seed=4)])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "several": {"num_return_sequences": 2, "num_beams": 2},
}
SPARSE = {"k": 0.25, "d": 0.5, "sink": 1, "recent": 2, "min_k": 3, "min_length": 0}


def reference(family: str) -> Any:
    model = build(family)
    model.set_attn_implementation("eager" if family == "Gemma2" else "sdpa")  # sdpa passes over its softcap
    return model


def generate(model: Any, way: str, ids: torch.Tensor = BOTH, **changes: Any) -> Any:
    ids = ids[1:] if way == "prompt lookup" else ids  # transformers looks up for one row only
    return model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=10, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **WAYS[way], **changes,
    )  # fmt: skip


def difference(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_all_tokens_is_ordinary_attention(family: str, way: str) -> None:
    model = reference(family)
    expected = generate(model, way)
    # one short of 1.0 goes through the kernel, which then reads all of these few tokens
    for k in (1.0, 0.999):
        with session(model, basis_of(family), k=k, d=0.25, min_length=0):
            found = generate(model, way)
        assert torch.equal(found.sequences, expected.sequences)
        assert difference(found, expected) < 2e-4


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Phi"])
def test_a_second_turn_goes_on_with_the_cache(family: str) -> None:
    model, results = reference(family), []
    for loki in (False, True):
        if loki:
            enable(model, basis_of(family), k=1.0, min_length=0)
        first = generate(model, "greedy", BOTH[1:])
        more = torch.cat([first.sequences, tokens(1, 12, seed=8)], dim=1)
        results.append(generate(model, "greedy", more, past_key_values=first.past_key_values))
        assert isinstance(results[-1].past_key_values, LokiCache) is loki
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert difference(*results) < 2e-4


@torch.no_grad()
def test_a_cropped_cache_goes_on() -> None:
    model = build()
    ids = tokens(2, 30)
    with session(model, basis_of("Llama"), **SPARSE):
        expected = decoded(model, ids, prompt=20)
        cache = LokiCache(model)
        decoded(model, ids, prompt=20, cache=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 26
        again = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(26, 30)]
    assert torch.allclose(torch.cat(again, 1), expected[:, 26:], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(family: str) -> None:
    """Bug 4 of the original: k was a share of the padded length of the batch."""
    model, ids = build(family), tokens(1, 23, seed=1)
    padded = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1), tokens(1, 32, seed=2)])
    mask = (padded != 0).long()
    for prefill in ("dense", "masked"):
        with session(model, basis_of(family), prefill=prefill, **SPARSE):
            alone = generate(model, "greedy", ids)
            batch = generate(model, "greedy", padded)
            assert mask.sum() == 23 + 32
        assert torch.equal(alone.sequences[0, 23:], batch.sequences[0, 32:])
        assert max(float((a[0] - b[0]).abs().max()) for a, b in zip(alone.logits, batch.logits, strict=True)) < 1e-5


@torch.no_grad()
def test_padding_on_the_right_and_holes_in_the_mask_are_seen() -> None:
    model, ids = build(), tokens(1, 30, seed=1)
    holes = torch.ones(1, 30, dtype=torch.long)
    holes[0, [4, 5, 11]] = 0
    step = {"attention_mask": torch.cat([holes, holes.new_ones(1, 1)], 1)}
    expected = model(input_ids=ids, attention_mask=holes)
    expected = model(input_ids=ids[:, :1], past_key_values=expected.past_key_values, **step).logits
    with session(model, basis_of("Llama"), k=0.999, min_length=0):
        found = model(input_ids=ids, attention_mask=holes)
        found = model(input_ids=ids[:, :1], past_key_values=found.past_key_values, **step).logits
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@torch.no_grad()
def test_several_queries_at_once_read_what_each_would_read_alone(family: str) -> None:
    """A draft that is verified: Q <= 8 through the kernel, each query with its own number of tokens."""
    model, ids = build(family), tokens(2, 40)
    with session(model, basis_of(family), **SPARSE):
        expected = decoded(model, ids, prompt=30)
        cache = LokiCache(model)
        model(input_ids=ids[:, :30], past_key_values=cache)
        found = torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids[:, 30:].split(5, 1)], 1)
    assert torch.allclose(found, expected[:, 30:], atol=1e-5)


@pytest.mark.parametrize("share", [0.125, 0.5])
@pytest.mark.parametrize("method", ["loki", "topk", "quest", "h2o", "pca"])
@torch.no_grad()
def test_short_texts_give_finite_numbers(method: str, share: float) -> None:
    """Bug 2 of the original: int(k·S) is 0 for short texts."""
    model = build()
    with session(model, basis_of("Llama"), method=method, k=share, d=0.25, sink=0, recent=0, min_k=0, min_length=0):
        assert decoded(model, tokens(2, 20)).isfinite().all()


@torch.no_grad()
def test_sliding_layers_are_bit_identical() -> None:
    model, ids = build("Gemma3Text"), tokens(2, 30)
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for loki in (False, True):
        if loki:
            enable(model, basis_of("Gemma3Text"), **SPARSE)
        attention = model.model.layers[0].self_attn  # the first layer: its input does not depend on others
        hook = attention.register_forward_hook(lambda m, a, out, loki=loki: seen[loki].append(out[0]))
        decoded(model, ids, prompt=20)
        hook.remove()
    assert len(seen[False]) == 11
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_both_registrations_are_there_and_go_nowhere() -> None:
    model = build()
    enable(model, basis_of("Llama"))
    assert AttentionInterface()["loki"] is attend
    assert AttentionMaskInterface()["loki"] is AttentionMaskInterface()["sdpa"]


def state_of(model: Any) -> Any:
    hooks = [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks or "_loki" in m.__dict__]
    return model.config._attn_implementation, hooks, sorted(model.__dict__), sorted(model.get_decoder().__dict__)


@pytest.mark.parametrize("former", ["eager", "sdpa"])
def test_disable_and_session_leave_nothing_behind(former: str) -> None:
    model = build()
    model.set_attn_implementation(former)
    before = state_of(model)
    enable(model, basis_of("Llama"))
    enable(model, basis_of("Llama"), k=0.5)
    assert model.config._attn_implementation == "loki"
    disable(model)
    disable(model)
    assert state_of(model) == before
    with pytest.raises(KeyError), session(model, basis_of("Llama")):
        raise KeyError
    assert state_of(model) == before
    assert type(model.generate(BOTH, max_new_tokens=2, return_dict_in_generate=True).past_key_values) is DynamicCache


def test_a_session_in_an_enabled_model_gives_it_back() -> None:
    model = build()
    enable(model, basis_of("Llama"), **SPARSE)
    expected = generate(model, "greedy")
    with session(model, method="full"):
        assert difference(generate(model, "greedy"), expected) > 1e-3
    assert difference(generate(model, "greedy"), expected) == 0
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_of_an_enabled_model_stands_alone() -> None:
    model = build()
    enable(model, basis_of("Llama"), **SPARSE)
    expected = generate(model, "greedy")
    twin = copy.deepcopy(model)
    disable(model)
    assert difference(generate(twin, "greedy"), expected) == 0
    assert difference(generate(model, "greedy"), expected) > 1e-3


@pytest.mark.parametrize("method", ["loki", "pca"])
@torch.no_grad()
def test_a_foreign_cache_works_by_projection_and_warns_once(method: str) -> None:
    model, ids = build(), tokens(2, 30)
    with session(model, basis_of("Llama"), method=method, **SPARSE):
        expected = decoded(model, ids, prompt=20)
        with pytest.warns(UserWarning, match="projects the queries") as caught:
            found = decoded(model, ids, prompt=20, cache=DynamicCache(config=model.config))
        assert len([w for w in caught if "projects" in str(w.message)]) == 1
    assert torch.allclose(found, expected, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with session(model, basis_of("Llama"), method=method, backend="projected", **SPARSE):
            out = model(input_ids=ids[:, :20])
            assert type(out.past_key_values.layers[0]).__name__ == "DynamicLayer"
            assert torch.equal(decoded(model, ids, prompt=20), found)


def test_gradients_make_attention_dense_with_one_warning() -> None:
    model, ids = build(), tokens(2, 20)
    expected = model(input_ids=ids, labels=ids).loss
    enable(model, basis_of("Llama"), prefill="masked", **SPARSE)
    with pytest.warns(UserWarning, match="gradients") as caught:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert len(caught) == 1
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_flow_through_softcapped_attention() -> None:
    losses, grads = [], []
    for loki in (False, True):
        model, ids = reference("Gemma2"), tokens(2, 20)
        if loki:
            enable(model, basis_of("Gemma2"))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
        grads.append(model.model.layers[1].self_attn.k_proj.weight.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(*grads, atol=1e-5)


@torch.no_grad()
def test_inference_mode_and_half_precision() -> None:
    model, ids = build(), tokens(2, 40)
    with session(model, basis_of("Llama"), **SPARSE):
        expected = decoded(model, ids, prompt=20, attention_mask=torch.ones_like(ids))
        with torch.inference_mode():
            assert torch.equal(decoded(model, ids, prompt=20, attention_mask=torch.ones_like(ids)), expected)
    model.to(torch.bfloat16)
    dense = decoded(model, ids, prompt=20)
    with session(model, basis_of("Llama"), k=0.999, min_length=0):
        found = decoded(model, ids, prompt=20)
    assert found.dtype == torch.bfloat16
    assert (found - dense).abs().mean() < 0.1 * dense.abs().mean()


@pytest.mark.filterwarnings("ignore:this cache holds keys as they are")
@pytest.mark.parametrize(
    "settings", [{"k": 1.0}, {"k": 0.999}, {"k": 0.999, "block": 16}, {"method": "topk", "k": 0.999}]
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])  # Gemma2: softcapped
@torch.no_grad()
def test_autocast_is_that_of_ordinary_attention(family: str, settings: dict[str, Any]) -> None:
    """Queries and keys are float32 after the rotary embedding, values bfloat16."""
    model, ids = reference(family), tokens(2, 40, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = decoded(model, ids, prompt=20)
        with session(model, basis_of(family), min_length=0, **settings):
            caches = [None, DynamicCache(config=model.config)]
            if family == "Llama":  # transformers' own static layers with a window take no autocast
                caches.append(StaticCache(config=model.config, max_cache_len=48))
                convert(caches[-1], runtime_of(model).new_layer)
            for cache in caches:
                found = decoded(model, ids, prompt=20, cache=cache)
                assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
        with session(model, basis_of(family), min_length=0, prefill="masked", **settings):
            few = model(input_ids=ids[:, :8], use_cache=False).logits
        assert (few - expected[:, :8]).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("k", [1.0, 1000])
@torch.no_grad()
def test_a_mass_is_heeded_where_its_bound_does_not_bind(k: float) -> None:
    model, ids, read = build(), tokens(2, 40), {}
    for mass in (None, 0.5):
        with session(model, basis_of("Llama"), **SPARSE | {"k": k, "mass": mass}):
            read[mass] = decoded(model, ids, prompt=30)
    with session(model, basis_of("Llama"), **SPARSE | {"k": 39, "mass": 0.5}):
        bound = decoded(model, ids, prompt=30)
    assert not torch.allclose(read[0.5], read[None], atol=1e-3)
    assert torch.equal(read[0.5], bound)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_methods_that_evict_do_with_a_static_cache_what_they_do_with_another(method: str, beams: int) -> None:
    model = build()
    ids = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens(1, 51, seed=3)], 1), tokens(1, 60, seed=4)])
    with session(model, method=method, **SPARSE):
        expected, found = (generate(model, way, ids, num_beams=beams) for way in ("greedy", "static"))
        alive = found.past_key_values.layers[1].state["alive"]
        found.past_key_values.reset()
        assert not found.past_key_values.layers[1].state
    assert not alive[:, :, 9:60].all()
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(found, expected) < 1e-4


def test_a_static_cache_decodes_in_one_compiled_graph() -> None:
    model = build()
    with session(model, basis_of("Llama"), **SPARSE), torch.no_grad():
        expected = generate(model, "static")
        forward = model.forward
        model.forward = torch.compile(forward, backend="eager", fullgraph=True, dynamic=False)
        found = generate(model, "static")
        del model.forward
    assert difference(found, expected) < 1e-4
