"""Generation with a KV cache is right whatever was dropped, and the cache holds the kept layers' bytes exactly."""

from __future__ import annotations

import copy
import inspect
import re
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, VOCAB, build, ids, parent, small, spread
from transformers import DynamicCache, StaticCache

from model_hooks import RequestError, anatomy, drop, kv

DROPPED = {"first": [0], "last": [3], "alternating": [0, 2], "first_three": [0, 1, 2]}
SOME = ["llama", "mistral_window", "gemma2", "olmo3", "phi", "gpt2", "deepseek_v2"]


@cache
def dropped(name: str, which: str) -> Any:
    """The family's model without the attention of `DROPPED[which]`; shared, never changed."""
    return drop(build(name), attention=DROPPED[which])


@torch.no_grad()
def greedy(model: Any, tokens: torch.Tensor, steps: int = 8, **kwargs: Any) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=steps, do_sample=False, **kwargs)


@torch.no_grad()
def naive(model: Any, tokens: torch.Tensor, steps: int = 8) -> torch.Tensor:
    """Greedy text by full forward passes without a cache: shares nothing with `generate`."""
    for _ in range(steps):
        following = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    return tokens


@torch.no_grad()
def decoding_error(model: Any, tokens: torch.Tensor, **kwargs: Any) -> float:
    """Largest difference between the logits of each cached decoding step and one full forward of the whole text.

    Text alone says little here: a small random model often writes the same whatever its positions are.
    """
    out = greedy(model, tokens, output_logits=True, return_dict_in_generate=True, **kwargs)
    full = model(input_ids=out.sequences, use_cache=False).logits[:, tokens.shape[1] - 1 : -1]
    return float((torch.stack(out.logits, 1) - full).abs().max() / full.abs().max())


@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_greedy_is_uncached_greedy(name: str, which: str) -> None:
    model, tokens = dropped(name, which), ids(2, 7)
    assert decoding_error(model, tokens) < 1e-5
    assert torch.equal(greedy(model, tokens), naive(model, tokens))


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "phi", "gpt2"])
def test_the_placeholder_is_what_makes_it_right(name: str) -> None:
    """Without it, dropping the first attention restarts positions and masks, silently or not."""
    model, tokens = copy.deepcopy(dropped(name, "first")), ids(2, 9)
    assert chunks_error(model, tokens, DynamicCache(config=model.config)) < 1e-5
    kv.install(anatomy(model).decoder, ())
    try:
        error = chunks_error(model, tokens, DynamicCache(config=model.config))
    except (ValueError, RuntimeError):
        return
    assert error > 1e-3


@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", SOME)
def test_static_cache(name: str, which: str) -> None:
    model, tokens = dropped(name, which), ids(2, 7)
    assert decoding_error(model, tokens, cache_implementation="static", disable_compile=True) < 1e-5


@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", SOME)
def test_beams(name: str, which: str) -> None:
    model, tokens = dropped(name, which), ids(2, 7)
    cached = greedy(model, tokens, num_beams=3, num_return_sequences=2)
    assert torch.equal(cached, greedy(model, tokens, num_beams=3, num_return_sequences=2, use_cache=False))


@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", SOME)
def test_left_padding(name: str, which: str) -> None:
    model, rows = dropped(name, which), [ids(1, 4, seed=1), ids(1, 9, seed=2)]
    batch, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 9 - row.shape[1] :], mask[i, 9 - row.shape[1] :] = row, 1
    together = greedy(model, batch, attention_mask=mask)
    for text, row in zip(together, rows, strict=True):
        assert torch.equal(text[9:], naive(model, row)[0, row.shape[1] :])


@torch.no_grad()
def chunks_error(model: Any, tokens: torch.Tensor, past: Any) -> float:
    """Largest relative difference between a prompt in chunks of unequal length and the prompt at once."""
    lengths = [3, tokens.shape[1] - 8, 1, 4]
    parts = [model(input_ids=chunk, past_key_values=past).logits for chunk in tokens.split(lengths, 1)]
    whole = model(input_ids=tokens, use_cache=False).logits
    assert past.get_seq_length() == tokens.shape[1] or not anatomy(model).decoder._no_kv
    return float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", SOME)
def test_chunked_prefill(name: str, which: str, make: Any) -> None:
    """With chunks longer than the window too (5)."""
    model, tokens = dropped(name, which), ids(2, 14)
    lengths = {"max_cache_len": 14} if make is StaticCache else {}
    assert chunks_error(model, tokens, make(config=model.config, **lengths)) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_a_second_turn_goes_on_with_the_first_ones_cache(name: str) -> None:
    model, tokens = dropped(name, "alternating"), ids(1, 7)
    past = DynamicCache(config=model.config)
    first = greedy(model, tokens, past_key_values=past)
    second = torch.cat([first, ids(1, 5, seed=3)], 1)
    assert torch.equal(greedy(model, second, past_key_values=past), naive(model, second))


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi", "qwen3", "gemma2"])
def test_assisted_decoding_in_both_roles(name: str) -> None:
    """As its parent's assistant a dropped model changes nothing but the speed; as the main model neither.

    The window is wider than the text: beyond it, assisted decoding of stock sliding-window models raises in
    transformers 5.17.
    """
    wide = {"sliding_window": 64} if name == "gemma2" else {}
    full, tokens = build(name, **wide), ids(1, 7)
    for which in DROPPED.values():
        less = drop(copy.deepcopy(full), attention=which)
        for main, draft in ((full, less), (less, full)):
            main, draft = copy.deepcopy(main), copy.deepcopy(draft)  # generate() notes things in both
            assert torch.equal(greedy(main, tokens, assistant_model=draft), naive(main, tokens))


@torch.no_grad()
@pytest.mark.parametrize("which", DROPPED)
@pytest.mark.parametrize("name", FAMILIES)
def test_kv_bytes_are_the_kept_layers_exactly(name: str, which: str) -> None:
    tokens = ids(2, 13)

    def caches(model: Any) -> list[Any]:
        made = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)]
        for past in made:
            model(input_ids=tokens, past_key_values=past)
        return made

    for full, less in zip(caches(parent(name)), caches(dropped(name, which)), strict=True):
        sizes = [layer.keys.nbytes + layer.values.nbytes for layer in full.layers]
        assert kv.kv_bytes(full) == sum(sizes) > 0
        assert kv.kv_bytes(less) == sum(s for i, s in enumerate(sizes) if i not in DROPPED[which])
        if len(set(sizes)) == 1:
            assert kv.kv_bytes(less) / kv.kv_bytes(full) == 1 - len(DROPPED[which]) / LAYERS


@torch.no_grad()
def test_every_way_to_hand_over_a_cache() -> None:
    model, tokens = dropped("llama", "first"), ids(1, 6)
    want = model(input_ids=tokens, use_cache=False).logits
    mask = torch.ones_like(tokens)
    decoder = model.model
    hidden = decoder(tokens, mask, None, DynamicCache(config=model.config)).last_hidden_state  # all by position
    torch.testing.assert_close(model.lm_head(hidden), want)
    lazy = DynamicCache()  # made without a config: its layers appear as they are written
    torch.testing.assert_close(model(tokens, past_key_values=lazy).logits, want)
    assert lazy.get_seq_length() == 6
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens))
    torch.testing.assert_close(embedded.logits, want)
    assert embedded.past_key_values.get_seq_length() == 6
    assert model(tokens, use_cache=False).past_key_values is None
    model.config.use_cache = False
    try:
        assert model(tokens).past_key_values is None
    finally:
        model.config.use_cache = True


@torch.no_grad()
def test_a_cache_that_another_model_filled_is_refused() -> None:
    past = DynamicCache(config=parent("llama").config)
    parent("llama")(input_ids=ids(1, 5), past_key_values=past)
    with pytest.raises(RequestError, match=r"holds keys for layer 0, which has no attention: .* pass a fresh cache"):
        dropped("llama", "first")(input_ids=ids(1, 5), past_key_values=past)


@torch.no_grad()
def test_a_cache_is_reset_cropped_and_repeated_like_any_other() -> None:
    model, tokens = dropped("llama", "alternating"), ids(1, 9)
    past = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=past)
    assert past.is_croppable
    past.crop(-3)
    assert past.get_seq_length() == 6
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([1]))
    again = model(input_ids=tokens[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(again, model(input_ids=tokens, use_cache=False).logits[:, 6:])
    past.reset()
    assert "NoKV()" in repr(past)


def test_the_placeholder_answers_all_that_transformers_asks_of_every_layer() -> None:
    """What `Cache` calls on each layer in a loop, read from its source: a new method there must be known here."""
    source = inspect.getsource(transformers.cache_utils.Cache)
    asked = set(re.findall(r"(?:layers\[layer_idx\]|\blayer)\.(\w+)", source))
    only_where_written = {"update", "get_seq_length", "get_mask_sizes", "lazy_initialization"}
    recurrent = {name for name in asked if "state" in name or "indexer" in name or name == "activate_past_recording"}
    assert {"reset", "reorder_cache", "is_compileable"} <= asked
    assert {n for n in asked - only_where_written - recurrent if not hasattr(kv.NoKV(), n)} == {"batch_size"}


def test_the_self_check_fails_loudly_when_the_rules_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kv.self_check(dropped("llama", "first"))
    kv.self_check(dropped("llama", "first").to(torch.float32))
    monkeypatch.setattr(kv, "reserve", lambda cache, dropped: None)  # as if the placeholder did nothing
    with pytest.raises(RuntimeError, match=r"cache length 0, expected 2.*transformers 5\.\d+.*please report"):
        drop(build("llama"), attention=[0])

    class Wrong(transformers.cache_utils.DynamicLayer):  # as if `Cache` asked the placeholder itself
        def get_seq_length(self) -> int:
            return 0

    def asked(cache: Any, dropped: Any) -> None:
        for index in dropped:
            cache.layers[index] = Wrong()

    monkeypatch.setattr(kv, "reserve", asked)
    with pytest.raises(RuntimeError, match="cached and uncached logits differ"):
        drop(build("llama"), attention=[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_self_check(dtype: torch.dtype) -> None:
    model = drop(build("llama").to(dtype), attention=[0, 2])
    assert greedy(model, ids(1, 5)).shape == (1, 13)


def test_sampling_stays_in_the_vocabulary_with_many_sequences() -> None:
    torch.manual_seed(0)
    model = dropped("llama", "first_three")
    out = model.generate(ids(2, 5), max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 11)
    assert int(out.max()) < VOCAB


def test_a_window_on_every_layer_but_the_dropped_one() -> None:
    """One full layer among sliding ones, dropped: the masks of both kinds must still be found."""
    types = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    config = small("Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, layer_types=types, sliding_window=4)
    model = drop(spread(transformers.Gemma3ForCausalLM(config)), attention=[0])
    assert torch.equal(greedy(model, ids(2, 9)), naive(model, ids(2, 9)))
    config = small("Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, layer_types=types[::-1], sliding_window=4)
    model = drop(spread(transformers.Gemma3ForCausalLM(config)), attention=[0, 1, 2])
    assert torch.equal(greedy(model, ids(2, 9)), naive(model, ids(2, 9)))
