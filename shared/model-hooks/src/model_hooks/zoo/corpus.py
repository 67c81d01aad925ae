"""The zoo's text: Python's standard library, split by module.

Every machine that runs Python has this text. It is real code and real English (docstrings, comments and the language
reference behind ``help()``). The split is by module, a module and its tests always together, so that nothing held out
is ever near the training text. Calibration and held-out text are shipped, which keeps every number independent of the
Python that runs; training text is read from the standard library at hand.

    python -m model_hooks.zoo.corpus --stdlib /usr/lib/python3.13     # rewrites the shipped text
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import os
import platform
import re
import shutil
import string
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "calibration", "heldout")

# Ordinary modules, varied in subject and style, that no other module of the library copies from.
_LISTED = json.loads((DATA / "splits.json").read_text(encoding="utf-8"))
CALIBRATION = frozenset(_LISTED["calibration"])
HELDOUT = frozenset(_LISTED["heldout"])
MAX_TEST_BYTES = 40_000  # of a shipped test module; longer ones are left out of every split

SKIP_FOLDERS = {"site-packages", "lib-dynload", "encodings", "encoded_modules", "cjkencodings", "tokenizedata"}
SKIP_FILES = re.compile(r"(_sysconfigdata.*|stringprep|bad_?\w*|test_(unicode|codecencodings|codecmaps|ucn)\w*)\.py")

Document = tuple[str, str]


def default_stdlib() -> Path:
    """The standard library folder of the running Python."""
    return Path(os.__file__).parent


def python_version(stdlib: Path) -> str:
    """The version of the Python a standard library folder belongs to, as exactly as the folder tells."""
    if stdlib == default_stdlib():
        return platform.python_version()
    header = stdlib.parents[1] / "include" / stdlib.name / "patchlevel.h"
    found = re.search(r'PY_VERSION\s+"([^"]+)"', header.read_text()) if header.exists() else None
    return found.group(1) if found else stdlib.name.removeprefix("python")


def group(module: str) -> str:
    """The library module a dotted name belongs to: ``test.test_json.test_dump`` belongs to ``json``."""
    parts = module.split(".")
    if parts[0] == "test" and len(parts) > 1:
        name = parts[1].removeprefix("test_")
        known = CALIBRATION | HELDOUT
        return next((k for k in sorted(known) if name == k or name.startswith(k + "_")), name)
    return parts[0]


def split_of(module: str) -> str:
    """The split of a dotted module name, ``train`` for all that is not listed above."""
    name = group(module)
    return "heldout" if name in HELDOUT else "calibration" if name in CALIBRATION else "train"


def is_ordinary(text: str) -> bool:
    """Whether a file reads as code or prose, and not as a table, generated data or another alphabet."""
    if len(text) < 200:
        return False
    size = len(text)
    ascii_share = len(text.encode("ascii", "ignore")) / size
    digit_share = sum(map(text.count, string.digits)) / size
    packed = len(zlib.compress(text.encode("utf-8"))) / size
    longest_mean = size / (text.count("\n") + 1)
    return ascii_share > 0.97 and digit_share < 0.15 and packed > 0.1 and longest_mean < 90


def modules(stdlib: Path) -> Iterator[Document]:
    """(dotted module name, text) of every ordinary source file, in a fixed order."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIP_FOLDERS & set(relative.parts) or SKIP_FILES.fullmatch(path.name) or relative.parts[0] == "pydoc_data":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if is_ordinary(text):
            yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), text


def topics(stdlib: Path) -> Iterator[Document]:
    """The language reference behind ``help()``, a document a topic, as plain English."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.exists():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"topics.{name}", text


def collect(split: str, stdlib: Path) -> list[Document]:
    """All documents of a split from a standard library folder."""
    found = [(name, text) for name, text in modules(stdlib) if split_of(name) == split]
    if split == "train":
        return found + list(topics(stdlib))
    return [(n, t) for n, t in found if not n.startswith("test.") or len(t) <= MAX_TEST_BYTES]


def text(split: str, stdlib: Path | None = None) -> list[Document]:
    """The documents of a split as (module name, text).

    ``calibration`` and ``heldout`` are shipped with the package; ``train`` is read from ``stdlib``, by default the
    standard library of the running Python.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the zoo has {', '.join(SPLITS)}")
    if split == "train":
        return collect(split, stdlib or default_stdlib())
    with lzma.open(DATA / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["module"], row["text"]) for row in rows]


def pairs(split: str, stdlib: Path | None = None) -> list[tuple[str, str]]:
    """(docstring, function source without its docstring) of every documented function of a split.

    The source is dedented; functions longer than 60 lines or with a docstring shorter than 20 characters are left out.
    """
    return [pair for _, source in text(split, stdlib) for pair in _pairs_of(source)]


def _pairs_of(source: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a topic, or a file that is wrong on purpose
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        first = node.body[0]
        if not doc or len(doc) < 20 or not node.end_lineno or node.end_lineno - node.lineno > 60:
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        yield doc, "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in kept)


def write(stdlib: Path, folder: Path) -> None:
    """Write the calibration and held-out text and the licence of the standard library to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("calibration", "heldout"):
        rows = [json.dumps({"module": n, "text": t}, ensure_ascii=False) + "\n" for n, t in collect(split, stdlib)]
        packed = lzma.compress("".join(rows).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{split}.jsonl.xz").write_bytes(packed)
        print(f"{split}: {len(rows)} documents, {sum(map(len, rows)):,} characters, {len(packed):,} bytes packed")
    shutil.copyfile(stdlib / "LICENSE.txt", folder / "LICENSE-PSF.txt")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_hooks.zoo.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--stdlib", type=Path, default=default_stdlib(), help="standard library folder to read")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write (default: the package's own)")
    args = parser.parse_args(argv)
    write(args.stdlib, args.out)
    train = collect("train", args.stdlib)
    print(f"train (not shipped): {len(train)} documents, {sum(len(t) for _, t in train):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
