"""What can be told of a text without a model: its words, its script, whether it repeats itself or refuses."""

from __future__ import annotations

import re
import unicodedata

_REFUSAL = re.compile(r"\b(I('m| am) (sorry|unable)|I can(not|'t) (help|assist|provide|answer)|as an AI\b)", re.I)


def count_words(text: str) -> int:
    """Words and signs: what lengths are compared by where no tokenizer is given."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def repeated(text: str) -> float:
    """Share of the sequences of 6 words that are there already."""
    words = text.split()
    grams = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def refuses(text: str) -> bool:
    """Whether an answer begins as a refusal."""
    return _REFUSAL.search(text[:300]) is not None


def script(text: str) -> str:
    """The script of the most letters (LATIN, CYRILLIC, CJK ...); "" where there are fewer than 20 letters."""
    counts: dict[str, int] = {}
    for letter in text[:2000]:
        if letter.isalpha():
            name = unicodedata.name(letter, "").split(" ")[0]
            name = "CJK" if name in ("HIRAGANA", "KATAKANA") else name
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: counts[name]) if sum(counts.values()) >= 20 else ""
