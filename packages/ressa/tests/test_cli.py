"""The verbs, in this process: what they write, what they print, and that a wrong request is one line and code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


def weights(folder: Path) -> dict[str, Any]:
    from model_hooks import load

    return dict(load(folder, tokenizer=False)[0].named_parameters())


def masks(folder: Path) -> dict[str, Any]:
    from ressa.masks import load_masks

    return load_masks(folder / "masks.safetensors")


def test_prune_writes_zeros_masks_and_a_record(sparse: Path, pruned: Path) -> None:
    record = json.loads((sparse / "ressa.json").read_text())
    found, kept = weights(sparse), masks(sparse)
    assert record["method"] == "wanda"
    assert record["dense"] is False
    assert record["tokens"]["image"] == 32 * 16
    dense = weights(pruned)
    assert masks(pruned).keys() == kept.keys()
    for path, mask in kept.items():
        name = f"{path}.weight"
        weight = found[name]
        assert torch.equal(weight != 0, mask), path
        zeros = (~mask).sum(1)
        assert (zeros == int(mask.shape[1] * 0.7)).all()
        assert torch.equal(dense[name].masked_fill(~mask, 0), weight)
        assert bool((dense[name] != 0).all())
    others = [name for name in found if name.removesuffix(".weight") not in kept]
    assert all(torch.equal(found[name], dense[name]) for name in others)
    assert not any("projector" in path or "head" in path or "embed" in path for path in kept)


def test_a_pruned_folder_is_an_ordinary_checkpoint(sparse: Path, command: Run) -> None:
    done = command("eval", sparse, "zoo:llava", "--samples", 48, "--json")
    rows = {(r["model"], r["figure"]): r["value"] for r in json.loads(done.stdout)["figures"]}
    assert rows["zoo:llava", "exact"] > 0.95
    assert rows[str(sparse), "exact"] < 0.6
    looked = json.loads(command("inspect", sparse, "--json").stdout)
    assert "language" in json.dumps(looked)


def test_branches_are_left_alone_and_named(command: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--method", "magnitude", "--pattern", "2:4", "--vision", 0, "--measure", "zoo:shapes:heldout")
    done = command("prune", "zoo:llava", *how, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["after"]["exact"] < said["before"]["exact"]
    assert {row["branch"]: row["zeros"] > 0 for row in said["branches"]} == {"vision": False, "language": True}
    for path, mask in masks(out).items():
        assert "language_model" in path
        assert int(mask.view(-1, 4).sum(1).max()) == 2


def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Run, tmp_path: Path) -> None:
    done = command("prune", "zoo:llava", "--compat-spec", "2-0.3-1.0-1.0", "--dry-run", "--json", "-o", tmp_path / "x")
    said = json.loads(done.stdout)
    assert said["spec"] == ["keep 30 % = sparsity 70 %, of every branch with 2 layers"]
    plan = {row["branch"]: row for row in said["plan"]}
    assert [plan[b]["sparsity"] for b in ("vision", "language", "connector")] == [0.7, 0.7, 0]
    assert (plan["vision"]["blocks"], plan["vision"]["matrices"], plan["language"]["matrices"]) == (2, 12, 14)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sparsity", "70"], "--sparsity 70 is not a share from 0 to below 1; did you mean 0.70?"),
        (["--sparsity", "0.5", "--compat-spec", "24-0.5-1.0-1.0"], "exclude each other"),
        (["--pattern", "5:4"], "pattern '5:4' is not accepted"),
        (["--pattern", "0:4"], "pattern '0:4' is not accepted"),
        (["--pattern", "2:4", "--allocation", "owl"], "--pattern 2:4"),
        (["--method", "wander"], "method 'wander' is not accepted"),
        (["--compat-spec", "24-0.5-1.0-1.0"], "fits no branch; blocks of this model: vision 2, language 2"),
        (["--vision-path", "model.eye"], "--vision-path model.eye"),
        (["--data", "zoo:shapes:test"], "unknown split 'test'"),
        (["--ignore", "no_such"], "--ignore no_such fits no matrix"),
        (["--pattern", "2:5", "--sparsity", "0.6"], "is not divisible by M=5"),
    ],
)
def test_a_wrong_request_is_one_line(options: list[str], says: str, command: Run, tmp_path: Path) -> None:
    done = command("prune", "zoo:llava", "--samples", 2, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(sparse: Path, command: Run) -> None:
    before = (sparse / "ressa.json").read_bytes()
    done = command("prune", "zoo:llava", "-o", sparse)
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert (sparse / "ressa.json").read_bytes() == before
    assert command("prune", sparse, "-o", sparse / "inside").exit_code == 2


def test_a_model_without_images_is_refused(command: Run, tmp_path: Path) -> None:
    done = command("prune", "zoo:llama", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "zoo:llama has no processor for images" in done.stderr


def test_merge_needs_adapters(sparse: Path, command: Run, tmp_path: Path) -> None:
    done = command("merge", sparse, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "has no adapter_config.json; give a folder that `ressa repair` wrote" in done.stderr


def test_a_sweep_goes_on_where_it_was(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.json"
    how = ["zoo:llava", "--method", "magnitude", "--calibration-samples", 4, "--samples", 24, "-o", file]
    assert command("sweep", *how, "--ratios", "20:80,50:50").exit_code == 0
    first = json.loads(file.read_text())["rows"]
    done = command("sweep", *how, "--ratios", "20:80,50:50,80:20", "--json")
    rows = json.loads(done.stdout)["points"]
    assert rows[:2] == first
    assert [(r["vision"], r["language"]) for r in rows] == [(0.2, 0.8), (0.5, 0.5), (0.8, 0.2)]
    assert all(0 < r["sparsity"] < 1 and 0 <= r["exact"] <= 1 for r in rows)
    table = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(table) == 4
    assert table[0].startswith("vision,language,exact")
    from ressa import workflow

    monkeypatch.setattr(workflow.Where, "load", lambda self: pytest.fail("loaded again"))
    assert command("sweep", *how, "--ratios", "50:50").exit_code == 0
    changed = command("sweep", *how, "--ratios", "50:50", "--dtype", "float32")
    assert changed.exit_code == 2
    assert "holds a sweep with dtype 'auto', now 'float32'; --overwrite begins again" in changed.stderr


def test_eval_keeps_its_figures(command: Run, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = command("eval", "zoo:llava", "--samples", 6, "--metrics", "exact,vqa", "-o", file, "--new-tokens", 9)
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["figures"]
    assert {r["figure"] for r in rows} == {"exact", "exact, color", "exact, describe", "exact, shape", "vqa"}
    assert "exists already" in command("eval", "zoo:llava", "-o", file).stderr
