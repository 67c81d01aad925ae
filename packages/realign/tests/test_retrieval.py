"""BM25 against its formula, the web search's cleaning, and that nothing is asked twice."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llm_server import Answer, Call, Server
from realign.retrieval import Corpus, Evidence, Serper, evidence_for, evidence_of, words_of

from instruct_data import Journal
from instruct_data.llm import ServiceFailed
from model_hooks import RequestError


def naive(query: str, texts: list[str]) -> list[float]:
    """Okapi BM25, a document at a time."""
    split = [words_of(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        counts, score = Counter(words), 0.0
        for word in set(words_of(query)):
            n = sum(word in other for other in split)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * counts[word] * 2.2 / (counts[word] + 1.2 * (1 - 0.75 + 0.75 * len(words) / mean))
        scores.append(score)
    return scores


def test_bm25_is_its_formula() -> None:
    rng = random.Random(0)
    words = [f"w{n}" for n in range(30)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(60)]
    corpus = Corpus([(text, "") for text in texts])
    for _ in range(20):
        query = " ".join(rng.choices([*words, "unknown"], k=4))
        wanted = naive(query, texts)
        found = corpus.scores(query)
        assert [found.get(n, 0.0) for n in range(60)] == pytest.approx(wanted, abs=1e-12)
        best = sorted(range(60), key=lambda n: (-wanted[n], n))[:5]
        evidence = asyncio.run(corpus.find(query))
        assert [e.text for e in evidence] == [texts[n] for n in best if wanted[n] > 0]
        assert [e.rank for e in evidence] == list(range(1, len(evidence) + 1))


def test_a_corpus_is_read_and_its_faults_named(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "bees dance", "url": "http://b"}\n{"text": "x", "title": "T"}\n')
    corpus = Corpus.read(file)
    assert corpus.documents == [("bees dance", "http://b"), ("x", "T")]
    file.write_text('{"text": "a"}\n{"txet": "b"}\n')
    with pytest.raises(RequestError, match=r"line 2.*has no text"):
        Corpus.read(file)
    file.write_text("\n")
    with pytest.raises(RequestError, match="no document"):
        Corpus.read(file)


RESULTS: dict[str, Any] = {
    "answerBox": {"snippet": "A box.\nTwo lines.", "link": "http://box"},
    "knowledgeGraph": {"title": "T", "type": "Thing", "website": "http://t", "attributes": {"Born": "1867"}},
    "organic": [
        {"snippet": "Missing: word", "link": "http://1"}, {"snippet": "One", "link": "http://2"},
        {"link": "http://3", "attributes": {"Posted": "today", "Price": "5"}}, {"snippet": "Two", "link": "http://4"},
    ],
}  # fmt: skip


def test_snippets_come_in_order_clean_and_with_their_addresses() -> None:
    assert evidence_of(RESULTS) == [
        Evidence("A box. Two lines.", "http://box", 1), Evidence("T: Thing", "http://t", 2),
        Evidence("T Born: 1867", "http://t", 3), Evidence("One", "http://2", 4), Evidence("Price: 5", "http://3", 5),
    ]  # fmt: skip
    assert evidence_of({}) == []
    assert evidence_of({"organic": []}) == []


def searched(folder: Path, server: Server, *queries: str) -> list[list[Evidence]]:
    retriever = Serper("web-key", url=server.url)

    async def main(journal: Journal) -> list[list[Evidence]]:
        return [await evidence_for(query, retriever, journal) for query in queries]

    with Journal(folder, {}) as journal:
        return asyncio.run(main(journal))


def test_a_query_is_sent_once_cut_to_length_with_its_locale(tmp_path: Path) -> None:
    with Server(lambda call: Answer(json.dumps(RESULTS).encode())) as server:
        first = searched(tmp_path, server, "what is it", "what  is\nit", "x" * 900)
        assert first[0] == first[1] == evidence_of(RESULTS)
        assert searched(tmp_path, server, "what is it")[0] == first[0]
    bodies = [call.json for call in server.calls]
    assert [body["q"] for body in bodies] == ["what is it", "x" * 400]
    assert (bodies[0]["gl"], bodies[0]["hl"]) == ("us", "en")
    assert server.calls[0].headers["x-api-key"] == "web-key"


def test_a_search_that_fails_is_repeated_and_then_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: real(0))

    def script(call: Call) -> Answer:
        return Answer(b"{}", 503) if call.number < 2 else Answer(b"<html>") if call.number == 2 else Answer(b"{}")

    with Server(script) as server:
        assert searched(tmp_path, server, "q") == [[]]
        assert len(server.calls) == 4
    with Server(lambda call: Answer(b"no", 403)) as server:
        with pytest.raises(ServiceFailed, match="403"):
            searched(tmp_path, server, "other")
        assert len(server.calls) == 1
