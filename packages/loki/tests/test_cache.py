"""The cache layers: what they hold, how they grow, and every way in which transformers changes a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from loki import LokiCache, enable, session
from loki.cache import Handed, LokiLayer, StaticLokiLayer, unrotate
from loki.turn import Turn
from lokimodels import basis_of, build, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from model_hooks import RequestError
from model_hooks.kv import kv_bytes


def states(length: int, seed: int = 0, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, length, 8, generator=generator) for _ in range(2))  # type: ignore[return-value]


def filled(turn: Turn | None = None, parts: tuple[int, ...] = (5, 1, 1, 4)) -> tuple[LokiLayer, DynamicLayer]:
    """A Loki layer and a stock one that were given the same."""
    mine, stock = LokiLayer(turn), DynamicLayer()
    for seed, length in enumerate(parts):
        mine.update(*states(length, seed))
        stock.update(*states(length, seed))
    return mine, stock


TURN = Turn.of(basis_of("Llama"), 0)


def same(mine: LokiLayer, stock: DynamicLayer) -> bool:
    keys = stock.keys if mine.turn is None else mine.turn.keys(stock.keys)
    return (
        mine.get_seq_length() == stock.get_seq_length()
        and mine.get_mask_sizes(3) == stock.get_mask_sizes(3)
        and torch.allclose(mine.keys, keys, atol=1e-6)
        and torch.equal(mine.values, stock.values)
    )


@pytest.mark.parametrize("turn", [None, TURN], ids=["as they are", "turned"])
def test_every_change_is_that_of_the_stock_layer(turn: Turn | None) -> None:
    for change in (
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.crop(-3),
        lambda layer: layer.crop(-11),
        lambda layer: layer.crop(4),
        lambda layer: layer.crop(40),
        lambda layer: layer.crop(0),
    ):
        mine, stock = filled(turn)
        assert same(mine, stock)
        change(mine)
        change(stock)
        assert same(mine, stock)
        batch = len(mine.keys)
        mine.update(*states(2, 9, batch))
        stock.update(*states(2, 9, batch))
        assert same(mine, stock)


def test_changes_of_a_layer_that_was_never_filled_do_nothing() -> None:
    layer = LokiLayer(TURN)
    for change in (layer.reset, layer.offload, layer.prefetch, lambda: layer.crop(-1)):
        change()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert layer.get_seq_length() == 0
    assert not layer.is_initialized


def test_state_of_a_method_goes_with_its_rows() -> None:
    layer, _ = filled()
    layer.state["heavy"] = torch.arange(3.0)[:, None, None].expand(3, 2, 11).clone()
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert layer.state["heavy"][:, 0, 0].tolist() == [2, 2, 0]
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 4]))
    assert layer.state["heavy"][:, 0, 0].tolist() == [2, 0]
    layer.reset()
    assert not layer.state
    assert layer.get_seq_length() == 0


def test_a_reset_layer_starts_again() -> None:
    layer, _ = filled(TURN)
    layer.reset()
    keys, _ = layer.update(*states(4, 1))
    assert keys._loki.fresh
    assert layer.get_seq_length() == 4
    assert torch.allclose(layer.keys, TURN.keys(states(4, 1)[0]), atol=1e-6)


def test_a_layer_that_evicts_refuses_to_be_cropped() -> None:
    layer = LokiLayer(None, evicts=True)
    layer.update(*states(6))
    layer.crop(0)
    assert not layer.is_croppable
    with pytest.raises(RequestError, match="cannot be cropped"):
        layer.crop(-1)


def test_memory_is_that_of_the_stock_cache_and_growth_is_amortised() -> None:
    layer, copies = LokiLayer(TURN), 0
    stock = DynamicCache()
    prompt = states(3000)
    layer.update(*prompt)
    stock.update(*prompt, 0)
    where = layer._keys.data_ptr()
    for i in range(1000):
        step = states(1, i)
        layer.update(*step)
        stock.update(*step, 0)
        copies += layer._keys.data_ptr() != where
        where = layer._keys.data_ptr()
    mine = DynamicCache()
    mine.layers = [layer]
    assert kv_bytes(mine) == kv_bytes(stock)
    assert copies <= 2
    assert layer._keys.shape[2] < 1.6 * 4000


def test_keys_are_handed_over_with_their_layer_and_leave_no_cycle() -> None:
    import gc
    import weakref

    layer = LokiLayer(TURN)
    first, _ = layer.update(*states(5))
    assert torch.equal(first, states(5)[0])  # a prompt attends to the keys as they are
    later, _ = layer.update(*states(1, 1))
    for keys, fresh in ((first, True), (later, False)):
        handed = keys._loki  # type: ignore[attr-defined]
        assert isinstance(handed, Handed)
        assert handed.layer is layer
        assert handed.fresh is fresh is handed.original
    buffer = weakref.ref(layer._keys)
    gc.disable()
    try:
        del layer, first, later, keys, handed
        assert buffer() is None
    finally:
        gc.enable()


def test_buffers_are_not_part_of_a_graph_of_gradients() -> None:
    layer = LokiLayer(TURN)
    k, v = (t.requires_grad_() for t in states(4))
    keys, values = layer.update(k, v)
    (keys.sum() + values.sum()).backward()
    assert k.grad is not None
    assert not layer.keys.requires_grad


def test_the_static_layer_holds_turned_keys_in_place() -> None:
    layer = StaticLokiLayer(12, TURN)
    for length, fresh in ((5, True), (1, False)):
        keys, values = layer.update(*states(length, length))
        assert keys.shape[2] == values.shape[2] == 12
        assert keys._loki.fresh is fresh
        assert keys._loki.length is None
    assert int(layer.get_seq_length()) == 6
    assert torch.allclose(layer.keys[:, :, :5], TURN.keys(states(5, 5)[0]), atol=1e-6)
    layer.reset()
    assert layer.update(*states(2))[0]._loki.fresh


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_the_cache_of_a_model_turns_full_layers_and_leaves_others(family: str) -> None:
    model = build(family)
    with pytest.raises(RequestError, match="not enabled"):
        LokiCache(model)
    enable(model, basis_of(family), skip_layers=[3])
    cache = LokiCache(model)
    kinds = [type(layer) for layer in cache.layers]
    other = DynamicLayer if family == "Llama" else DynamicSlidingWindowLayer
    first = LokiLayer if family == "Llama" else other
    assert kinds == [first, LokiLayer, first, DynamicLayer]
    copied = copy.deepcopy(cache)
    assert [type(layer) for layer in copied.layers] == kinds


@torch.no_grad()
def test_an_unrotated_cache_is_the_stock_one() -> None:
    model, ids = build("Gemma3Text"), tokens(2, 20)
    stock = model(input_ids=ids, use_cache=True).past_key_values
    logits = model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(stock)).logits
    with session(model, basis_of("Gemma3Text")):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert isinstance(cache, LokiCache)
    plain = cache.unrotate()
    assert [type(layer) for layer in plain.layers] == [type(layer) for layer in stock.layers]
    for mine, theirs in zip(plain.layers, stock.layers, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-5)
        assert torch.equal(mine.values, theirs.values)
    again = model(input_ids=ids[:, :1], past_key_values=plain).logits
    assert torch.allclose(again, logits, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_is_converted_and_turned_back() -> None:
    model, ids = build(), tokens(2, 20)
    stock = model(input_ids=ids, use_cache=True).past_key_values
    with session(model, basis_of("Llama"), k=1.0):
        out = model.generate(
            ids, max_new_tokens=2, cache_implementation="static", disable_compile=True, return_dict_in_generate=True
        )
    cache = out.past_key_values
    assert isinstance(cache, StaticCache)
    assert {type(layer) for layer in cache.layers} == {StaticLokiLayer}
    plain = unrotate(cache)
    assert not any(isinstance(layer, StaticLayer) for layer in plain.layers)
    for mine, theirs in zip(plain.layers, stock.layers, strict=True):
        assert mine.get_seq_length() == 21
        assert torch.allclose(mine.keys[:, :, :20], theirs.keys, atol=1e-5)
