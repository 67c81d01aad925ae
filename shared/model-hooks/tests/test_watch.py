"""Watching sees the residual stream as the model makes it, in any batch split, and leaves the model as it was."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import HIDDEN, LAYERS, VOCAB, build, ids, parent
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import calling, ranks
from torch import Tensor

from model_hooks import FingerprintMismatch, RequestError, UnsupportedArchitectureError, anatomy, drop
from model_hooks import watch as watching
from model_hooks.watch import ResidualWatcher, watch

LAYOUTS = ["llama", "gemma2", "olmo2", "phi", "gpt_neox", "gpt_neox_sequential", "mixtral", "granite", "falcon",
           "falcon_shared", "cohere", "gpt2", "opt", "deepseek_v3"]  # fmt: skip


class Sums(ResidualWatcher):
    """Of every unit: the sum over tokens of the stream before it, after it, and of their product."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.sums = {u: torch.zeros(layers, 3, HIDDEN, dtype=torch.float64) for u in ("attention", "mlp", "block")}
        self.seen: list[tuple[int, str]] = []

    def see(self, index: int, unit: Any, before: Tensor, after: Tensor, mask: Tensor) -> None:
        x, y = before[mask].double(), after[mask].double()
        self.sums[unit][index] += torch.stack([x.sum(0), y.sum(0), (x * y).sum(0)])
        self.seen.append((index, unit))


def watched(model: Any, sequences: Tensor, **options: Any) -> dict[str, Tensor]:
    watcher = Sums(len(anatomy(model).blocks))
    watch(model, sequences, watcher, **options)
    return watcher.sums


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, total in left.items():
        bound = tolerance * float(total.abs().max())
        assert float((right[name] - total).abs().max()) <= bound, name


@torch.no_grad()
def block_outputs(model: Any, sequences: Tensor) -> list[Tensor]:
    """Input of the first block, then the output of every block."""
    found: list[Tensor] = []
    blocks = [b.module for b in anatomy(model).blocks]
    hooks = [blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args or (kwargs.get("hidden_states"),))[0].clone()), with_kwargs=True
    )]  # fmt: skip
    for block in blocks:
        take = lambda _, __, out: found.append((out if isinstance(out, Tensor) else out[0]).clone())  # noqa: E731
        hooks.append(block.register_forward_hook(take))
    model(input_ids=sequences, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def reference(model: Any, sequences: Tensor) -> dict[str, Tensor]:
    """In float64, from whole models: what a block puts out when its feed-forward (its attention) has been dropped."""
    model = model.double()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    streams, parallel = block_outputs(model, sequences), anatomy(model).layout == "parallel"
    expected = Sums()
    mask = torch.ones_like(sequences, dtype=torch.bool)
    for i in range(LAYERS):
        middle = block_outputs(drop(copy.deepcopy(model), mlp=[i], check=False), sequences)[i + 1]
        expected.see(i, "attention", streams[i], middle, mask)
        if parallel:
            alone = block_outputs(drop(copy.deepcopy(model), attention=[i], check=False), sequences)[i + 1]
            expected.see(i, "mlp", streams[i], alone, mask)
        else:
            expected.see(i, "mlp", middle, streams[i + 1], mask)
        expected.see(i, "block", streams[i], streams[i + 1], mask)
    return expected.sums


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_stream_is_what_dropping_each_sublayer_shows_it_to_be(name: str) -> None:
    model, sequences = build(name).float(), ids(2, 9)
    assert_close(reference(copy.deepcopy(model), sequences), watched(model, sequences))


def test_units_come_in_the_order_in_which_they_end() -> None:
    watcher = Sums()
    watch(parent("llama"), ids(1, 5), watcher)
    assert watcher.seen == [(i, u) for i in range(LAYERS) for u in ("attention", "mlp", "block")]


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "phi", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("biased", [False, True])
def test_dropped_sublayers_are_not_seen_and_the_others_are_right(name: str, biased: bool) -> None:
    gone, constant = {(1, "attention"), (2, "mlp")}, torch.linspace(-1, 1, HIDDEN) * biased
    bias: Any = {(kind, i): constant for i, kind in gone} if biased else None
    model = drop(build(name), attention=[1], mlp=[2], bias=bias)
    watcher, sequences = Sums(), ids(2, 9)
    watch(model, sequences, watcher)
    kept = {(i, u) for i in range(LAYERS) for u in ("attention", "mlp", "block")} - gone
    assert set(watcher.seen) == kept
    streams = block_outputs(model, sequences)
    parallel = anatomy(model).layout == "parallel"
    for i, unit in ((1, "mlp"), (2, "attention")):  # what the constant adds is not the other sublayer's doing
        x, y = streams[i].flatten(0, 1).sum(0).double(), streams[i + 1].flatten(0, 1).sum(0).double()
        added = constant.double() * sequences.numel()
        before, after, _ = watcher.sums[unit][i]
        torch.testing.assert_close(after - before, y - x - added, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(before, x + (added if unit == "mlp" and not parallel else 0), atol=1e-3, rtol=1e-4)


@settings(max_examples=12)
@given(
    batch_size=st.integers(1, 7),
    order=st.permutations(range(5)),
    lengths=st.lists(st.integers(1, 8), min_size=5, max_size=5),
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_batches_order_and_padding_side_do_not_matter(
    name: str, batch_size: int, order: list[int], lengths: list[int]
) -> None:
    texts = [ids(1, n, seed=n)[0] for n in lengths]
    right, left = torch.zeros(5, 8, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)
    for row, text in enumerate(texts):
        right[row, : len(text)], left[row, 8 - len(text) :] = text, text
    alone = Sums()
    for text in texts:
        watch(parent(name), text[None], alone)
    for padded in (right, left):
        mask = (padded != 0).long()
        assert_close(
            alone.sums, watched(parent(name), padded[order], attention_mask=mask[order], batch_size=batch_size)
        )


def test_the_model_comes_back_as_it_was() -> None:
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    class Failing(Sums):
        def see(self, index: int, unit: Any, before: Tensor, after: Tensor, mask: Tensor) -> None:
            assert not torch.is_grad_enabled()
            assert not any(m.training for m in model.modules())
            if self.fails and index == 2:
                raise RuntimeError("stop")

    for fails in (False, True):
        watcher = Failing()
        watcher.fails = fails  # type: ignore[attr-defined]
        if fails:
            with pytest.raises(RuntimeError, match="stop"):
                watch(model, ids(2, 5), watcher)
        else:
            watch(model, ids(2, 5), watcher)
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert torch.is_grad_enabled()


def test_neither_head_nor_cache_costs_anything() -> None:
    model, calls = build("llama"), []
    watcher = Sums()
    inside = anatomy(model)  # its own pass runs the head once more
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    model.model.register_forward_hook(lambda _, __, out: calls.append(out.past_key_values))
    watch(model, ids(6, 5), watcher, batch_size=2)
    assert len(inside.blocks) == LAYERS
    assert calls.count("head") == 1
    assert calls[-3:] == [None, None, None]


@pytest.mark.parametrize(
    ("sequences", "mask", "says"),
    [
        (torch.zeros(0, 4, dtype=torch.long), None, r"shape \(0, 4\)"),
        (torch.zeros(4, dtype=torch.long), None, r"shape \(4,\)"),
        (torch.zeros(2, 4), None, r"torch.float32"),
        (torch.full((2, 4), VOCAB), None, rf"token id {VOCAB} is not in the model's vocabulary of {VOCAB}"),
        (torch.full((2, 4), -100), None, r"token id -100 is not in"),
        (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3), r"attention_mask has shape \(2, 3\)"),
        (torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4), r"every token of the data is padding"),
    ],
)
def test_wrong_data_is_one_clear_line(sequences: Tensor, mask: Tensor | None, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        watch(parent("llama"), sequences, Sums(), attention_mask=mask)
    assert "\n" not in str(caught.value)


def test_a_block_that_overwrites_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = type(model.model.layers[2]).forward

    def in_place(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states.copy_(forward(self, hidden_states.clone(), *args, **kwargs))

    layer = model.model.layers[2]
    watcher = Sums()
    original = watching.anatomy(model)
    layer.forward = in_place.__get__(layer)
    monkeypatch.setattr(watching, "anatomy", lambda _: original)
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.2 overwr"):
        watch(model, ids(1, 5), watcher)


class Stop(Exception):
    """Stands for a kill between two batches."""


def stop_after(batches: int) -> Any:
    def progress(done: int, of: int) -> None:
        if done == batches:
            raise Stop

    return progress


@pytest.fixture
def journalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal that a pass over `ids(7, 6)` in batches of 2 has left behind when it was stopped after two batches."""
    monkeypatch.setattr(watching, "JOURNAL_SECONDS", 0.0)
    path = tmp_path / "new folder" / "journal"
    with pytest.raises(Stop):
        watched(parent("llama"), ids(7, 6), batch_size=2, journal=path, progress=stop_after(2))
    return path


def test_a_stopped_pass_goes_on_and_ends_with_the_very_same_sums(journalled: Path) -> None:
    seen: list[tuple[int, int]] = []
    resumed = watched(parent("llama"), ids(7, 6), batch_size=2, journal=journalled, progress=lambda *a: seen.append(a))
    whole = watched(parent("llama"), ids(7, 6), batch_size=2)
    assert seen == [(3, 4), (4, 4)]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert list(journalled.parent.iterdir()) == []


@pytest.mark.parametrize("changed", ["model", "data", "settings"])
def test_a_journal_of_something_else_is_refused(journalled: Path, changed: str) -> None:
    model, sequences, watcher = build("llama"), ids(7, 6), Sums()
    if changed == "model":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    elif changed == "data":
        sequences[6, 5] = 3 + (sequences[6, 5] - 2) % (VOCAB - 3)
    else:
        watcher.sums["more"] = torch.zeros(1, dtype=torch.float64)
    before = journalled.read_bytes()
    with pytest.raises(FingerprintMismatch, match=f"of other {changed} "):
        watch(model, sequences, watcher, batch_size=2, journal=journalled)
    assert journalled.read_bytes() == before


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(RequestError, match=r"notes\.txt is not a journal"):
        watch(parent("llama"), ids(1, 4), Sums(), journal=path)
    assert path.read_text() == "mine"


def one_of(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    results = [watched(parent("llama"), ids(n, 6), batch_size=2, journal=Path(folder) / "journal") for n in (5, 1)]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_sums_of_all_the_data(tmp_path: Path) -> None:
    ranks("-c", calling(__file__, f"one_of(rank, 2, {str(tmp_path)!r})"), log=tmp_path / "log").finish()
    for rank in (0, 1):
        for result, samples in zip(torch.load(tmp_path / f"{rank}.pt"), (5, 1), strict=True):
            assert_close(watched(parent("llama"), ids(samples, 6)), result, 1e-6)
    assert not list(tmp_path.glob("journal*"))
