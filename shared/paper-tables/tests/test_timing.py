"""Timing: turns and medians under a clock of our own; prefill and decode really run on the cache."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paper_tables import TableError, timing
from paper_tables.timing import Timed, decode, interleaved, prefill


class Clock:
    """Time that passes only when a variant runs: `durations` gives each variant's times, round by round."""

    def __init__(self, durations: dict[str, list[float]]) -> None:
        self.now, self.durations, self.order = 0.0, {name: list(times) for name, times in durations.items()}, []

    def variant(self, name: str):
        def run():
            self.order.append(name)
            self.now += self.durations[name].pop(0)

        return run


@pytest.fixture
def clock(monkeypatch):
    def make(**durations):
        made = Clock(durations)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
        return made

    return make


def test_the_speedup_is_the_median_of_the_ratios_within_rounds(clock):
    # the machine is three times slower in the third round: the ratio does not see it
    full, half = [2.0, 2.2, 6.0, 1.8], [1.0, 1.0, 3.0, 1.2]
    turns = clock(full=[9.0, *full], half=[9.0, *half])
    found = interleaved({name: turns.variant(name) for name in ("full", "half")}, rounds=4, warmup=1)
    ratios = sorted(a / b for a, b in zip(full, half))
    assert found["half"].seconds == pytest.approx(statistics.median(half))
    assert found["half"].speedup == pytest.approx(statistics.median(ratios))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    assert (found["half"].low, found["half"].high) == pytest.approx((low, high))
    assert found["half"].se == pytest.approx(1.2533 * (high - low) / 1.349 / 2)
    assert found["half"].figure == {"value": found["half"].speedup, "se": found["half"].se}
    assert (found["full"].speedup, found["full"].se, found["full"].rounds) == (1.0, 0.0, 4)


def test_the_order_turns_and_the_base_may_be_named(clock):
    turns = clock(a=[1.0] * 4, b=[2.0] * 4, c=[4.0] * 4)
    found = interleaved({name: turns.variant(name) for name in "abc"}, rounds=3, warmup=1, base="c")
    assert ["".join(turns.order[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert {name: t.speedup for name, t in found.items()} == {"a": 4.0, "b": 2.0, "c": 1.0}


def test_only_run_is_timed_and_it_gets_what_setup_made(clock):
    turns, seen = clock(setup=[5.0] * 3, run=[1.0] * 3), []

    def setup():
        turns.variant("setup")()
        return "prepared"

    def run(prepared):
        seen.append(prepared)
        turns.variant("run")()

    assert interleaved({"x": Timed(run, setup)}, rounds=2, warmup=1)["x"].seconds == 1.0
    assert seen == ["prepared"] * 3


def test_what_takes_no_time_by_the_clock_has_a_ratio_all_the_same(clock):
    turns = clock(a=[0.0] * 3, b=[0.0] * 3)
    assert interleaved({n: turns.variant(n) for n in "ab"}, rounds=3, warmup=0)["b"].speedup == 1.0


@pytest.mark.parametrize(
    ("variants", "options"),
    [({}, {}), ({"a": list}, {"base": "b"}), ({"a": list}, {"rounds": 0}), ({"a": list}, {"warmup": -1})],
    ids=["none", "base", "rounds", "warmup"],
)
def test_wrong_requests_say_what_is_accepted(variants, options):
    with pytest.raises(TableError, match=r"must be one of \[.*\], rounds at least 1 and warmup at least 0; got"):
        interleaved(variants, **options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def fed(model):
    """What the model is fed, call by call: (tokens, length of the cache before, logits computed)."""
    calls = []

    def before(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        calls.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    yield calls
    handle.remove()


def test_decoding_feeds_one_token_at_a_time_on_a_growing_cache(model, fed):
    ids = torch.arange(12).view(2, 6)
    timed = decode(model, ids, 4)
    prepared = timed.setup()
    assert fed == [(6, 0)]  # the prefill, before the clock starts
    tokens = timed.run(prepared)
    assert fed[1:] == [(1, 6), (1, 7), (1, 8), (1, 9)]
    assert tokens.shape == (2, 5)
    for step in range(5):  # the same as without any cache
        whole = torch.cat([ids, tokens[:, :step]], dim=1)
        with torch.no_grad():
            assert torch.equal(model(input_ids=whole, use_cache=False).logits[:, -1].argmax(-1), tokens[:, step])
    fed.clear()
    timed.run(timed.setup())  # every round has a cache of its own
    assert fed[:2] == [(6, 0), (1, 6)]


def test_prefill_fills_the_cache_and_computes_the_last_logits_only(model):
    out = prefill(model, torch.arange(10).view(1, 10)).run(None)
    assert out.past_key_values.get_seq_length() == 10
    assert out.logits.shape == (1, 1, 97)
