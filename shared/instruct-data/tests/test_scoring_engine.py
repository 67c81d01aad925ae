"""The engine as a whole: budgets, order, shards, memory that runs out, runs that go on."""

from __future__ import annotations

import copy
import gc
import json
import random
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scoring_reference as reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.scoring import SCHEMA, Pair, Scores, merge, score
from instruct_data.scoring.batches import plan, tune
from instruct_data.scoring.losses import Losses
from instruct_data.scoring.shards import Cost, Shard, cost_of, share_out
from model_hooks import FingerprintMismatch, RequestError

PAIRS = reference.some_pairs(90)


def run(pairs: Any = PAIRS, model: Any = None, **options: Any) -> Scores:
    options = {"max_length": 128, **options}
    return score(model or reference.model(), reference.tokenizer(), pairs, **options)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(run())


def near(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Equal but for 1e-5 nats a token; None in the same places."""
    for row, other in zip(found, expected, strict=True):
        for name in row:
            if not isinstance(row[name], float):
                assert row[name] == other[name], (name, row, other)
        for side in ("cond", "direct"):
            a, b = row[f"loss_{side}_sum"], other[f"loss_{side}_sum"]
            assert a is None or abs(a - b) <= 1e-5 * row[f"n_{side}"]
    return True


def selection(rows: list[dict[str, Any]]) -> list[str]:
    scored = [row for row in rows if row["ifd_ppl"] is not None and row["ifd_ppl"] < 1]
    return [row["key"] for row in sorted(scored, key=lambda row: -row["ifd_ppl"])]


def test_rows_come_in_input_order_with_the_promised_columns() -> None:
    scores = run()
    table = scores.table()
    assert table.schema == SCHEMA
    assert table["key"].to_pylist() == [pair.key for pair in PAIRS]
    assert len(scores) == len(PAIRS) == scores.facts["total"]
    json.dumps([list(scores), scores.facts], allow_nan=False)


@pytest.mark.parametrize("budget", [1, 256, 512, 2048, 8192, "auto"])
def test_the_selection_does_not_depend_on_the_budget(rows: list[dict[str, Any]], budget: Any) -> None:
    found = list(run(budget=budget))
    assert near(found, rows)
    assert selection(found) == selection(rows)


def test_equal_settings_give_equal_bits_and_order_does_not_matter(rows: list[dict[str, Any]]) -> None:
    assert list(run()) == rows
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    by_key = {row["key"]: row for row in run(shuffled)}
    assert [by_key[row["key"]] | {"index": row["index"]} for row in rows] == rows


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_join_to_the_same_scores(tmp_path: Path, rows: list[dict[str, Any]], world: int) -> None:
    for rank in range(world):
        part = run(folder=tmp_path, rank=rank, world=world)
        if rank < world - 1:
            with pytest.raises(RequestError, match=f"lacks the scores of ranks {rank + 1}.* of {world}"):
                merge(tmp_path, world)
    joined = merge(tmp_path)
    assert near(list(joined), rows)
    assert selection(list(joined)) == selection(rows)
    assert len(joined) == len(PAIRS)
    assert joined.facts["forwarded"] >= part.facts["forwarded"]


def test_ranks_come_from_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(folder=tmp_path).folder == tmp_path / "scores-1-of-3"
    with pytest.raises(RequestError, match="rank 1 of 3 needs a folder"):
        run()
    with pytest.raises(RequestError, match="rank 4 of 4 does not exist"):
        run(folder=tmp_path, rank=4, world=4)
    with pytest.raises(RequestError, match="together"):
        run(rank=0)


def test_ranks_of_other_input_are_not_merged(tmp_path: Path) -> None:
    run(folder=tmp_path, rank=0, world=2)
    run(PAIRS[:-1], folder=tmp_path, rank=1, world=2)
    with pytest.raises(FingerprintMismatch, match=r"ranks 0 and 1 of .* another input"):
        merge(tmp_path)
    with pytest.raises(RequestError, match="holds scores none"):
        merge(tmp_path / "empty")


def test_several_windows_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("shards", "engine", "results"):
        monkeypatch.setattr(f"instruct_data.scoring.{module}.WINDOW", 7)
    for rank in range(3):
        run(folder=tmp_path, rank=rank, world=3)
    assert [row["key"] for row in merge(tmp_path)] == [pair.key for pair in PAIRS]


def test_shards_are_balanced_in_tokens() -> None:
    """Counted with the true tokens and the model's true cost, not with the bytes the shares are made by."""
    pairs, tokenizer = reference.some_pairs(3000, seed=5), reference.tokenizer()
    cost = cost_of(reference.model(), 128)
    loads = []
    for rank in range(4):
        own = [pair for _, pair in Shard(pairs, rank, 4, cost)]
        lengths = [(len(tokenizer.encode(p.prompt)), len(tokenizer.encode(p.response))) for p in own]
        loads.append(sum(cost.segment(p + r, r) + cost.segment(r, r) for p, r in lengths))
    assert max(loads) / (sum(loads) / 4) <= 1.03


@given(costs=st.lists(st.floats(0, 100), max_size=60), world=st.integers(1, 5))
def test_longest_first_is_within_its_bound(costs: list[float], world: int) -> None:
    """Graham: at most 4/3 - 1/(3 world) of the optimum, which is at least the mean and the largest."""
    loads = [0.0] * world
    owners = share_out(costs, loads)
    assert len(owners) == len(costs)
    assert loads == pytest.approx([sum(c for c, o in zip(costs, owners) if o == rank) for rank in range(world)])
    ordered = sorted(costs, reverse=True)
    least = max([sum(costs) / world, *ordered[:1], *(ordered[world - 1] + ordered[world] for _ in ordered[world:][:1])])
    assert max(loads) <= (4 / 3 - 1 / (3 * world)) * least + 1e-9


def test_cost_counts_what_a_pair_costs() -> None:
    cost = Cost(hidden_size=10, head=2.0, max_length=100)
    assert cost(40, 20) == pytest.approx(15 * (1 + 15 / 60) + 5 * 2 + 5 * (1 + 5 / 60) + 5 * 2)
    assert cost(10**9, 10**9) == cost.segment(100, 0) + cost.segment(0, 0)


@given(lengths=st.lists(st.integers(2, 50), max_size=60), budget=st.integers(1, 300))
def test_batches_cover_all_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    ordered = np.array(sorted(lengths, reverse=True), np.int64)
    for batching in ("padded", "equal_length", "one_by_one"):
        made = list(plan(ordered, budget, batching))  # type: ignore[arg-type]
        assert [place for batch in made for place in batch] == list(range(len(ordered)))
        for batch in made:
            assert len(batch) == 1 or len(batch) * ordered[batch.start] <= budget
            if batching == "equal_length":
                assert len(set(ordered[batch.start : batch.stop])) == 1
            assert batching != "one_by_one" or len(batch) == 1


@pytest.mark.parametrize(
    ("seconds_of", "best"),
    [
        (lambda rows, tokens: 1.0 * rows, {1}),  # batches gain nothing
        (lambda rows, tokens: 1e-4 + 1e-9 * tokens, {2048}),
        (lambda rows, tokens: 1e-4 + 1e-9 * tokens + (1.0 if tokens > 600 else 0.0), {512}),
        (lambda rows, tokens: 3.0 + tokens, {1}),  # too slow for another trial
    ],
)
def test_the_tuned_budget_is_never_slower_than_one_by_one(seconds_of: Any, best: set[int]) -> None:
    lengths, now = np.full(400, 20, np.int64), [0.0]

    def forward(places: Any) -> None:
        now[0] += seconds_of(len(places), 20 * len(places))

    assert tune(lengths, forward, (256, 512, 1024, 2048), 5.0, clock=lambda: now[0]) in best
    assert now[0] <= 5.0 or best == {1}


def test_an_automatic_budget_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(folder=tmp_path, budget="auto").facts["budget"]
    monkeypatch.setattr("instruct_data.scoring.forward.tune", lambda *a: pytest.fail("measured again"))
    assert run(PAIRS + reference.some_pairs(5, seed=9), folder=tmp_path, budget="auto").facts["budget"] == first


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_memory_that_runs_out_halves_the_batch(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, refused = Losses.__call__, []

    def limited(self: Losses, segments: Any, *parts: Any) -> Any:
        if len(segments) * max(len(s.ids) for s in segments) > 300 and len(segments) > 1:
            refused.append(len(segments))
            raise error
        return real(self, segments, *parts)

    monkeypatch.setattr(Losses, "check", lambda *a: None)
    monkeypatch.setattr(Losses, "__call__", limited)
    found = run(budget=2048)
    assert near(list(found), rows)
    assert found.facts["failed"] == 0
    assert 1 <= len(refused) <= 6  # what was too much once is not tried again


def test_a_record_that_never_fits_fails_alone_and_is_tried_again(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Losses.__call__
    longest = max(row["n_cond"] for row in rows)

    def limited(self: Losses, segments: Any, *parts: Any) -> Any:
        if any(segment.targets == longest for segment in segments):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, segments, *parts)

    with monkeypatch.context() as patched:
        patched.setattr(Losses, "check", lambda *a: None)
        patched.setattr(Losses, "__call__", limited)
        found = run(folder=tmp_path)
    failed = [row for row in found if row["status"] == "failed"]
    assert failed
    assert found.facts["failed"] == len(failed)
    assert all(row["n_cond"] == longest and row["loss_cond_sum"] is row["ifd_ppl"] is None for row in failed)
    good = [row for row in found if row["status"] != "failed"]
    assert near(good, [row for row in rows if row["index"] in {g["index"] for g in good}])
    again = run(folder=tmp_path)
    assert near(list(again), rows)
    assert 0 < again.facts["forwarded"] <= 2 * len(failed)


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Losses, segments: Any, *parts: Any) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(Losses, "check", lambda *a: None)
    monkeypatch.setattr(Losses, "__call__", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run()


def test_a_second_run_forwards_nothing_and_a_longer_input_only_the_rest(tmp_path: Path) -> None:
    first = run(folder=tmp_path)
    before = list(first)
    second = run(folder=tmp_path)
    assert list(second) == before
    assert second.facts["forwarded"] == 0
    assert (second.facts["how"], second.facts["budget"]) == (first.facts["how"], first.facts["budget"])
    longer = run([*PAIRS, Pair("new", "not seen before\n", "an answer of some words")], folder=tmp_path)
    assert longer.facts["forwarded"] == 2
    assert list(longer)[:-1] == before
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"compat": "aligned"}, "compat: 'original' there, 'aligned' now"),
        ({"max_length": 100}, "max_length: 128 there, 100 now"),
        ({"settings": {"template": "chat"}}, "template: 'none' there, 'chat' now"),
        ({"model": "other"}, "model: "),
        ({"model": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' now"),
    ],
)
def test_going_on_with_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    run(PAIRS[:3], folder=tmp_path, settings={"template": "none"})
    if changes.get("model") == "other":
        changes = {"model": reference.model(seed=1)}
    elif changes.get("model") == "bfloat16":
        changes = {"model": copy.deepcopy(reference.model()).to(torch.bfloat16)}
    with pytest.raises(FingerprintMismatch, match=field):
        run(PAIRS[:3], folder=tmp_path, **{"settings": {"template": "none"}, **changes})


@pytest.mark.parametrize(("room", "journalled"), [(3_000, False), (50_000, True)])
def test_a_full_disk_is_named_and_the_run_goes_on_later(tmp_path: Path, room: int, journalled: bool) -> None:
    """The kernel refuses, by a limit on the size of files: those of the tokens first, with more room the journal."""
    pairs = [Pair(f"r{i}", f"{i}\n", f"a {i} b") for i in range(300)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path)):
            run(pairs, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("scores-*"))
    later = run(pairs, folder=tmp_path)
    assert list(later) == list(run(pairs))
    assert (later.facts["journalled"] > 0) == journalled


def test_progress_counts_tokens_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    facts = run(progress=lambda done, total: seen.append((done, total))).facts
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (facts["tokens"], facts["tokens"])


def test_the_activation_is_put_back_and_gives_the_models_numbers() -> None:
    from transformers.activations import NewGELUActivation

    model = reference.model()
    run(PAIRS[:3], model)
    activations = [m for m in model.modules() if isinstance(m, NewGELUActivation)]
    assert activations
    assert not any("forward" in m.__dict__ for m in activations)
    x = torch.linspace(-8, 8, 4001)
    assert torch.allclose(activations[0](x), torch.nn.functional.gelu(x, approximate="tanh"), atol=2e-6)


def test_no_pairs_give_no_rows() -> None:
    assert list(run([])) == []
    assert [row["status"] for row in run([Pair("a", "x\n", "")])] == ["empty_response"]


@pytest.mark.slow
def test_memory_grows_by_tables_and_not_by_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instruct_data.journal_index.RECENT", 256)
    monkeypatch.setattr("instruct_data.scoring.shards.WINDOW", 256)
    monkeypatch.setattr("instruct_data.scoring.engine.WINDOW", 256)
    monkeypatch.setattr(Losses, "check", lambda *a: None)
    monkeypatch.setattr(
        Losses, "__call__", lambda self, segments, *parts: np.array([float(s.targets) for s in segments])
    )

    def peak(count: int) -> int:
        pairs = (Pair(f"r{i}", f"{i} " + "word " * 15 + "\n", f"{i} " + "other " * 15) for i in range(count))
        gc.collect()  # what other tests left may log its end, with source lines
        tracemalloc.start()
        scores = run(pairs)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(scores) == count
        return found

    peak(300)
    assert (peak(6000) - peak(2000)) / 4000 <= 400
