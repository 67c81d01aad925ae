"""Scores equal brute force, selections obey their rules, and what a plan says is what the model becomes."""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_compress import Plan, Scores, apply, repair_routers, score, select_blocks, select_experts, select_layers
from moe_compress.scores import METRICS, Experts, score_layerwise
from moe_compress.trimming import expert_counts, is_stock, sample_outputs
from moemodels import FAMILIES, build, logits
from processes import calling, ranks

from model_hooks import Card, FingerprintMismatch, RequestError, anatomy, fingerprint, load, save
from model_hooks.experts import moe_layers, routed_output


@pytest.fixture(scope="module")
def scores(sequences: torch.Tensor) -> Scores:
    return score(build(), sequences, name="tiny", data="random", reconstruction_tokens=64)


def test_scores_equal_brute_force(scores: Scores, sequences: torch.Tensor) -> None:
    """Every expert of layer 2 by hand, in float64, on the inputs that the layer gets."""
    model = build()
    caught: dict[str, Any] = {}
    block = model.model.layers[2]
    block.mlp.register_forward_pre_hook(lambda m, args: caught.update(x=args[0]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: caught.update(stream=args[0]))
    block.register_forward_hook(lambda m, args, out: caught.update(out=out))
    with torch.no_grad():
        model(sequences)
    x = caught["x"].flatten(0, 1).double()
    probabilities = (x @ block.mlp.gate.weight.double().T).softmax(-1)
    top, chosen = probabilities.topk(2, -1)
    gates = torch.zeros_like(probabilities).scatter(1, chosen, top / top.sum(-1, keepdim=True))
    outputs = torch.stack([expert(block.mlp.experts, e, x) for e in range(8)], 1)  # [N, E, d]
    whole = (gates[..., None] * outputs).sum(1)
    found = scores.experts[2]
    routed = gates > 0
    importance = {
        "gate": probabilities.mean(0),
        "freq": routed.double().mean(0),
        "reap": (gates * outputs.norm(dim=-1)).sum(0) / routed.sum(0),
        "norm": (routed * outputs.norm(dim=-1)).mean(0),
        "output-cos": torch.stack([
            (1 - F.cosine_similarity(whole, whole - gates[:, e, None] * outputs[:, e], dim=-1))[routed[:, e]].mean()
            for e in range(8)
        ]),
    }  # fmt: skip
    assert found.count == routed.sum(0).tolist()
    for metric, value in importance.items():
        torch.testing.assert_close(
            torch.tensor(found.importance(metric, scores.tokens)).double(), value, atol=1e-4, rtol=1e-4
        )
    similarity = F.cosine_similarity(caught["stream"].double(), caught["out"].double(), dim=-1).mean()
    assert scores.mlp[2] == pytest.approx(float(similarity), abs=1e-5)


def expert(bank: Any, e: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ bank.gate_up_proj[e].double().T).chunk(2, -1)
    return (F.silu(gate) * up) @ bank.down_proj[e].double().T


def scored(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    score(build(), odd_data(), batch_size=2).save(f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


def odd_data() -> torch.Tensor:
    """A number of sequences that two processes cannot share evenly."""
    return torch.randint(16, 2048, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
def test_two_processes_and_other_batches_score_and_choose_alike(tmp_path: Path) -> None:
    ranks("-c", calling(__file__, f"scored(rank, {str(tmp_path)!r})"), log=tmp_path / "log").finish()
    alone = score(build(), odd_data(), batch_size=5)
    for rank in (0, 1):
        found = Scores.load(tmp_path / f"{rank}.json")
        assert (found.tokens, found.samples) == (alone.tokens, alone.samples) == (120, 5)
        for block, experts in alone.experts.items():
            assert found.experts[block].count == experts.count
            for metric in METRICS[:-1]:
                mine, theirs = (e.importance(metric, 120) for e in (found.experts[block], experts))
                assert mine == pytest.approx(theirs, abs=1e-5)
        for choose in (lambda s: select_experts(s, 5, scope="global"), lambda s: select_layers(s, 2),
                       lambda s: select_blocks(s, 2, consecutive=True)):  # fmt: skip
            assert choose(found) == replace(choose(alone), model=found.model)


def test_reconstruction_is_what_sliced_models_lose(scores: Scores, sequences: torch.Tensor) -> None:
    model = build()
    _, x, y = sample_outputs(model, sequences, 64)[1]
    for gone in range(8):
        trial = copy.deepcopy(model)
        apply(trial, Plan(keep={1: tuple(e for e in range(8) if e != gone)}))
        sliced = next(m for m in moe_layers(anatomy(trial)) if m.block == 1)
        with torch.no_grad():
            error = (routed_output(sliced, x) - y).square().sum() / y.square().sum()
        assert scores.experts[1].reconstruction[gone] == pytest.approx(float(error), rel=1e-4)


def test_deepseek_counts_the_weights_of_chosen_experts_alone(sequences: torch.Tensor) -> None:
    model = build("deepseek_v2")
    found = score(model, sequences)
    assert set(found.experts) == {1, 2, 3}
    assert 0 not in select_layers(found, 2).layers  # its first block is dense
    weights = {}
    model.model.layers[1].mlp.gate.register_forward_hook(lambda m, a, out: weights.update(w=out[1], i=out[2]))
    with torch.no_grad():
        model(sequences)
    by_hand = torch.zeros(8).index_add_(0, weights["i"].flatten(), weights["w"].flatten())
    torch.testing.assert_close(torch.tensor(found.experts[1].gate), by_hand, rtol=1e-4, atol=1e-4)


def test_streamed_scores_and_padded_batches_are_the_same(scores: Scores, sequences: torch.Tensor, folder: Path) -> None:
    streamed = score_layerwise(str(folder), sequences, data="random", batch_size=3)
    padded = torch.cat([torch.ones(8, 5, dtype=torch.long), sequences], 1)
    mask = torch.cat([torch.zeros(8, 5), torch.ones(8, 32)], 1)
    masked = score(build(), padded, attention_mask=mask, batch_size=5)
    assert streamed.fingerprint == scores.fingerprint
    for other in (streamed, masked):
        assert other.tokens == scores.tokens
        assert other.mlp == pytest.approx(scores.mlp, abs=1e-5)
        for block, found in other.experts.items():
            assert found.count == scores.experts[block].count
            assert found.weighted_norm == pytest.approx(scores.experts[block].weighted_norm, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trimmed_saved_and_generates(family: str, sequences: torch.Tensor, tmp_path: Path) -> None:
    model = build(family)
    found = score(model, sequences)
    plans = [select_experts(found, 4), select_layers(found, 1), select_blocks(found, 1)]
    for plan in plans:
        assert plan.fingerprint == fingerprint(build(family))
        apply(model, plan)
    assert is_stock(model) == (not anatomy(model).edits)
    save(model, tmp_path / "m", card=Card(family, "trimmed"))
    again, _ = load(tmp_path / "m", tokenizer=False)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)
    assert set(expert_counts(again).values()) == {4}
    ids = sequences[:1, :6]
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **how), again.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("metric", METRICS)
def test_layerwise_selection_keeps_the_best_of_every_layer(scores: Scores, metric: str) -> None:
    plan = select_experts(scores, 5, metric=metric)
    worst = select_experts(scores, 5, metric=metric, reverse=True)
    for block, kept in plan.keep.items():
        values = scores.experts[block].importance(metric, scores.tokens)
        assert min(values[e] for e in kept) >= max(v for e, v in enumerate(values) if e not in kept)
        assert set(range(8)) - set(worst.keep[block]) <= set(kept)


def made(gates: list[list[float]], top_k: int = 1, groups: int = 1, topk_group: int = 1) -> Scores:
    """Scores with these gate sums."""
    zeros = [0.0] * len(gates[0])
    experts = {
        i: Experts(top_k, groups, topk_group, [1] * len(row), row, zeros, zeros, zeros, [])
        for i, row in enumerate(gates)
    }
    flat = dict.fromkeys(experts, 0.5)
    return Scores("m", "f", "d", 1, 1, len(gates), experts, flat, flat, [], {})


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_global_selection_drops_the_lowest_of_all_layers(data: st.DataObject) -> None:
    gates = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=4))
    keep = data.draw(st.integers(1, 4))
    plan = select_experts(made([list(map(float, row)) for row in gates]), keep, scope="global")
    kept = {b: plan.keep.get(b, tuple(range(4))) for b in range(len(gates))}
    assert sum(map(len, kept.values())) == keep * len(gates)
    assert all(kept.values())
    dropped = [gates[b][e] for b in kept for e in range(4) if e not in kept[b]]
    open_layers = [b for b in kept if len(kept[b]) > 1]  # layers with one expert could not give more
    assert not dropped or all(gates[b][e] >= max(dropped) or len(kept[b]) == 1 for b in open_layers for e in kept[b])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_preserved_gates_route_as_before_and_dropped_experts_give_nothing(
    family: str, sequences: torch.Tensor, tmp_path: Path
) -> None:
    model, whole = build(family), build(family)
    plan = select_experts(score(model, sequences), 5, scope="global", allow_lower_topk=True, preserve_gate=True)
    assert len(set(map(len, plan.keep.values()))) > 1
    kept = {block: set(range(8)) - set(plan.keep[block]) for block in plan.keep}
    for layer in moe_layers(anatomy(whole)):  # the reference leaves the pairs of dropped experts out
        silence(layer.bank, kept.get(layer.block, set()))
    apply(model, plan)
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-5)
    assert is_stock(model)
    save(model, tmp_path / "m", card=Card(family, plan.describe()))
    again, _ = load(tmp_path / "m", tokenizer=False)
    assert torch.equal(logits(again), logits(model))
    for layer in moe_layers(anatomy(again)):
        assert layer.num_experts == 8
        gone = [e for e in range(8) if not layer.bank.down_proj[e].any()]
        assert set(gone) == kept.get(layer.block, set())
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan


def silence(bank: Any, gone: set[int]) -> None:
    forward = type(bank).forward

    def run(hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        lost = torch.isin(index, torch.tensor(sorted(gone), dtype=index.dtype))
        return forward(bank, hidden_states, index, weights.masked_fill(lost, 0))

    bank.forward = run


def test_six_of_eight_experts_are_three_quarters_of_mixtral_8x7b() -> None:
    """Widths stand to each other as in that model, and so do the embeddings to all layers."""
    widths = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = build("mixtral", **widths, vocab_size=64)
    whole = model.num_parameters()
    apply(model, Plan(keep=dict.fromkeys(range(4), (0, 1, 2, 3, 4, 5))))
    assert model.num_parameters() / whole == pytest.approx(0.76, abs=0.01)
    assert model.config.num_local_experts == 6


def test_groups_lose_as_many_each() -> None:
    rows = [[1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, 80.0]] * 2
    plan = select_experts(made(rows, top_k=2, groups=2), 4)
    assert plan.keep == {0: (2, 3, 6, 7), 1: (2, 3, 6, 7)}
    with pytest.raises(RequestError, match=r"keep a multiple of 2 experts.*nearest: 4, 6"):
        select_experts(made(rows, top_k=2, groups=2), 5)
    with pytest.raises(RequestError, match="needs at least 4"):
        select_experts(made(rows, top_k=2, groups=2), 2)
    assert sum(map(len, select_experts(made(rows, top_k=2, groups=2), 6, scope="global").keep.values())) == 12


def test_blocks_and_runs_are_the_best_there_are(scores: Scores) -> None:
    for n in (1, 2, 3):
        best = max(itertools.combinations(scores.block, n), key=lambda c: sum(scores.block[i] for i in c))
        assert select_blocks(scores, n).blocks == best
        first = max(range(4 - n + 1), key=lambda i: scores.gaps[i][n - 1])
        assert select_blocks(scores, n, consecutive=True).blocks == tuple(range(first, first + n))


@pytest.mark.parametrize("blocks", [(0,), (1, 2), (3,), (0, 3)])
def test_dropped_blocks_generate_alike_with_and_without_cache(blocks: tuple[int, ...], sequences: torch.Tensor) -> None:
    model = apply(build(), Plan(blocks=blocks))
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = sequences[:2, :7]
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))
    assert is_stock(model)


def test_a_second_drop_counts_from_the_model_as_it_is(sequences: torch.Tensor) -> None:
    model = build()
    apply(model, Plan(keep={0: (0, 1, 2, 3), 2: (4, 5, 6, 7)}, blocks=(1,)))
    again = score(model, sequences)
    assert set(again.experts) == {0, 2, 3}
    assert [len(again.experts[b]) for b in (0, 2, 3)] == [4, 4, 8]
    apply(model, select_experts(again, {0: 2, 3: 4}))
    assert expert_counts(model) == {0: 2, 1: 4, 2: 4}
    with pytest.raises(RequestError, match="names block 1, which this model has lost"):
        apply(model, Plan(layers=(1,)))


def test_the_repaired_router_is_better_on_tokens_it_was_not_trained_on(sequences: torch.Tensor) -> None:
    model = build()
    sample = sample_outputs(model, sequences, 200)
    rows = {b: layer.router.weight.clone() for b, (layer, _, _) in sample.items()}
    apply(model, Plan(keep=dict.fromkeys(range(4), (0, 1, 2, 3, 4))))
    before = {b: layer.router.weight.clone() for b, (layer, _, _) in sample.items()}
    errors = repair_routers(sample, steps=60)
    assert all(e["after"] <= e["before"] for e in errors.values())
    assert sum(e["after"] for e in errors.values()) < 0.99 * sum(e["before"] for e in errors.values())
    for block, (layer, _, _) in sample.items():
        assert layer.router.weight.shape == (5, 32)
        assert torch.equal(before[block], rows[block][:5])
        changed = not torch.equal(layer.router.weight, before[block])
        assert changed == (errors[block]["after"] < errors[block]["before"])


def test_files_come_back_and_other_models_are_refused(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "s.json")
    assert Scores.load(tmp_path / "s.json") == scores
    plan = select_experts(scores, 6, scope="global")
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan
    with pytest.raises(FingerprintMismatch, match="the scores are of tiny"):
        scores.check("other")
    with pytest.raises(RequestError, match="not scores of this version"):
        Scores.load(tmp_path / "p.json")
    with pytest.raises(RequestError, match="exists already"):
        plan.save(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ("cannot keep 9 of the 8 experts", lambda s: select_experts(s, 9)),
        ("fewer than a token uses", lambda s: select_experts(s, 1)),
        ("scope 'globl' is not accepted; did you mean 'global'", lambda s: select_experts(s, 4, scope="globl")),
        ("metric 'frek'", lambda s: select_experts(s, 4, metric="frek")),
        ("cannot drop 4 of 4 MoE layers", lambda s: select_layers(s, 4)),
        ("cannot drop 4 of 4 blocks", lambda s: select_blocks(s, 4)),
        ("exclude each other", lambda s: select_experts(s, {0: 4}, scope="global")),
        ("hold no reconstruction", lambda s: select_experts(made([[1.0, 2.0]]), 1, metric="reconstruction")),
    ],
)
def test_what_cannot_be_is_refused(scores: Scores, message: str, request_: Any) -> None:
    with pytest.raises(RequestError, match=message):
        request_(scores)


def test_a_dense_model_is_refused_by_name(sequences: torch.Tensor) -> None:
    import transformers
    from moemodels import SMALL

    with pytest.raises(RequestError, match="no MoE layers found in LlamaForCausalLM"):
        score(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), sequences)
