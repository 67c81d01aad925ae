"""`write_page`: rows and the page's own code into one HTML file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from model_hooks.files import atomic_write

from .columns import BLOCK, Column, Gathered, Texts, encode, gather, kind_of, pairs
from .values import is_number, packed, plain

SCRIPTS = ("data.js", "state.js", "filter.js", "plot.js", "list.js", "diff.js", "facts.js", "detail.js", "main.js")


def write_page(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    score: str | None = "ifd_ppl",
    text: Sequence[str] = ("instruction", "input", "response"),
    columns: Sequence[str] | None = None,
    summary: Mapping[str, Any] | None = None,
    facts: bool = False,
) -> Path:
    """Write `rows` to `path` as one HTML page that needs no server and no network. Returns the path.

    rows: mappings of names to JSON-like values, read once; None, NaN and infinities are shown as "not scored" and left
        out of the histogram. Texts may be strings or conversations (lists of turns, sharegpt or messages).
    score: the column that the histogram shows and the list is sorted by at first; None for rows without one.
    text: the columns shown as texts, first to last; those that no row has are passed over. The list shows the beginning
        of the first and the last. Pairs such as `before` and `after` get a word diff.
    columns: the other columns to keep, in this order (default: all). What they are (numbers, categories, short labels,
        texts) is told from their values.
    summary: a few figures for the page's top, such as the model and the counts.
    facts: mark numbers, links and names in changes: those that are kept, lost, and new.

    At most 400,000 rows. The texts are held packed, the rest of the rows unpacked, about 100 bytes a value. The file is
    written whole or not at all. Raises `RequestError` if no row has the column `score`, if it holds anything but
    numbers, if no row has one of `columns`, or if a row is no mapping.
    """
    if isinstance(text, str) or isinstance(columns, str):
        raise RequestError(f"text={text!r}, columns={columns!r}: each must be a list of names, not one string")
    wanted = None if columns is None else list(dict.fromkeys([*([score] if score else []), *text, *columns]))
    gathered = gather(rows, text, wanted)
    _check_names(gathered, score, columns or ())
    changes = pairs(gathered.columns)
    kinds = {name: _kind(column, score, changes) for name, column in gathered.columns.items()}
    shown = [name for name in text if name in kinds] or [name for name, kind in kinds.items() if kind == "text"]
    head = {
        "title": title,
        "rows": gathered.count,
        "block": BLOCK,
        "score": score if score in kinds else None,
        "text": shown,
        "characters": sum(c.values.characters for c in gathered.columns.values() if isinstance(c.values, Texts)),
        "pairs": changes,
        "facts": facts,
        "summary": [[str(key), plain(value)] for key, value in (summary or {}).items()],
        "columns": [encode(c, kinds[name], name in shown[:1] + shown[-1:]) for name, c in gathered.columns.items()],
    }
    atomic_write(path, _html(title, head, gathered).encode("utf-8", "xmlcharrefreplace"))
    return Path(path)


def _check_names(gathered: Gathered, score: str | None, columns: Sequence[str]) -> None:
    if not gathered.count:
        return
    absent = [name for name in columns if name not in gathered.columns]
    if absent:
        raise RequestError(f"no row has the column {absent[0]!r}; leave it out of columns={list(columns)}")
    if score is None:
        return
    if score not in gathered.columns:
        raise RequestError(f"no row has the score {score!r}; the columns are {', '.join(gathered.columns)}; "
                           "name one of them, or None for a page without a score")  # fmt: skip
    values = gathered.columns[score].values
    wrong = [v for v in values if v is not None and not is_number(v)] if isinstance(values, list) else ["a text"]
    if wrong:
        raise RequestError(f"the score {score!r} holds {wrong[0]!r}; give a column of numbers and None")


def _kind(column: Column, score: str | None, changes: Sequence[tuple[str, str]]) -> str:
    """The column's kind. A column that turns out to be a text is packed here."""
    if isinstance(column.values, Texts):
        column.values.close()
        return "text"
    kind = "number" if column.name == score else kind_of(column.name, column.values)
    if kind != "number" and any(column.name in pair for pair in changes):
        kind = "text"
    if kind == "text":
        texts = Texts()
        for value in column.values:
            texts.append(value)
        texts.close()
        column.values = texts
    return kind


def _html(title: str, head: Mapping[str, Any], gathered: Gathered) -> str:
    """The page. Data is base64, so that no text of a record can end a tag; the title is the only text in the open.

    The policy lets nothing run but our script and nothing load at all, whatever a record may contain.
    """
    source = files(__package__)
    style = source.joinpath("page.css").read_text("utf-8")
    script = "\n".join(source.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    data = [_data("head", head)]
    for number, column in enumerate(gathered.columns.values()):
        if isinstance(column.values, Texts):
            data += [_block(f"text-{number}-{index}", block) for index, block in enumerate(column.values.blocks)]
    parts = {
        "title": escape(title),
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        "style": style,
        "data": "\n".join(data),
        "script": script,
    }
    page = source.joinpath("page.html").read_text("utf-8")
    pieces = page.split("@@")  # text, name, text, name, ..., text: a value is never searched for names
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _data(name: str, value: Any) -> str:
    return _block(name, packed(value))


def _block(name: str, content: str) -> str:
    return f'<script type="application/gzip" id="{name}">{content}</script>'


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
