"""The task classifiers: what they learn, what they keep, and that they can name nothing else."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from realign import linear
from realign.classify import Likeliest
from realign.cli import app
from realign.instructions import generate
from realign.labels import EACH
from realign.linear import FEATURES, LinearClassifier, features, measure, train
from realign.taxonomy import Taxonomy, load_taxonomy

from model_hooks import RequestError, load

LABELS = Path(__file__).parents[4] / "shared" / "data" / "realign_task_labels.json"
COMMAND = Command(app)


def test_features_are_of_length_one_and_the_same_everywhere() -> None:
    found = features("Write a poem about bees")
    assert found.shape == (FEATURES,)
    assert float(np.linalg.norm(found)) == pytest.approx(1)
    assert [int(i) for i in np.flatnonzero(found)[:4]] == [
        int(i) for i in np.flatnonzero(features("WRITE a poem about bees"))[:4]
    ]
    assert not features("").any() or features("").shape == (FEATURES,)
    features("\ud800 漢字 привет")


def test_training_is_softmax_regression() -> None:
    """The gradient of the first step against finite differences of the loss."""
    texts, labels = ["red apple", "blue sky", "red car"], ["a", "b", "a"]
    found = train(texts, labels, ["a", "b"], epochs=200, decay=0.0, smoothing=0.0)
    assert [found.predict(text)[0] for text in texts] == labels
    assert found.scores(texts).sum(1) == pytest.approx(np.ones(3), abs=1e-6)
    again = train(texts, labels, ["a", "b"], epochs=200, decay=0.0, smoothing=0.0)
    assert (again.weights == found.weights).all()


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(RequestError, match="'c' is no task"):
        train(["x", "y"], ["a", "c"], ["a", "b"])
    with pytest.raises(RequestError, match="two tasks"):
        train(["x", "y"], ["a", "a"], ["a", "b"])


def test_a_classifier_is_kept_whole(tmp_path: Path) -> None:
    found = LinearClassifier.load()
    found.save(tmp_path / "c.npz")
    again = LinearClassifier.load(tmp_path / "c.npz")
    assert (again.names, (again.weights == found.weights).all()) == (found.names, True)
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:500])
    for bad in ("c.npz", "absent.npz"):
        with pytest.raises(RequestError, match="no task classifier"):
            LinearClassifier.load(tmp_path / bad)


def test_the_shipped_one_knows_all_tasks_and_what_it_was_trained_on() -> None:
    found = LinearClassifier.load()
    assert list(found.names) == list(load_taxonomy().tasks)
    assert linear.SHIPPED.stat().st_size < 400_000
    assert measure(found, *generate(5, seed=99))["accuracy"] > 0.9
    assert found.predict("Translate this sentence into French: good morning")[0] == "text_to_text_translation"


@pytest.mark.skipif(not LABELS.is_file(), reason="needs the original's labelled instructions, which are not shipped")
def test_on_the_original_labels(tmp_path: Path) -> None:
    rows = json.loads(LABELS.read_text())
    texts, labels = [row["instruction"] for row in rows], [row["category"] for row in rows]
    shipped = measure(LinearClassifier.load(), texts, labels)
    assert shipped["accuracy"] > 0.53  # by chance 0.02; trained on none of them, its size chosen with them in sight
    assert shipped["macro_f1"] > 0.52
    found = COMMAND.said("classify-train", LABELS, "-o", tmp_path / "own.npz")
    assert (found["trained_on"], found["heldout"]) == (1256, 139)
    assert found["accuracy"] > 0.75


def test_train_says_what_is_wrong_with_labels(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    for row, message in [
        ({"instruction": "x"}, "needs texts"),
        ({"instruction": "x", "category": "no"}, "'no' is no task"),
    ]:
        file.write_text(json.dumps(row) + "\n")
        COMMAND.refused(message, "classify-train", file)


@pytest.mark.slow
def test_the_shipped_one_is_what_training_gives(tmp_path: Path) -> None:
    COMMAND.said("classify-train", "-o", tmp_path / "c.npz", "--heldout", 0)
    made, shipped = LinearClassifier.load(tmp_path / "c.npz"), LinearClassifier.load()
    texts, _ = generate(EACH)
    agree = (made.scores(texts).argmax(1) == shipped.scores(texts).argmax(1)).mean()
    assert agree > 0.99


def test_a_causal_model_is_asked_for_each_name() -> None:
    import torch

    model, tokenizer = load("zoo:gpt2", dtype="float32")
    whole = load_taxonomy()
    names = ["open_qa", "story_generation", "default"]
    taxonomy = Taxonomy({name: whole[name] for name in names}, "default")
    found = Likeliest(model, tokenizer, taxonomy, batch_size=2)
    name, score = asyncio.run(found("Tell me a story"))
    sums: list[float] = []
    prompt = None

    class Seen:
        """The prompt's ids, as the classifier makes them."""

        def __call__(self, text: str, **options: Any) -> Any:
            nonlocal prompt
            encoded = tokenizer(text, **options)
            prompt = encoded["input_ids"]
            return encoded

    spy = Likeliest(model, Seen(), taxonomy)
    spy._names = found._names
    asyncio.run(spy("Tell me a story"))
    assert prompt is not None
    for ids in found._names:  # one by one, in float64, without padding
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        sums.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
    means = [total / len(ids) for total, ids in zip(sums, found._names)]
    assert name == names[means.index(max(means))]
    weights = [math.exp(total - max(sums)) for total in sums]
    assert score == pytest.approx(weights[names.index(name)] / sum(weights), rel=1e-3)
