"""Scores of answers and captions by their published rules, in plain Python: VQA accuracy, CIDEr-D, recall@k."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = (
    "ain't", "aren't", "can't", "could've", "couldn't", "didn't", "doesn't", "don't", "hadn't", "hasn't", "haven't",
    "he's", "how's", "i'm", "i've", "isn't", "it'd", "it'll", "let's", "ma'am", "mightn't", "might've", "mustn't",
    "must've", "needn't", "oughtn't", "she's", "shouldn't", "should've", "somebody's", "someone's", "that's",
    "there's", "they'd", "they'll", "they're", "they've", "wasn't", "we've", "weren't", "what'll", "what're",
    "what's", "when's", "where's", "who'd", "who'll", "who's", "why's", "won't", "would've", "wouldn't", "y'all",
    "you'd", "you'll", "you're", "you've",
)  # fmt: skip
WITH_APOSTROPHE = {word.replace("'", ""): word for word in CONTRACTED}
AGREE = 3  # people whose same answer makes it wholly right
NGRAMS, SIGMA = 4, 6.0  # of CIDEr-D


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it: punctuation, articles, number words and contractions evened out.

    A mark that stands at a word's border, or between digits as a comma, goes; another one becomes a space. Periods go
    unless they are decimal.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        bordered = f"{mark} " in text or f" {mark}" in text or number
        out = out.replace(mark, "" if bordered else " ")
    out = re.sub(r"(?<!\d)\.|\.(?!\d)", "", out)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Of one answer beside people's: the mean, over leaving one of them out, of min(1, same answers / 3).

    With fewer than four people, three of whom could not agree without one, it is 1 if anyone said the same, else 0.
    """
    found, said = normalise(answer), [normalise(one) for one in people]
    if not said:
        raise ValueError("no answers of people to compare with")
    same = [found == one for one in said]
    if len(said) <= AGREE:
        return float(any(same))
    total = sum(same)
    return sum(min(1.0, (total - own) / AGREE) for own in same) / len(same)


def words_of(caption: str) -> list[str]:
    """Lower-case words and numbers, without punctuation; the published scores use a Penn Treebank tokenizer instead."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", caption.lower())


def _counts(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption beside its references: n-grams up to 4 weighed by how few images' references have them.

    Clipped cosines with a Gaussian of the lengths' difference, mean over n and over references, times 10. An n-gram
    that all images share weighs nothing, so that a single image scores 0.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} groups of references")
    said = [words_of(caption) for caption in captions]
    known = [[words_of(one) for one in group] for group in references]
    scores = [0.0] * len(said)
    for n in range(1, NGRAMS + 1):
        seen: Counter[tuple[str, ...]] = Counter()
        for group in known:
            seen.update({gram for one in group for gram in _counts(one, n)})
        rarity = {gram: math.log(len(known)) - math.log(max(1, count)) for gram, count in seen.items()}
        unseen = math.log(max(1, len(known)))

        def vector(
            words: Sequence[str], n: int = n, rarity: dict[tuple[str, ...], float] = rarity, unseen: float = unseen
        ) -> dict[tuple[str, ...], float]:
            return {gram: count * rarity.get(gram, unseen) for gram, count in _counts(words, n).items()}

        for i, (words, group) in enumerate(zip(said, known, strict=True)):
            own = vector(words)
            alike = [_clipped(own, vector(one)) * _length_factor(words, one) for one in group]
            scores[i] += 10 * sum(alike) / max(1, len(alike)) / NGRAMS
    return scores


def _clipped(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    lengths = math.sqrt(sum(v * v for v in own.values())) * math.sqrt(sum(v * v for v in other.values()))
    dot = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
    return dot / lengths if lengths else 0.0


def _length_factor(own: Sequence[str], other: Sequence[str]) -> float:
    return math.exp(-((len(own) - len(other)) ** 2) / (2 * SIGMA**2))


def recall_at(k: int, scores: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Share of rows whose right column is among the `k` highest; what ties with it counts as higher."""
    if not k >= 1:
        raise ValueError(f"k is {k}; at least 1 is needed")
    found = 0
    for row, column in zip(scores, right, strict=True):
        above = sum(value >= row[column] for i, value in enumerate(row) if i != column)
        found += above < k
    return found / len(right)


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """The mean and its standard error."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
    return {"value": mean, "se": math.sqrt(variance / n), "n": n}
