"""A disk that is full names a file; whatever else goes wrong stays as it was said."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from paper_tables.record_options import naming


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_output_or_what_it_named_before(number):
    with pytest.raises(OSError, match="full") as error, naming(Path("page.html")):
        raise OSError(number, "full")
    assert (error.value.errno, error.value.filename) == (number, "page.html")
    with pytest.raises(OSError, match="full") as error, naming(Path("page.html")):
        raise OSError(number, "full", "0.jsonl")
    assert error.value.filename == "0.jsonl"


def test_other_errors_are_not_touched():
    with pytest.raises(PermissionError) as error, naming(Path("page.html")):
        raise PermissionError(errno.EACCES, "not yours")
    assert error.value.filename is None
