"""The code blocks of a README, and how a test runs them.

Every ```bash and ```python block runs, in order, in one empty folder that sees the repository's own files by links;
the workspace's commands are on the PATH and the Python blocks of a file share their names. Where a block's lines are
nothing but calls of the workspace's commands, they are made in the test's process: starting Python and importing torch
costs more than what most of them do. A comment on the line before a block says otherwise:

    <!-- not run: needs four GPUs -->          the block cannot run in a test, and why
    <!-- run by tests/test_isolation.py -->    another test does what the block says
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

SHELL = set("|&;<>$`*?(){}")  # what only a shell understands
FENCE = re.compile(r"^```(\w*)\s*$")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")
RUN_BY = re.compile(r"<!-- run by (?P<file>\S+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it begins on, and why it is not run here, if so."""

    language: str
    text: str
    line: int
    reason: str | None = None
    run_by: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.reason is None and self.run_by is None

    def commands(self) -> list[list[str]]:
        """The block's commands as lists of words, or none where one of them needs a shell."""
        try:
            words = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        except ValueError:  # a quotation over several lines
            return []
        return [] if any(SHELL & set("".join(line)) for line in words) else [line for line in words if line]


def blocks(file: Path) -> list[Block]:
    """All fenced blocks of a Markdown file, in order."""
    found: list[Block] = []
    start, language, before = None, "", ""
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if start is None and fence:
            start, language = number, fence[1]
        elif start is not None and fence:
            text = "\n".join(lines[start : number - 1])
            reason, other = NOT_RUN.search(before), RUN_BY.search(before)
            found.append(Block(language, text, start, reason and reason["reason"], other and other["file"]))
            start, before = None, ""
        elif start is None and line.strip():
            before = line
    if start is not None:
        raise ValueError(f"{file}:{start}: the block that begins here has no end")
    return found
