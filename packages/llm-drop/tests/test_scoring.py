"""Scores equal a naive reference that keeps everything in float64, however the data is cut, and survive kills."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_drop.repair import apply
from llm_drop.scoring import FORMAT, Scores, data_fingerprint, score
from llm_drop.selection import plan_of, select
from processes import calling, ranks, started
from torch import Tensor

from model_hooks import FingerprintMismatch, RequestError, drop, fingerprint, watch
from paper_tables.memory import peak_tensor_bytes

VOCAB, HIDDEN, LAYERS = 97, 32, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "pad_token_id": 0,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# config class, its changes, and the modules whose outputs are what attention and MLP add
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("LlamaConfig", {}, "self_attn", "mlp"),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 4, "num_key_value_heads": 2},
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": ("Olmo2Config", {}, "post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("PhiConfig", {}, "self_attn", "mlp"),
    "gpt_neox": ("GPTNeoXConfig", {}, "attention", "mlp"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 2}, "self_attn", "mlp"),
}
PARALLEL = {"phi", "gpt_neox"}
KINDS = ("attention", "mlp", "block")


@cache
def model_of(name: str) -> Any:
    """A tiny model with weights wide enough that every sublayer turns the stream. Not to be changed."""
    config, changes, _, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.copy_(noise * 0.15) if parameter.dim() > 1 else parameter.add_(noise * 0.05)
    return model.eval()


def fresh(name: str = "llama") -> Any:
    import copy

    return copy.deepcopy(model_of(name))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def streams(name: str, sequences: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(before, after) of every unit, [N, H] float64, from a float64 copy and the module names of the family."""
    _, _, attention, mlp = FAMILIES[name]
    model = fresh(name).double()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    stack = model.gpt_neox.layers if name == "gpt_neox" else model.model.layers
    kept: dict[str, list[Tensor]] = {"x": [], "a": [], "m": [], "y": []}

    def keep(what: str) -> Any:
        return lambda _, args, out: kept[what].append((out if isinstance(out, Tensor) else out[0]).reshape(-1, HIDDEN))

    for layer in stack:
        layer.register_forward_pre_hook(lambda _, args: kept["x"].append(args[0].reshape(-1, HIDDEN)))
        layer.register_forward_hook(keep("y"))
        layer.get_submodule(attention).register_forward_hook(keep("a"))
        layer.get_submodule(mlp).register_forward_hook(keep("m"))
    model(input_ids=sequences, use_cache=False)
    rows = list(zip(kept["x"], kept["a"], kept["m"], kept["y"], strict=True))
    base = [x if name in PARALLEL else x + a for x, a, _, _ in rows]
    return {
        "attention": [(x, x + a) for x, a, _, _ in rows],
        "mlp": [(b, b + m) for b, (_, _, m, _) in zip(base, rows, strict=True)],
        "block": [(x, y) for x, _, _, y in rows],
    }


def cos(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def assert_close(left: Scores, right: Scores, tolerance: float = 1e-5) -> None:
    for kind in KINDS:
        assert dict(getattr(left, kind)) == pytest.approx(getattr(right, kind), abs=tolerance)
        assert dict(left.ratio[kind]) == pytest.approx(right.ratio[kind], rel=tolerance)
    assert left.tokens == right.tokens
    for mine, theirs in zip(left.gaps, right.gaps, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)
    for unit, mean in left.deltas.items():
        torch.testing.assert_close(mean, right.deltas[unit], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_measure_equals_the_naive_reference(name: str) -> None:
    sequences = ids(5, 11)
    found, expected = score(model_of(name), sequences, batch_size=2, groups=3), streams(name, sequences)
    for kind in KINDS:
        for i, (x, y) in enumerate(expected[kind]):
            assert getattr(found, kind)[i] == pytest.approx(float(cos(x, y).mean()), abs=1e-5)
            assert found.ratio[kind][i] == pytest.approx(
                float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5
            )
            by_sample = cos(x, y).reshape(5, 11).sum(1)
            groups = [float(by_sample[g::3].sum()) for g in range(3)]
            assert found.group_sums[kind][i] == pytest.approx(groups, abs=1e-4)
            if kind != "block":
                torch.testing.assert_close(found.deltas[kind, i].double(), (y - x).mean(0), atol=1e-5, rtol=1e-4)
    assert found.group_tokens == [22, 22, 11]
    assert found.tokens == 55
    states = [expected["block"][0][0], *(y for _, y in expected["block"])]
    for i in range(LAYERS):
        gaps = [float(cos(states[i], states[j]).mean()) for j in range(i + 1, LAYERS + 1)]
        assert found.gaps[i] == pytest.approx(gaps, abs=1e-5)


@settings(max_examples=15)
@given(
    batch_size=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    left=st.booleans(),
)
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_neither_batches_nor_order_nor_padding_matter(
    name: str, batch_size: int, lengths: list[int], order: list[int], left: bool
) -> None:
    texts = [ids(1, n, seed=n)[0] for n in lengths]
    padded = torch.zeros(5, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, 9 - len(text) :] = text if left else 0
        padded[row, : len(text)] = padded[row, : len(text)] if left else text
    padded = padded[order]
    found = score(model_of(name), padded, attention_mask=padded != 0, batch_size=batch_size, groups=1)
    parts = [score(model_of(name), text[None], groups=1) for text in texts]
    for kind in KINDS:
        for i in range(LAYERS):
            mean = sum(p.group_sums[kind][i][0] for p in parts) / sum(lengths)
            assert getattr(found, kind)[i] == pytest.approx(mean, abs=1e-5)
    for i in range(LAYERS):
        means = [sum(p.gaps[i][g] * p.tokens for p in parts) / sum(lengths) for g in range(LAYERS - i)]
        assert found.gaps[i] == pytest.approx(means, abs=1e-5)


@torch.no_grad()
def test_a_planted_identity_block_has_similarity_one_and_goes_first() -> None:
    model, sequences = fresh(), ids(4, 12)
    model.model.layers[2].self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    found = score(model, sequences)
    for kind in KINDS:
        assert getattr(found, kind)[2] == pytest.approx(1, abs=1e-6)
        assert found.ratio[kind][2] == 0
    assert select(found, blocks=1).units == (("attention", 2), ("mlp", 2))
    before = model(input_ids=sequences).logits
    torch.testing.assert_close(
        drop(model, attention=[2], mlp=[2])(input_ids=sequences).logits, before, atol=1e-5, rtol=0
    )


def test_dropped_units_have_no_score_and_keep_the_others_numbers() -> None:
    model = drop(fresh(), attention=[0, 2], mlp=[1, 2])
    found = score(model, ids(3, 8))
    assert [sorted(getattr(found, kind)) for kind in KINDS] == [[1, 3], [0, 3], [0, 1, 3]]
    assert sorted(found.deltas) == [("attention", 1), ("attention", 3), ("mlp", 0), ("mlp", 3)]
    assert (found.num_layers, list(found.gaps)) == (LAYERS, [])
    assert found.block[0] == pytest.approx(found.mlp[0], abs=1e-12)
    plan = plan_of([("block", 0), ("block", 1)], found, "two blocks of which each has lost a half")
    assert plan.units == (("attention", 1), ("mlp", 0))
    assert apply(model, plan).config.lean["dropped_mlp"] == [0, 1, 2]


def test_memory_does_not_grow_with_the_data() -> None:
    """The most bytes of tensors alive at once, counted where tensors are made."""
    model = model_of("llama")

    def peak(samples: int) -> int:
        sequences = ids(samples, 32)
        return peak_tensor_bytes(lambda: score(model, sequences, batch_size=8))

    few = max(peak(16) for _ in range(4))  # when a tensor is freed is not the same in every pass
    assert few > (LAYERS + 1) * 8 * 32 * HIDDEN * 4  # the states of one batch
    assert peak(256) <= 1.05 * few


@pytest.mark.parametrize(("unit", "name"), [("mlp", "mlp 1"), ("attention", "attention 1")])
def test_the_unit_that_overflows_is_named(unit: str, name: str) -> None:
    model = fresh()
    layer = model.model.layers[1]
    module = layer.mlp if unit == "mlp" else layer.self_attn.o_proj
    module.register_forward_hook(lambda _, args, out: out * float("inf") if args[0].shape[1] > 6 else out)
    with pytest.raises(RequestError, match=f"^{name} turned the residual stream into nan: .* in float32") as caught:
        score(model, ids(2, 7))  # the six tokens of `anatomy` are too short to show it
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (7,)])
def test_no_data_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="calibration data has shape"):
        score(model_of("llama"), torch.zeros(shape, dtype=torch.long))


def test_a_file_gives_back_what_was_measured_and_knows_what_on(tmp_path: Path) -> None:
    model, sequences = model_of("llama"), ids(3, 8)
    found = score(model, sequences, name="tiny", data="random")
    path = found.save(tmp_path / "scores.json")
    again = Scores.load(path)
    assert again == found
    assert again.versions["torch"] == torch.__version__
    assert again.dtype == "float32"
    assert all(torch.equal(again.deltas[u], d) for u, d in found.deltas.items())
    assert len(again.deltas) == 2 * LAYERS
    assert again.check(model=fingerprint(model), data=data_fingerprint(sequences)) is again
    with pytest.raises(FingerprintMismatch, match=r"of another model: made on tiny"):
        again.check(model=fingerprint(model_of("phi")))
    with pytest.raises(FingerprintMismatch, match=r"of another data: made on random"):
        again.check(data=data_fingerprint(ids(3, 8, seed=1)))
    half = torch.ones(3, 8)
    half[0, :4] = 0
    assert data_fingerprint(sequences, half) != data_fingerprint(sequences)
    with pytest.raises(RequestError, match="exists already"):
        found.save(path)
    (tmp_path / "scores.safetensors").write_bytes(b"of another run")
    assert Scores.load(path).deltas == {}  # never those of other scores
    assert found.save(path, overwrite=True) == path
    assert Scores.load(path).deltas


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[1]", b'{"format": "llm-drop scores 0"}'])
def test_a_file_that_is_not_scores_is_one_clear_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=r"scores\.json: (no such file|not a scores file)") as caught:
        Scores.load(path)
    assert "\n" not in str(caught.value)


def killed(folder: str) -> None:
    """What a fresh process runs: a pass of four batches that is killed, for good, after two."""
    watch.JOURNAL_SECONDS = 0.0

    def progress(done: int, of: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    score(model_of("llama"), ids(8, 9), batch_size=2, journal=Path(folder) / "journal", progress=progress)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_scores(tmp_path: Path) -> None:
    stopped = started("-c", calling(__file__, f"killed({str(tmp_path)!r})"), log=tmp_path / "log")
    assert stopped.wait() == -signal.SIGKILL, stopped.said
    journal, batches = tmp_path / "journal", []
    with pytest.raises(FingerprintMismatch, match="of other data"):
        score(model_of("llama"), ids(8, 9, seed=1), batch_size=2, journal=journal)
    with pytest.raises(FingerprintMismatch, match="of other model"):
        score(model_of("phi"), ids(8, 9), batch_size=2, journal=journal)
    with pytest.raises(FingerprintMismatch, match="of other settings"):
        score(model_of("llama"), ids(8, 9), batch_size=2, groups=4, journal=journal)
    again = score(model_of("llama"), ids(8, 9), batch_size=2, journal=journal, progress=lambda *a: batches.append(a))
    whole = score(model_of("llama"), ids(8, 9), batch_size=2)
    assert batches == [(3, 4), (4, 4)]
    assert not journal.exists()
    assert again == whole
    assert all(torch.equal(again.deltas[u], d) for u, d in whole.deltas.items())


def one_of(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    score(model_of("llama"), ids(5, 9), batch_size=2, groups=3).save(f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    ranks("-c", calling(__file__, f"one_of(rank, {str(tmp_path)!r})"), log=tmp_path / "log").finish()
    alone = score(model_of("llama"), ids(5, 9), batch_size=2, groups=3)
    for rank in (0, 1):
        together = Scores.load(tmp_path / f"{rank}.json")
        assert_close(alone, together, 1e-6)
        assert together.group_tokens == alone.group_tokens
        assert together.samples == 5
        for kind in KINDS:  # samples keep their group whichever process runs them
            for i, sums in alone.group_sums[kind].items():
                assert together.group_sums[kind][i] == pytest.approx(sums, abs=1e-5)
    assert json.loads((tmp_path / "0.json").read_text())["format"] == FORMAT


def test_broken_weights_are_named_and_not_taken_for_an_unknown_architecture() -> None:
    model = fresh()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(RequestError, match=r"block 1 .*: mlp gives numbers that are not finite in torch.float32"):
        score(model, ids(2, 7))
