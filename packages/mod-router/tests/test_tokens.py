"""Token level: what is gathered, run and scattered equals attention over all tokens with the skipped ones masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mod_router import RoutedCache, attach, routing_context
from mod_router.attaching import routers
from routermodels import build, ids, left_padded, randomise
from torch import Tensor

from model_hooks.kv import kv_bytes

LENGTHS = [9, 4, 7, 2]


def routed(name: str = "llama", attention: str = "sdpa", unit: Any = "attention") -> Any:
    return randomise(attach(build(name, attention), layers=(0, 1, 2), level="token", unit=unit), scale=1.0)


def greedy(model: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    return model.generate(input_ids=x, attention_mask=mask, do_sample=False, max_new_tokens=6, **options)


@pytest.mark.parametrize("unit", ["attention", "mlp", "block"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "olmo2", "gpt_neox", "gpt2", "mixtral"])
def test_cached_is_uncached_and_is_the_masked_form(name: str, unit: str) -> None:
    for attention in ("sdpa", "eager"):
        model = routed(name, attention, unit)
        for x, mask in (left_padded(LENGTHS), (ids(1, 11), None)):
            out = greedy(model, x, mask)
            assert torch.equal(out, greedy(model, x, mask, use_cache=False))
            with torch.no_grad(), routing_context() as seen:
                gathered = model(input_ids=x, attention_mask=mask, use_cache=False).logits
            assert 0 < float(seen.capacity) < 1
            with torch.no_grad(), routing_context(train=True):  # all tokens run; closed ones are masked from the others
                masked = model(input_ids=x, attention_mask=mask, use_cache=False).logits
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(gathered[real], masked[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_untrained_routers_change_nothing(name: str) -> None:
    x, mask = left_padded(LENGTHS)
    model = attach(build(name), layers=(0, 1, 2), level="token")
    assert torch.equal(
        model(input_ids=x, attention_mask=mask).logits, build(name)(input_ids=x, attention_mask=mask).logits
    )
    assert torch.equal(greedy(model, x, mask), greedy(build(name), x, mask))


def test_bytes_are_those_of_the_chosen_tokens() -> None:
    model, x = routed(), ids(1, 20)
    with torch.no_grad(), routing_context() as seen:
        cache = model(input_ids=x, use_cache=True).past_key_values
    tokens = [int(seen.gates[layer].sum()) for layer in (0, 1, 2)]
    assert min(tokens) < 20
    assert kv_bytes(cache) == (sum(tokens) + 20) * 2 * 2 * 8 * 4  # keys and values, heads, width, float32
    assert cache.layers[0].get_seq_length() == 20


def test_chunks_beams_crops_and_turns() -> None:
    model = routed()
    x, mask = left_padded([9, 4, 7])
    assert torch.equal(greedy(model, x, mask, num_beams=3), greedy(model, x, mask, num_beams=3, use_cache=False))
    x = ids(2, 15)
    assert torch.equal(greedy(model, x, prefill_chunk_size=4), greedy(model, x))
    one = x[:1]
    assert torch.equal(greedy(model, one, assistant_model=build()), greedy(model, one, use_cache=False))
    cache = RoutedCache(model)
    with torch.no_grad():
        model(input_ids=x, past_key_values=cache)
        cache.crop(-6)
        parts = model(input_ids=x[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(parts, model(input_ids=x, use_cache=False).logits[:, 9:], atol=1e-4, rtol=1e-4)
        cache.crop(-15)
        torch.testing.assert_close(
            model(input_ids=x, past_key_values=cache).logits,
            model(input_ids=x, use_cache=False).logits,
            atol=1e-4,
            rtol=1e-4,
        )


def test_a_token_is_decided_by_itself_and_the_past_alone() -> None:
    model, x = routed(), ids(3, 12)
    with torch.no_grad(), routing_context() as short:
        model(input_ids=x[:, :8], use_cache=False)
    with torch.no_grad(), routing_context() as long:
        model(input_ids=x, use_cache=False)
    assert all(torch.equal(short.gates[i], long.gates[i][:, :8]) for i in (0, 1, 2))


def test_forced_tokens_and_logits_that_are_no_number() -> None:
    model, x = routed(), ids(2, 8)
    none = torch.zeros(2, 8, dtype=torch.bool)
    with torch.no_grad(), routing_context(forced=dict.fromkeys((0, 1, 2), none)) as seen:
        cache = model(input_ids=x, use_cache=True).past_key_values
    assert float(seen.capacity) == 0
    assert kv_bytes(cache) == 2 * 8 * 2 * 2 * 8 * 4
    routers(model)[1].weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="layer 1"):
        model(input_ids=x)
