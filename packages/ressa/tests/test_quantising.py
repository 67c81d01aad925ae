"""Eight bits on top of the zeros: they stay, the rest moves by less than a step, and stock transformers loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ressa import quantising

from model_hooks.errors import RequestError


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_zeros_stay_and_the_rest_moves_by_less_than_a_step(
    form: str, sparse: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

    from model_hooks.zoo import llava, shapes

    done = command("export", sparse, "--format", form, "-o", tmp_path / "small", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["matrices"] == 26
    assert 0 < found["error"] <= quantising.STEPS[form]
    assert found["bytes"] < 0.8 * found["dense_bytes"]
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "small", quantization_config=CompressedTensorsConfig(dequantize=True)
    ).float()
    before = AutoModelForImageTextToText.from_pretrained(sparse, dtype=torch.float32)
    for path in quantising._sparse_modules(sparse):
        ours, theirs = before.get_submodule(path).weight, again.get_submodule(path).weight
        assert not bool((theirs[ours == 0] != 0).any()), path
        assert not torch.equal(ours, theirs), path
    items = shapes.items("heldout", 96)
    assert llava.exact_match(again, items)["all"] == pytest.approx(llava.exact_match(before, items)["all"], abs=0.1)


def test_what_has_no_zeros_is_refused(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no zeros to keep; prune without --keep-dense"):
        quantising.quantise(pruned, tmp_path / "out", "int8")
    shutil.copytree(pruned, tmp_path / "foreign", ignore=shutil.ignore_patterns("sparsity.json"))
    with pytest.raises(RequestError, match=r"has no sparsity\.json of pruned matrices"):
        quantising.quantise(tmp_path / "foreign", tmp_path / "out", "int8")
    with pytest.raises(RequestError, match="form 'int4' is not accepted; give int8 or fp8"):
        quantising.quantise(pruned, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_a_library_that_does_something_else_is_caught(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantising._compress

    def lost(model: Any, paths: list[str], scheme: str) -> list[str]:
        rest = whole(model, paths, scheme)
        model.get_submodule(paths[0]).weight.data.fill_(1)
        return rest

    monkeypatch.setattr(quantising, "_compress", lost)
    with pytest.raises(RuntimeError, match="has lost zeros when it was quantised"):
        quantising.quantise(sparse, tmp_path / "out", "fp8")
    monkeypatch.setattr(quantising, "_compress", whole)
    monkeypatch.setattr(quantising, "_name_the_rest", lambda file, rest: None)  # transformers' own names
    with pytest.raises(RuntimeError, match=r"reads back with another .*, which was not to be quantised"):
        quantising.quantise(sparse, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()
