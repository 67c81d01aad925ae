"""Named settings: those of the paper's own runs, and the published code's definitions where ours differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Command
from moe_compress import workflow
from moe_compress.cli import app
from moe_compress.finetune import TuneConfig
from moe_compress.presets import options
from moe_compress.scores import Scores
from moe_compress.slimming import Slimming

from model_hooks import RequestError

COMMAND = Command(app)
C4 = {"data": "allenai/c4:en:train", "samples": 128, "length": 2048}
PILE = {"data": "mit-han-lab/pile-val-backup:default:validation", "samples": 512, "length": 2048}
SPARSE = {"method": "sparsegpt", "pattern": "2:4", "sparsity": 0.5, **C4}
# section 2 of the paper's settings: what the published scripts give
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("paper-mixtral", "score"): C4,
    ("paper-mixtral/experts", "trim"): {"experts": 6, "scope": "global", "metric": "gate"},
    ("paper-mixtral/layers", "trim"): {"layers": 8},
    ("paper-mixtral/blocks", "trim"): {"blocks": 5},
    ("paper-mixtral/sparsegpt", "slim"): SPARSE,
    ("paper-mixtral/awq", "slim"): {"method": "awq", "bits": 4, "group": 128, "symmetric": False, **PILE},
    ("paper-deepseek", "score"): C4,
    ("paper-deepseek/experts", "trim"): {"experts": 48, "scope": "global", "metric": "gate"},
    ("paper-deepseek/layers", "trim"): {"layers": 4},
    ("paper-deepseek/blocks", "trim"): {"blocks": 4},
    ("paper-deepseek/sparsegpt", "slim"): SPARSE,
    ("paper-deepseek/awq", "slim"): {"method": "awq", "bits": 4, "group": 64, "symmetric": False, **PILE},
}
TUNED = {"paper-mixtral": ("lora", 32, 2e-5), "paper-deepseek": ("full", 32, 8e-6)}


@pytest.mark.parametrize(("name", "verb"), SETTINGS)
def test_presets_are_the_published_settings(name: str, verb: str) -> None:
    assert options("presets", name, verb) == SETTINGS[name, verb]


@pytest.mark.parametrize("model", ["paper-mixtral", "paper-deepseek"])
def test_presets_of_gptq_and_finetuning(model: str, tmp_path: Path) -> None:
    found = options("presets", f"{model}/gptq", "slim")
    assert {k: found[k] for k in ("method", "bits", "group", "samples")} == {
        "method": "gptq", "bits": 4, "group": 128, "samples": 16,
    }  # fmt: skip
    config = TuneConfig(model="m", output=tmp_path / "out", **options("presets", model, "finetune"))
    assert (config.method, config.rank, config.rate) == TUNED[model]
    assert (config.epochs, config.length, config.bf16) == (3, 1024, True)
    assert config.batch_size * config.accumulation * 8 == 32  # on eight GPUs


def test_the_line_comes_before_a_file_and_a_file_before_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    def slim_to_folder(name: str, output: Path, how: Slimming, data: str, **given: Any) -> dict[str, Any]:
        seen.update(how=how, data=data, **given)
        return {"layers": {}, "bytes": 0, "quantised": []}

    monkeypatch.setattr(workflow, "slim_to_folder", slim_to_folder)
    Path("own.yaml").write_text("samples: 7\ngroup: 32\n")
    for order in (("--config", "own.yaml", "--preset"), ("--preset",)):
        rest = () if "--config" in order else ("--config", "own.yaml")
        COMMAND.said("slim", "m", *order, "paper-deepseek/awq", *rest, "--group", 16, "--compat", "original")
        assert seen["how"] == Slimming(
            "awq", group=16, symmetric=False, propagate="dense", min_tokens=1, policy="plain"
        )
        assert (seen["data"], seen["samples"], seen["length"]) == (PILE["data"], 7, 2048)


def test_the_published_global_ranking_has_no_floor() -> None:
    """Layer 0's experts are all worse than the others': the original takes the layer's last, too."""
    from test_trimming import made

    scores: Scores = made([[1.0, 2.0, 3.0], [7.0, 8.0, 9.0], [4.0, 5.0, 6.0]], top_k=2)
    ours = workflow.choose(scores, {"experts": 2, "scope": "global"})
    assert ours.keep == {0: (1, 2), 1: (1, 2), 2: (1, 2)}
    request = {"experts": 2, "scope": "global", **options("compat", "original", "trim")}
    theirs = workflow.choose(scores, request)
    assert (theirs.keep, theirs.layers) == ({}, (0,))
    with pytest.raises(RequestError, match="cannot keep 0 of the 3 experts"):
        workflow.choose(scores, {**request, "scope": "layer", "experts": {0: 0}})


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb, name, message in (
        ("score", "paper-mixtrel", "'paper-mixtrel' is no preset of score; did you mean 'paper-mixtral'"),
        ("trim", "paper-mixtral", "'paper-mixtral' is no preset of trim"),
        ("trim", "paper-mixtral/block", "did you mean 'paper-mixtral/blocks'"),
    ):
        COMMAND.refused(message, verb, "m", "--preset", name)
    COMMAND.refused("'orginal' is no compat of slim; did you mean 'original'", "slim", "m", "--compat", "orginal")
    COMMAND.refused(
        "did you mean 'paper-deepseek'", "finetune", "--preset", "paper-deepseak", "--model", "m", "-o", "t"
    )
