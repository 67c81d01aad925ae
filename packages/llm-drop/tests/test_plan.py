"""Plans: what may be in one, and that files survive: ours, and the lists of the paper's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_drop.plan import Plan, from_original

from model_hooks import RequestError

LAYERS = 9


@given(st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1), st.sets(st.integers(0, LAYERS - 1)))
def test_a_plan_survives_its_file(tmp_path_factory: pytest.TempPathFactory, attention: set[int], mlp: set[int]) -> None:
    plan = Plan(LAYERS, tuple(attention), tuple(mlp), how="x", model="m", fingerprint="f", importance=0.5)
    path = plan.save(tmp_path_factory.mktemp("plan") / "plan.json")
    assert Plan.load(path) == plan
    assert plan.attention == tuple(sorted(attention))
    assert plan.blocks == tuple(sorted(attention & mlp))
    assert len(plan.units) == len(attention) + len(mlp)


@given(st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1), st.sets(st.integers(0, LAYERS - 1)))
def test_the_papers_lists_and_masks_import_to_the_same_plan(attention: set[int], mlp: set[int]) -> None:
    indices = {"num_hidden_layers": LAYERS, "drop_attn_list": list(attention), "drop_mlp_list": list(mlp)}
    masks = {
        "num_hidden_layers": LAYERS,
        "drop_attn_list": [i in attention for i in range(LAYERS)],
        "drop_mlp_list": [i in mlp for i in range(LAYERS)],
    }
    found = from_original(indices), from_original(masks)
    assert found[0].units == found[1].units
    assert set(found[0].attention) == attention
    assert set(found[0].mlp) == mlp


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": (9,)}, r"attention index 9 is out of range; allowed: 0\.\.8"),
        ({"mlp": (-1,)}, r"mlp index -1 is out of range; allowed: 0\.\.8"),
        ({"mlp": (3, 3)}, "mlp index 3 is given twice"),
        ({"attention": (True,)}, "not a whole number"),
        ({"attention": tuple(range(9))}, "at least one attention layer must stay"),
        ({"num_layers": 0}, "at least 1 is needed"),
    ],
)
def test_what_may_not_be_in_a_plan(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Plan(**{"num_layers": LAYERS, **arguments})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not a JSON file"),
        ("[1]", "a JSON object is needed"),
        ("{}", "neither a plan file nor a configuration"),
        ('{"drop_attn_list": [1]}', "num_hidden_layers is missing"),
        ('{"drop_attn_list": 3, "num_hidden_layers": 9}', "must be a list"),
        ('{"drop_attn_list": [true], "num_hidden_layers": 9}', "1 booleans for 9 layers"),
        ('{"format": "llm-drop plan 1", "attention": [1]}', "num_layers is missing"),
        ('{"format": "llm-drop plan 1", "num_layers": 3, "atention": [1]}', "unknown key atention"),
        ('{"format": "llm-drop plan 1", "num_layers": 3, "attention": [7]}', "out of range"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        Plan.load(file)
    assert "plan.json" in str(caught.value)


def test_a_folder_with_the_papers_config_is_read_and_a_contradiction_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "drop_attn_list": [2]}))
    assert Plan.load(tmp_path).attention == (2,)
    with pytest.raises(RequestError, match="made for 4 layers, the model has 8"):
        Plan.load(tmp_path, num_layers=8)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = Plan(LAYERS, (1,)).save(tmp_path / "plan.json")
    with pytest.raises(RequestError, match="--overwrite"):
        Plan(LAYERS, (2,)).save(path)
    assert Plan.load(path).attention == (1,)
    Plan(LAYERS, (2,)).save(path, overwrite=True)
    assert Plan.load(path).attention == (2,)
