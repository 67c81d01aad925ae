"""The local task classifier: hashed n-grams and one linear layer, in numpy. Trained in seconds, 0.4 MB on disk."""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model_hooks.errors import RequestError
from model_hooks.files import atomic_file

SHIPPED = Path(__file__).parent / "data" / "classifier.npz"
FEATURES = 1 << 12
LOOKED_AT = 60  # words at each end of a text: the task is told there, in between is what it is about

Matrix = NDArray[np.float32]


def features(text: str) -> Matrix:
    """The text's hashed features [FEATURES], of length 1: words, pairs of words, and the characters of each word."""
    words = re.findall(r"[a-z]+|\d|[^\sa-z\d]", text.lower()[:4000])
    words = words if len(words) <= 2 * LOOKED_AT else words[:LOOKED_AT] + words[-LOOKED_AT:]
    found = np.zeros(FEATURES, np.float32)
    for name in _names(words):
        code = zlib.crc32(name.encode("utf-8", "surrogatepass"))
        found[code % FEATURES] += 1 if code & 1 << 31 else -1
    found = np.sign(found) * np.log1p(np.abs(found))
    return found / max(float(np.linalg.norm(found)), 1e-9)


def _names(words: Sequence[str]) -> Iterator[str]:
    for at, word in enumerate(words):
        if not word.isascii():
            yield f"script {unicodedata.name(word, '').partition(' ')[0]}"
        yield word
        yield f"{words[at - 1] if at else '^'} {word}"
        if at < 8:
            yield f"^{word}"  # near the beginning, where the task is named
        if len(word) > 4:
            yield from (f"~{word[i : i + 4]}" for i in range(len(word) - 3))


@dataclass(frozen=True)
class LinearClassifier:
    """weights [classes, FEATURES], bias [classes] and the classes' names. A probability is defined for each answer."""

    names: tuple[str, ...]
    weights: Matrix
    bias: Matrix

    def scores(self, texts: Sequence[str]) -> Matrix:
        """Probabilities [texts, classes]."""
        logits = np.stack([features(text) for text in texts]) @ self.weights.T + self.bias
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)

    def predict(self, text: str) -> tuple[str, float]:
        """The name of the likeliest class, and its probability."""
        scores = self.scores([text])[0]
        best = int(scores.argmax())
        return self.names[best], float(scores[best])

    def save(self, path: str | Path) -> None:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, weights=self.weights.astype(np.float16), bias=self.bias.astype(np.float16),
                names=np.array(json.dumps(self.names)),
            )  # fmt: skip

    @staticmethod
    def load(path: str | Path = SHIPPED) -> LinearClassifier:
        """Raises `RequestError` for a file that `save` did not write."""
        try:
            with np.load(path, allow_pickle=False) as file:
                names = tuple(json.loads(str(file["names"])))
                weights, bias = file["weights"].astype(np.float32), file["bias"].astype(np.float32)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise RequestError(f"{path} is no task classifier ({type(error).__name__}); train one") from None
        if weights.shape != (len(names), FEATURES) or bias.shape != (len(names),):
            raise RequestError(f"{path} is a task classifier of other sizes; train it again")
        return LinearClassifier(names, weights, bias)


def train(
    texts: Sequence[str], labels: Sequence[str], names: Sequence[str], *, epochs: int = 20, rate: float = 0.05,
    decay: float = 2e-3, smoothing: float = 0.05, seed: int = 0,
) -> LinearClassifier:  # fmt: skip
    """Softmax regression by Adam on the cross-entropy, smoothed labels, weight decay. Deterministic.

    Raises `RequestError` for a label that is none of `names`, and for fewer than two classes.
    """
    unknown = [label for label in labels if label not in names]
    if unknown or len(set(labels)) < 2:
        raise RequestError(f"label {unknown[0]!r} is no task" if unknown else "at least two tasks are needed")
    inputs = np.stack([features(text) for text in texts])  # [texts, FEATURES]
    targets = np.full((len(texts), len(names)), smoothing / len(names), np.float32)
    targets[np.arange(len(texts)), [names.index(label) for label in labels]] += 1 - smoothing
    parameters: list[Any] = [np.zeros((len(names), FEATURES), np.float32), np.zeros(len(names), np.float32)]
    moments = [[np.zeros_like(p), np.zeros_like(p)] for p in parameters]
    rng, step = np.random.default_rng(seed), 0
    for epoch in range(epochs):
        for batch in np.array_split(rng.permutation(len(texts)), max(1, len(texts) // 256)):
            step += 1
            logits = inputs[batch] @ parameters[0].T + parameters[1]
            shifted = np.exp(logits - logits.max(1, keepdims=True))
            error = (shifted / shifted.sum(1, keepdims=True) - targets[batch]) / len(batch)  # [batch, classes]
            now = rate * (1 - epoch / epochs)
            for p, m, gradient in zip(parameters, moments, (error.T @ inputs[batch], error.sum(0))):
                m[0] += 0.1 * (gradient - m[0])
                m[1] += 0.01 * (gradient**2 - m[1])
                p -= now * (m[0] / (1 - 0.9**step)) / (np.sqrt(m[1] / (1 - 0.99**step)) + 1e-8)
            parameters[0] *= 1 - now * decay
    return LinearClassifier(tuple(names), parameters[0], parameters[1])


def measure(classifier: LinearClassifier, texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`accuracy`, and `macro_f1` over the classes that the labels have."""
    found = [classifier.names[i] for i in classifier.scores(texts).argmax(1)]
    right = sum(a == b for a, b in zip(found, labels))
    f1 = []
    for name in set(labels):
        both = sum(a == b == name for a, b in zip(found, labels))
        f1.append(2 * both / (found.count(name) + list(labels).count(name)))
    return {"accuracy": right / len(labels), "macro_f1": sum(f1) / len(f1)}
