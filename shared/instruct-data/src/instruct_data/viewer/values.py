"""Values as the page can hold them: strict JSON without NaN, exact numbers, and the plain text of anything."""

from __future__ import annotations

import gzip
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_EXACT = 2**53  # JavaScript's numbers are doubles


def plain(value: Any) -> Any:
    """`value` as strict JSON has it. NaN and infinities become None: no score is not a number.

    An integer beyond 2**53 becomes its digits as a string, since JavaScript would change it. numpy's scalars and arrays
    become Python's, tuples and sets lists, and what JSON has no word for (a date, bytes) its `str`.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if abs(value) <= LARGEST_EXACT else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):  # numpy's, and torch's on the CPU
        return plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Sequence | set | frozenset):
        return [plain(inner) for inner in value]
    return str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(value: Any) -> str:
    """The words of a plain value: of a conversation its turns, one after the other, without the keys."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for key in ("value", "content"):  # a turn of sharegpt, of messages
            if isinstance(value.get(key), str):
                return str(value[key])
        return " ".join(filter(None, map(flat, value.values())))
    if isinstance(value, list):
        return " ".join(filter(None, map(flat, value)))
    return json.dumps(value)


def packed(value: Any) -> str:
    """JSON, gzipped, in base64: safe inside any tag, the same bytes every time. Lone surrogates survive as escapes."""
    options: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}
    try:
        content = json.dumps(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:  # UTF-8 has no lone surrogates
        content = json.dumps(value, **options).encode()
    return b64encode(gzip.compress(content, 5, mtime=0)).decode()
