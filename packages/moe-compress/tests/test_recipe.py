"""Recipes: legal orders, the budget's solution against brute force, and runs that go on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_compress import packing
from moe_compress import recipe as recipes
from moe_compress.budget import Choice, Measured, Offer, counts_for, measure, solve, steps_for
from moe_compress.recipe import Recipe, check_order, read
from moemodels import build

from model_hooks import RequestError, anatomy, load
from model_hooks.experts import moe_layers, routed_output
from model_hooks.layerwise import map_layers

CALIBRATION = {"data": "zoo:calibration", "samples": 4, "length": 48}
LEGAL = [
    ["block_drop", "quantize"], ["layer_drop", "expert_drop", "finetune", "prune", "quantize"], ["finetune", "prune"],
    ["expert_drop", "expert_drop", "prune", "block_drop"],
]  # fmt: skip
ILLEGAL = {
    ("quantize", "layer_drop"): "layer_drop after quantize",
    ("quantize", "finetune"): "finetune after quantize",
    ("prune", "finetune"): "finetune after prune would fill the zeros",
    ("prune", "prune"): "prune twice",
    ("quantise",): "step 'quantise' is not known; did you mean 'quantize'",
}


@pytest.mark.parametrize("names", LEGAL)
def test_legal_orders_pass(names: list[str]) -> None:
    check_order(names)


@pytest.mark.parametrize("names", ILLEGAL)
def test_illegal_orders_are_refused_before_a_weight_is_read(names: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=ILLEGAL[names]):
        Recipe("no/such-model", tuple((name, {}) for name in names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [{layer_drop: {n: 1}}]", "model is missing"),
        ("model: m", "no steps and no budget"),
        ("model: m\nsteps: [{layer_drop: {m: 1}}]", "layer_drop: unknown key 'm'"),
        ("model: m\nsteps: [quantize]", "step 1 must be one name with its options"),
        ("model: m\nsteps: [{quantize: {method: wanda}}]", "quantize takes one of rtn, gptq, awq, not wanda"),
        ("model: m\nsteps: [{prune: {sparsity: 2}}]", "sparsity 2"),
        ("model: m\nbudget: {bytes: 1, flops: 1}", "one of bytes, flops and latency"),
        ("model: m\nbudget: {bytes: 1}\nsteps: [{prune: {}}]", "leave out prune"),
        ("model: m\nstep: []", "unknown key 'step'; did you mean 'steps'"),
    ],
)
def test_files_that_cannot_be_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RequestError, match=message):
        read(tmp_path / "r.yaml")


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_the_solution_is_the_best_within_the_budget(data: st.DataObject) -> None:
    number = st.integers(0, 20)
    offers = {
        block: [Offer(Choice(n, 4), data.draw(number), data.draw(number)) for n in range(3)] for block in range(3)
    }
    budget = data.draw(st.integers(0, 60))
    affordable = [c for c in itertools.product(*offers.values()) if sum(o.cost for o in c) <= budget]
    if not affordable:
        with pytest.raises(RequestError, match="the least that the choices need"):
            solve(offers, budget)
        return
    chosen = solve(offers, budget, steps=max(budget, 1))  # whole costs: no rounding
    picked = [next(o for o in offers[block] if o.choice == choice) for block, choice in chosen.items()]
    assert sum(o.cost for o in picked) <= budget
    assert sum(o.damage for o in picked) == min(sum(o.damage for o in c) for c in affordable)


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    ids = torch.randint(16, 2048, (3, 32), generator=torch.Generator().manual_seed(1))
    return measure(folder, ids, group=32, sample_tokens=96)


def test_damage_is_what_the_change_does_to_the_stream(measured: Measured) -> None:
    """Layer 1 with six experts, and without its mixture, by hand on the same tokens."""
    model = build()
    layer = moe_layers(anatomy(model))[1]
    seen: dict[str, Any] = {}
    layer.module.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: seen.update(stream=a[0]))
    ids = torch.randint(16, 2048, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids)
        x = seen["x"].flatten(0, 1)
        whole, some = routed_output(layer, x), routed_output(layer, x, measured.keep[1][6])
    size = seen["stream"].double().square().sum(-1).mean()
    by_hand = (some - whole).double().square().sum(-1).mean() / size
    assert measured.damage[1][Choice(6, 16)] == pytest.approx(float(by_hand), rel=1e-3)
    dropped = whole.double().square().sum(-1).mean() / size
    assert measured.damage[1][Choice(0, 16)] == pytest.approx(float(dropped), rel=1e-3)
    assert measured.damage[1][Choice(8, 16)] == pytest.approx(0, abs=1e-10)
    assert measured.damage[1][Choice(8, 8)] < measured.damage[1][Choice(8, 4)]
    assert all(len(kept) == n for kept_of in measured.keep.values() for n, kept in kept_of.items())


def test_costs_are_those_of_the_files(measured: Measured, folder: Path) -> None:
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert measured.total("bytes") == pytest.approx(size, rel=0.02)  # but for the files' headers
    one = 3 * 32 * 32
    assert measured.bytes[0][Choice(8, 16)] - measured.bytes[0][Choice(4, 16)] == 4 * one * 4
    assert measured.flops[0][Choice(8, 16)] == measured.flops[0][Choice(4, 16)] == 2 * (2 * one + 8 * 32)
    assert measured.latency[0][Choice(0, 16)] == 0 < measured.latency[0][Choice(8, 4)]


def test_steps_carry_the_solution_out(measured: Measured) -> None:
    chosen = {0: Choice(8, 16), 1: Choice(6, 4), 2: Choice(0, 16), 3: Choice(8, 8)}
    assert steps_for(measured, chosen, "gptq", 32) == [
        {"layer_drop": {"layers": [2]}},
        {"expert_drop": {"experts": {1: list(measured.keep[1][6])}}},
        {"quantize": {"method": "gptq", "bits": 16, "layer_bits": {0: 16, 1: 4, 3: 8}, "group": 32}},
    ]


def test_counts_obey_the_router() -> None:
    layer = moe_layers(anatomy(build("deepseek_v3")))[0]
    assert counts_for(layer, (1.0, 0.75, 0.5, 0.25, 0.6)) == [8, 6, 4]


@pytest.mark.slow
def test_a_recipe_does_its_steps_and_a_second_start_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, dict[str, Any]]] = [
        ("block_drop", {"n": 1}), ("expert_drop", {"keep": 6, "repair": True}), ("prune", {"pattern": "2:4"}),
        ("quantize", {"method": "rtn", "group": 32}),
    ]  # fmt: skip
    recipe = Recipe(str(folder), tuple(steps), CALIBRATION)
    do, done = recipes._step, []

    def once(name: str, *args: Any) -> None:
        if name == "prune" and "prune" not in done:
            done.append(name)
            raise KeyboardInterrupt
        done.append(name)
        do(name, *args)

    monkeypatch.setattr(recipes, "_step", once)
    with pytest.raises(KeyboardInterrupt):
        recipes.run(recipe, tmp_path / "out", measure="")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="holds another recipe"):
        recipes.run(Recipe(str(folder), tuple(steps[:1]), CALIBRATION), tmp_path / "out", measure="")
    report = recipes.run(recipe, tmp_path / "out", measure="")
    assert done == ["block_drop", "expert_drop", "prune", "prune", "quantize"]
    assert [row["step"] for row in report["steps"]] == ["start", "block_drop", "expert_drop", "prune", "quantize"]
    sizes = [row["bytes"] for row in report["steps"]]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[4]
    assert sizes[4] < 0.65 * sizes[0]  # embeddings are most of so small a model
    model, _ = packing.load(tmp_path / "out")
    layers = moe_layers(anatomy(model))
    assert [layer.num_experts for layer in layers] == [6, 6, 6]
    for layer in layers:
        assert float((layer.bank.down_proj == 0).float().mean()) >= 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out/recipe.json").read_text())["model"] == str(folder)


def test_a_budget_is_met_and_spent_where_it_hurts_least(folder: Path, tmp_path: Path) -> None:
    def change(index: int, layer: Any) -> None:  # layer 2 does next to nothing
        if index == 2:
            layer.mlp.experts.down_proj.mul_(0.01)

    map_layers(folder, tmp_path / "m", change)
    before = sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors"))
    budget = {"bytes": 0.89 * before, "group": 32, "bits": [16], "shares": [1.0]}
    recipe = Recipe(str(tmp_path / "m"), (), CALIBRATION, budget)
    recipes.run(recipe, tmp_path / "out", measure="")
    after = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0.8 * before < after <= 0.9 * before
    assert anatomy(load(tmp_path / "out", tokenizer=False)[0]).dropped_mlp == (2,)
    (drop,) = recipes.solve_budget(str(tmp_path / "m"), {"flops": 0.97}, recipe.calibration)
    assert drop == {"layer_drop": {"layers": [2]}}
    rounding = recipes.solve_budget(str(tmp_path / "m"), {"bytes": 0.72 * before, "group": 32}, recipe.calibration)
    assert min(rounding[-1]["quantize"]["layer_bits"].values()) < 16
    with pytest.raises(RequestError, match="meets this budget as it is"):
        recipes.solve_budget(str(tmp_path / "m"), {"bytes": 1e12, "group": 32}, recipe.calibration)
