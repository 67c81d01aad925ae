"""Calibration: which keys are seen, and that batches, padding, order and processes do not matter."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import pytest
import torch
from loki import Basis, calibrate, enable
from loki.calibration import KeyStatistics, collect
from lokimodels import FAMILIES, LAYERS, build, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model_hooks import RequestError

IDS = tokens(6, 24, seed=7)


@torch.no_grad()
def cached_keys(model, ids) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """What a stock cache holds: the keys after the rotary embedding, [B, Hkv, T, D] a layer."""
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_after_rotary_are_those_of_the_cache(family: str) -> None:
    model = build(family)
    model.set_attn_implementation("eager")  # transformers' sdpa passes over Gemma2's softcap without a word
    found = collect(model, IDS)
    assert found.layers == tuple(range(LAYERS))  # sliding layers too: their rank is of interest
    for row, keys in enumerate(cached_keys(model, IDS)):
        rows = keys.transpose(0, 1).flatten(1, 2).double()
        assert torch.allclose(found.sums["outer"][row], rows.transpose(1, 2) @ rows, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_before_rotary_are_those_of_a_model_that_does_not_rotate(family: str) -> None:
    model = build(family)
    before, seen = collect(model, IDS, rotary="pre"), []
    attention = model.get_decoder().layers[0].self_attn
    # the first layer reads embeddings, so its projections (and norms) alone make its keys
    hook = attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    model(input_ids=IDS, use_cache=False)
    hook.remove()
    keys = attention.k_proj(seen[0]).unflatten(-1, (2, -1))
    keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
    rows = keys.flatten(0, 1).transpose(0, 1).double()
    assert torch.allclose(before.sums["outer"][0], rows.transpose(1, 2) @ rows, rtol=1e-5, atol=1e-4)
    assert int(before.sums["count"][0]) == IDS.numel()
    after = collect(model, IDS)
    # a rotation keeps lengths
    traces = [s.sums["outer"].diagonal(dim1=-2, dim2=-1).sum(-1) for s in (before, after)]
    assert torch.allclose(*traces, rtol=1e-5)
    assert not torch.allclose(before.sums["outer"], after.sums["outer"], rtol=1e-2)


def test_a_model_without_rotary_embedding_has_the_same_keys_before_and_after() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    before, after = (collect(model, IDS, rotary=rotary) for rotary in ("pre", "post"))
    assert torch.equal(before.sums["outer"], after.sums["outer"])
    assert int(before.sums["count"][0]) == IDS.numel()


@pytest.mark.parametrize("rotary", ["post", "pre"])
def test_neither_batches_nor_padding_matter(rotary: str) -> None:
    model = build()
    whole = collect(model, IDS, rotary=rotary, batch_size=6)
    split = collect(model, IDS, rotary=rotary, batch_size=1)
    assert torch.allclose(whole.sums["outer"], split.sums["outer"], rtol=1e-5, atol=1e-4)
    for side in ("left", "right"):
        pads = torch.zeros(6, 5, dtype=torch.long)
        ids = torch.cat([pads, IDS] if side == "left" else [IDS, pads], dim=1)
        mask = (ids != 0).long()
        padded = collect(model, ids, attention_mask=mask, rotary=rotary)
        assert torch.allclose(whole.sums["outer"], padded.sums["outer"], rtol=1e-4, atol=1e-3)
        assert torch.equal(whole.sums["count"], padded.sums["count"])
        mapped = collect(model, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, *ids[2:, None]], rotary=rotary)
        assert int(mapped.sums["count"][0]) == IDS[:2].numel() + ids[2:].numel()


def test_ragged_batches_and_single_sequences_are_read() -> None:
    found = collect(build(), [IDS[:2], IDS[2, :7], IDS[3:4, :11].tolist()])
    assert found.sums["count"].tolist() == [48 + 7 + 11] * LAYERS


def test_the_model_comes_back_as_it_was() -> None:
    model = build()
    model.train()
    enable(model, calibrate(model, IDS))
    calibrate(model, IDS, rotary="pre")
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any("_loki" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = build()
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[9, 0] = torch.inf
    with pytest.raises(RequestError, match="layer 2, KV head 1"):
        calibrate(model, IDS, rotary="pre")
    assert model.config._attn_implementation == "sdpa"
    assert not any("_loki" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def test_too_few_tokens_are_refused_and_few_warned_of() -> None:
    model = build()
    with pytest.raises(RequestError, match=r"7 tokens are too few.*8"):
        calibrate(model, IDS[:1, :7])
    with pytest.warns(UserWarning, match="24 tokens are few"):
        calibrate(model, IDS[:1])


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (IDS.float(), {}, "token ids"),
        (IDS + 97, {}, "not in the model's vocabulary"),
        (IDS, {"attention_mask": torch.ones(2, 2)}, "attention_mask has shape"),
        (IDS, {"rotary": "both"}, "rotary='both'"),
        ([], {}, "no batch held a token"),
    ],
)
def test_data_that_cannot_be_used_is_refused(data, changes, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        calibrate(build(), data, **changes)


def test_a_stopped_calibration_goes_on(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("model_hooks.watch.JOURNAL_SECONDS", 0.0)
    model, journal = build(), tmp_path / "journal"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, IDS, batch_size=1, journal=journal, progress=stop)
    steps: list[tuple[int, int]] = []
    resumed = calibrate(model, IDS, batch_size=1, journal=journal, progress=lambda d, t: steps.append((d, t)))
    assert steps == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert not journal.exists()
    assert torch.equal(resumed.components, calibrate(model, IDS, batch_size=1).components)


def test_layers_that_never_ran_are_left_out() -> None:
    found = KeyStatistics([0, 1, 2], 1, 4)
    found.see(1, torch.randn(1, 1, 9, 4), torch.ones(1, 9, dtype=torch.bool))
    kept = found.only(found.sums["count"] > 0)
    assert kept.layers == (1,)
    assert torch.equal(kept.sums["outer"][0], found.sums["outer"][1])


def test_state_of_a_large_model_stays_within_64_mb() -> None:
    found = KeyStatistics(range(32), 8, 128)
    state = sum(t.numel() * t.element_size() for t in found.sums.values())
    assert state < 40e6
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=128)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert isinstance(calibrate(model, tokens(4, 512)), Basis)
    tracemalloc.start()  # of Python's own: nothing is kept from batch to batch there
    collect(model, tokens(4, 64))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, json, loki; dir(loki); print(json.dumps([*{'torch', 'transformers'} & {*sys.modules}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
