"""Makes `demo` (a paper that does not exist) importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _bars_as_at_the_start():
    """A test with `--quiet` leaves the next one its bars."""
    from paper_tables.progress import set_quiet

    yield
    set_quiet(False)
