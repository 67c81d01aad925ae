"""lm-eval tasks: a question's context decides at level prefix, and tasks of the user's own are measured offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Command
from meo import convert, gating, load, save
from meo.cli import app
from mergedmodels import GPT2, SMALL, randomise, write

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
meo = Command(app)

TASK = """
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model that is gated by its prompt."""
    room = tmp_path_factory.mktemp("models")
    model, tokenizer = load(write(room / "gpt2", "GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_positions": 32}))
    save(randomise(convert(model, experts=4, k=2, level="prefix")), room / "banks", tokenizer)
    return room / "banks"


def test_a_questions_context_decides(prefix: Path) -> None:
    from meo.lm import prompted_lm

    model, tokenizer = load(prefix)
    lm = prompted_lm()(pretrained=model, tokenizer=tokenizer, batch_size=3)
    contexts = [[5, 9, 11, 40], [7, 8, 200, 31, 5, 6], [50, 60], list(range(20, 60))]  # the last one is cut
    answers = [[3, 4], [90, 91, 92, 93, 94, 95], [17]]
    requests = [(("", ""), c, a) for c in contexts for a in answers]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    differs = False
    for (_, context, answer), (log_likelihood, greedy) in zip(requests, found):
        context = context[-(33 - len(answer)) :]
        tokens = torch.tensor([(context + answer)[:-1]])

        def log_p(length: int, tokens: torch.Tensor = tokens, start: int = len(context) - 1) -> torch.Tensor:
            with torch.no_grad(), gating(prompt_lens=[length]):
                return model(input_ids=tokens).logits[0, start:].log_softmax(-1)

        want = log_p(len(context)).gather(1, torch.tensor(answer)[:, None]).sum()
        assert log_likelihood == pytest.approx(float(want), abs=1e-3)
        assert greedy == bool((log_p(len(context)).argmax(-1) == torch.tensor(answer)).all())
        differs |= not torch.allclose(log_p(len(context)), log_p(1), atol=1e-2)
    assert differs  # from what the first token alone would decide


@pytest.mark.slow
def test_tasks_of_the_zoo_and_of_ones_own(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = [{"question": f"x{i} =", "choices": [" 1", " 2"], "label": i % 2} for i in range(6)]
    (tmp_path / "which.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "which.yaml").write_text(TASK.format(data=tmp_path / "which.jsonl"))
    how = ("eval", prefix, "--tasks", "which,zoo_name", "--task-folder", "tasks", "--limit", "4")
    found = {row["figure"]: row for row in meo.said(*how, "-o", "found.json")["figures"]}
    assert set(found) == {"which", "zoo_name"}
    assert all(row["value"] in (0, 0.25, 0.5, 0.75, 1) for row in found.values())
    assert len(json.loads(Path("found.json").read_text())["figures"]) == 2


@pytest.mark.slow
def test_what_tasks_are_not_for(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bert = write(tmp_path / "bert", "BertForMaskedLM", "BertConfig", SMALL)
    meo.refused("no causal language model", "eval", bert, "--tasks", "zoo_name")
    leaky = tmp_path / "leaky"
    base = tmp_path / "gpt2"
    write(base, "GPT2LMHeadModel", "GPT2Config", GPT2)
    meo.said("convert", "--model", base, "-o", leaky, "--level", "sequence", "--allow-future-leak")
    meo.refused("would see the answers", "eval", leaky, "--tasks", "zoo_name")
    meo.refused("no lm-eval task 'zoo_nam'", "eval", prefix, "--tasks", "zoo_nam")
