"""Evidence for questions that need facts (the paper's step 2): a corpus of one's own by BM25, or a web search."""

from __future__ import annotations

import asyncio
import json
import math
import re
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from instruct_data import Journal
from instruct_data.journal import content_key
from instruct_data.llm import ServiceFailed
from model_hooks.errors import RequestError

SNIPPETS = 5
LONGEST_QUERY = 400  # characters
DROPPED = ("Missing:", "Duration:", "Posted:")
SERPER = "https://google.serper.dev/search"


@dataclass(frozen=True)
class Evidence:
    """A text that may help, where it is from ("" where that has no address), and its rank from 1."""

    text: str
    source: str
    rank: int


class Retriever(Protocol):
    """`settings` is what, beside the query, decides the result: part of the key under which it is kept."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    async def find(self, query: str) -> list[Evidence]: ...


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Corpus:
    """Okapi BM25 over texts in memory (Robertson and Zaragoza, 2009): k1 = 1.2, b = 0.75, idf = ln(1 + (N - n + 0.5) /
    (n + 0.5)). Ties go to the earlier text."""

    K1, B = 1.2, 0.75

    def __init__(self, documents: Iterable[tuple[str, str]], snippets: int = SNIPPETS) -> None:
        """documents: (text, source) pairs."""
        self.documents = list(documents)
        self.snippets = snippets
        self.postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.lengths: list[int] = []
        for number, (text, _) in enumerate(self.documents):
            counts = Counter(words_of(text))
            self.lengths.append(sum(counts.values()))
            for word, count in counts.items():
                self.postings[word].append((number, count))
        self.settings = {"provider": "bm25", "snippets": snippets, "corpus": content_key(self.documents)}

    @staticmethod
    def read(path: str | Path, snippets: int = SNIPPETS) -> Corpus:
        """From JSON, JSONL or Parquet with a column `text`, and `url`, `source` or `title`. Raises `RequestError`."""
        from instruct_data.formats import open_source

        documents = []
        for number, row in enumerate(open_source(path, None, None, None, "strict").rows()):
            data = row.data if isinstance(row.data, Mapping) else {}
            if row.fault is not None or not isinstance(data.get("text"), str):
                reason = row.fault or "has no text; each line of a corpus needs a key `text`"
                raise RequestError(f"{row.where}, document {number}: {reason}")
            documents.append((data["text"], str(data.get("url") or data.get("source") or data.get("title") or "")))
        if not documents:
            raise RequestError(f"{path} holds no document")
        return Corpus(documents, snippets)

    def scores(self, query: str) -> dict[int, float]:
        """Documents that have a word of the query, with their scores."""
        mean = sum(self.lengths) / len(self.lengths)
        found: dict[int, float] = defaultdict(float)
        for word in set(words_of(query)):
            postings = self.postings.get(word, [])
            idf = math.log(1 + (len(self.documents) - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, count in postings:
                norm = self.K1 * (1 - self.B + self.B * self.lengths[number] / mean)
                found[number] += idf * count * (self.K1 + 1) / (count + norm)
        return found

    async def find(self, query: str) -> list[Evidence]:
        scores = self.scores(query)
        best = sorted(scores, key=lambda number: (-scores[number], number))[: self.snippets]
        return [Evidence(*self.documents[number], rank) for rank, number in enumerate(best, 1)]


class Serper:
    """Google's results by serper.dev, `concurrency` queries at a time. The key is from the environment or a file."""

    def __init__(
        self, key: str, *, url: str = SERPER, snippets: int = SNIPPETS, locale: tuple[str, str] = ("us", "en"),
        concurrency: int = 4,
    ) -> None:  # fmt: skip
        self.key, self.url, self.snippets, self.locale = key, url, snippets, locale
        self.settings = {"provider": "serper", "snippets": snippets, "locale": list(locale)}
        self._places = asyncio.Semaphore(concurrency)

    async def find(self, query: str) -> list[Evidence]:
        async with self._places:
            for wait in (0.5, 1.0, 2.0, None):
                try:
                    return evidence_of(await asyncio.to_thread(self._search, query), self.snippets)
                except (OSError, ValueError) as error:  # DNS, timeouts, 5xx, no JSON
                    status = getattr(error, "code", 500)
                    if wait is None or (status < 500 and status != 429):
                        raise ServiceFailed(f"the web search failed: {type(error).__name__} {status}") from None
                    await asyncio.sleep(wait)
        raise AssertionError("not reached")

    def _search(self, query: str) -> Any:
        body = json.dumps({"q": query, "gl": self.locale[0], "hl": self.locale[1]}).encode()
        headers = {"X-API-KEY": self.key, "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=30) as reply:
            return json.loads(reply.read())


def evidence_of(results: Any, snippets: int = SNIPPETS) -> list[Evidence]:
    """The first snippets of a page of results: answer box, knowledge graph, then the organic ones, cleaned."""
    found: list[tuple[str, str]] = []
    box = results.get("answerBox") or {}
    for key in ("answer", "snippet", "snippetHighlighted"):
        if box.get(key):
            text = box[key] if isinstance(box[key], str) else ", ".join(map(str, box[key]))
            found.append((text.replace("\n", " "), box.get("link", "")))
            break
    graph = results.get("knowledgeGraph") or {}
    title, link = graph.get("title", ""), graph.get("website", "")
    if graph.get("type"):
        found.append((f"{title}: {graph['type']}", link))
    if graph.get("description"):
        found.append((graph["description"], link))
    found += [(f"{title} {name}: {value}", link) for name, value in (graph.get("attributes") or {}).items()]
    for result in results.get("organic") or ():
        if result.get("snippet"):
            found.append((result["snippet"], result.get("link", "")))
        found += [(f"{k}: {v}", result.get("link", "")) for k, v in (result.get("attributes") or {}).items()]
    clean = [(text.strip(), link) for text, link in found if text.strip() and not text.startswith(DROPPED)]
    return [Evidence(text, link, rank) for rank, (text, link) in enumerate(clean[:snippets], 1)]


async def evidence_for(question: str, retriever: Retriever, journal: Journal) -> list[Evidence]:
    """What the retriever finds, kept in the journal: no query is sent twice."""
    query = " ".join(question.split())[:LONGEST_QUERY]
    key = content_key({"retrieve": dict(retriever.settings), "query": query})
    stored: Sequence[Any] | None = journal.get(key)
    if stored is None:
        stored = [[e.text, e.source, e.rank] for e in await retriever.find(query)]
        journal.append(key, stored)
    return [Evidence(*entry) for entry in stored]
