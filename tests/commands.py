"""How the tests of every package call its command: in this process, as its users would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result


class Command:
    """A package's typer app."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def call(self, *arguments: Any) -> Result:
        return CliRunner().invoke(self.app, [str(a) for a in arguments])

    def said(self, *arguments: Any) -> dict[str, Any]:
        """What `--json` prints, after success."""
        result = self.call(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout, parse_constant=pytest.fail)  # type: ignore[no-any-return]

    def refused(self, message: str, *arguments: Any) -> None:
        """Exit 2, one line on stderr that holds `message`, and nothing written to the working folder."""
        assert not Path("uv.lock").exists(), "the working folder is the checkout, where others write too"
        before = sorted(Path.cwd().rglob("*"))
        result = self.call(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert "Traceback" not in result.stderr
        assert sorted(Path.cwd().rglob("*")) == before
