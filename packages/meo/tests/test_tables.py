"""The tables: every row's parameters are measured as they say, and the files read at every scale."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from meo import glue, load
from meo.data import collate, examples, masked, records
from meo.options import Conversion
from meo.scoring import evaluate, mean, overlap, rouge, words
from meo.tables import FIGURES, PAPER, leak_of, run
from mergedmodels import GPT2, ids, merged, write

from model_hooks import RequestError
from paper_tables import Context
from paper_tables.errors import TableError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


@pytest.fixture
def cell(gpt2: Path) -> dict[str, Any]:
    return {
        "model": str(gpt2), "kind": "classification", "data": ["zoo:glue:order:calibration"], "seed": 0,
        "method": "meo", "heldout": ["zoo:glue:order"], "samples": 16, "heldout_samples": 8, "length": 16, "steps": 2,
        "batch": 4, "rate": 1e-3, "experts": 4, "k": 2, "level": "sequence", "figures": ["score"], "package": "meo",
        "table": "experts", "scale": "quick", "row": "r",
    }  # fmt: skip


def test_every_table_reads_and_names_what_is_known() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"experts", "levels", "architectures"}
    for table in tables.values():
        assert {"quick", "tiny", "paper"} <= set(table.scales)
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
                assert len(unit.cell["data"]) == len(unit.cell["heldout"])
                known = {k: v for k, v in unit.cell.items() if k in Conversion.__dataclass_fields__}
                assert (Conversion(**known).meo is None) == (unit.cell["method"] == "none")


def test_the_figures_of_the_abstract_are_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {
        ("experts", "moe-4", "base"): (72.0, "abstract"), ("experts", "meo-4", "base"): (28.6, "abstract"),
        ("levels", "moe", "average"): (82.6, "abstract"), ("levels", "token", "average"): (83.3, "abstract"),
    }  # fmt: skip


def test_a_row_is_trained_once_and_measured(
    cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    from meo import tables

    cell |= {"figures": ["score", "cost", "time"], "rows": 1, "tokens": 16, "rounds": 3}
    found = run(cell, context)
    assert set(found) == {"average", "gflops", "base", "time", "parameters", "seconds"}
    assert 0 <= found["average"]["value"] <= 100
    monkeypatch.setattr(tables, "_train", lambda settings: pytest.fail("was trained again"))
    again = run({**cell, "table": "levels", "figures": ["score"]}, context)
    assert again["average"] == again["order"] == found["average"]
    dense = run({**cell, "method": "none", "figures": ["cost", "time"]}, context)
    assert dense["time"] == 1.0
    assert dense["base"] == pytest.approx(28.50, abs=0.01)
    assert found["gflops"] > dense["gflops"]


def test_operations_are_those_of_each_level(cell: dict[str, Any], context: Context) -> None:
    """Chunks of 48 are three in 128 tokens; where each token has its own experts, none are merged."""
    levels = {"sequence": {"allow_future_leak": True}, "chunk": {"chunk": 48}, "cumulative": {}}
    cell |= {"kind": "clm", "table": "architectures", "figures": ["cost"]}
    found = {level: run({**cell, "level": level, **more}, context)["gflops"] for level, more in levels.items()}
    dense = run({**cell, "method": "none"}, context)["gflops"]
    mixture = run({**cell, "method": "moe", "level": "token"}, context)["gflops"]
    assert found["chunk"] - dense == pytest.approx(3 * (found["sequence"] - dense))
    assert dense < found["sequence"] < found["cumulative"] == mixture


def test_language_models_have_a_perplexity_and_a_leak(cell: dict[str, Any], context: Context) -> None:
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    cell |= {"kind": "clm", "data": ["zoo:calibration"], "heldout": ["zoo:heldout"], "score": "perplexity", "chunk": 4,
             "table": "architectures", "figures": ["score", "leak"], "level": "chunk"}  # fmt: skip
    found = run(cell, context)
    assert found["leak"] < 1e-4
    assert found["perplexity"]["value"] > 1


def test_the_leak_is_told_apart() -> None:
    assert leak_of(merged("gpt2", level="chunk")) < 1e-5
    assert leak_of(merged("gpt2", level="sequence", allow_future_leak=True)) > 1e-3


def test_unknown_figures_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'score'"):
        run({**cell, "figures": ["scores"]}, context)


@pytest.mark.parametrize("name", glue.TASKS)
def test_the_glue_like_tasks_are_balanced_and_the_same_each_time(name: str) -> None:
    found = glue.records(name, "heldout", 200)
    assert found == glue.records(name, "heldout", 200)
    assert found != glue.records(name, "heldout", 200, seed=1)
    assert len(found) >= 100
    tally = Counter(record["label"] for record in found)
    assert 0.4 < tally[1] / len(found) < 0.6
    assert all(record["text"] and record["task"] == name for record in found)
    assert ("text_pair" in found[0]) == (name == "describes")


def test_records_are_read_from_files_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}]}))
    assert [r["text"] for r in records(str(tmp_path / "a.json"))] == ["x", "y"]
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "number.json").write_text("3")
    for name, message in (("broken.jsonl", "is not JSON"), ("number.json", "a list of records"), ("x.csv", "no file")):
        with pytest.raises(RequestError, match=message):
            records(str(tmp_path / name))


def test_answers_are_compared_as_squad_does() -> None:
    assert words("The Cat, sat!") == ["cat", "sat"]
    assert overlap(["a", "b"], ["b", "c"]) == pytest.approx(0.5)
    assert overlap([], []) == 1
    assert overlap([], ["a"]) == 0


def test_rouge_is_as_the_reference_has_it() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for text, reference in (("the cat sat on the mat", "a cat sat on a mat"), ("one two", "three"), ("x", "x")):
        expected = {k: v.fmeasure for k, v in scorer.score(reference, text).items()}
        if text != "x":  # no pairs of words: nothing to compare, which the reference calls 0
            assert rouge(text, reference) == pytest.approx(expected)
        assert rouge(text, reference)["rougeL"] == pytest.approx(expected["rougeL"])


def test_classes_are_scored_as_the_definitions_say() -> None:
    model = merged("classifier")
    model.config.num_labels = 3
    from meo.scoring import _classes

    found = _classes([1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    assert found["accuracy"] == mean([1, 0, 1, 0, 1], 100)
    assert found["f1"]["value"] == pytest.approx(100 * 4 / 6)
    assert found["mcc"]["value"] == pytest.approx(100 * (2 * 1 - 1 * 1) / 6)


def test_scores_are_compared_by_their_correlations() -> None:
    from meo.scoring import _correlations

    found = _correlations([1.0, 2.0, 2.0, 9.0], [0.5, 0.5, 1.5, 3.0])
    x, y = torch.tensor([1.0, 2, 2, 9]), torch.tensor([0.5, 0.5, 1.5, 3])
    assert found["pearson"]["value"] == pytest.approx(100 * float(torch.corrcoef(torch.stack([x, y]))[0, 1]), rel=1e-5)
    ranks = torch.tensor([[0, 1.5, 1.5, 3], [0.5, 0.5, 2, 3]])
    assert found["spearman"]["value"] == pytest.approx(100 * float(torch.corrcoef(ranks)[0, 1]), rel=1e-5)
    assert _correlations([1.0, 1.0], [0.0, 1.0])["pearson"]["value"] == 0


def test_language_losses_are_token_means(gpt2: Path) -> None:
    model, tokenizer = load(gpt2)
    rows = [{"input_ids": ids(1, n, seed=n)[0].tolist()} for n in (5, 9)]
    found = evaluate(model, tokenizer, rows, "clm", batch_size=1)["loss"]["value"]
    losses = []
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])
        logp = model(input_ids=tokens).logits.log_softmax(-1)
        losses += [-logp[0, t, tokens[0, t + 1]].item() for t in range(tokens.shape[1] - 1)]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_masks_hide_fifteen_per_cent(tmp_path: Path) -> None:
    from mergedmodels import SMALL

    _, tokenizer = load(write(tmp_path / "bert", "BertForMaskedLM", "BertConfig", SMALL))
    tokens = torch.randint(20, 2000, (64, 64))
    changed, labels = masked(tokens, tokenizer, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert 0.13 < float(chosen.float().mean()) < 0.17
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(changed[~chosen], tokens[~chosen])
    assert 0.75 < float((changed[chosen] == tokenizer.mask_token_id).float().mean()) < 0.85
    rows = examples("classification", tokenizer, "zoo:glue:describes", samples=4, length=16, split="heldout",
                    labels=["0", "1"])  # fmt: skip
    batch = collate(rows, "classification", tokenizer)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].shape == (4,)
