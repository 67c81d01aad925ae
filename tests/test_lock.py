"""uv.lock holds versions and hashes and no address; the tool that keeps it so works."""

from __future__ import annotations

import lock
import pytest

MADE_BY_UV = """version = 1
revision = 5
requires-python = ">=3.11"
resolution-markers = ["python_full_version >= '3.12'", "python_full_version < '3.12'"]

[[package]]
name = "six"
version = "1.17.0"
source = { registry = "https://index.example/simple" }
dependencies = [{ name = "numpy", version = "2.4.6", source = { registry = "https://index.example/simple" } }]
sdist = { url = "https://files.example/a1/six-1.17.0.tar.gz", hash = "sha256:aa", size = 1 }
wheels = [
    { url = "https://files.example/b2/six-1.17.0-py3-none-any.whl", hash = "sha256:bb", size = 2 },
    { path = "../wheels/six-1.17.0-cp311-cp311-linux.whl", hash = "sha256:cc", size = 3 },
]

[[package]]
name = "ours"
version = "0.1.0"
source = { editable = "packages/ours" }
"""


def test_clean_keeps_names_and_hashes_and_drops_addresses():
    text = lock.clean(MADE_BY_UV)
    assert "://" not in text
    assert text.count('registry = "index"') == 2
    assert '{ path = "six-1.17.0.tar.gz", hash = "sha256:aa", size = 1 }' in text
    assert '{ path = "six-1.17.0-py3-none-any.whl", hash = "sha256:bb", size = 2 }' in text
    assert '{ path = "six-1.17.0-cp311-cp311-linux.whl", hash = "sha256:cc", size = 3 }' in text
    assert 'editable = "packages/ours"' in text
    assert lock.clean(text) == text


def test_addresses_are_found_line_by_line():
    found = lock.addresses(MADE_BY_UV)
    assert [line.split(":")[1] for line in found] == ["9", "10", "11", "13"]
    assert lock.addresses(lock.clean(MADE_BY_UV)) == []


@pytest.mark.parametrize(
    "line",
    ['source = { registry = "wheels" }', 'source = { editable = "/srv/ours" }', 'url = "git+ssh://host/x"'],
)
def test_other_indexes_and_absolute_paths_are_addresses(line):
    assert lock.addresses(f'version = 1\n{line}\nname = "x"') == [f"uv.lock:2: {line}"]


def test_a_package_without_hashes_is_named():
    assert lock.unhashed(MADE_BY_UV) == []
    assert lock.unhashed(MADE_BY_UV.replace('hash = "sha256:bb", ', "")) == ["six"]


def test_resolution_ignores_the_list_of_files_and_the_order_of_markers_only():
    text = lock.clean(MADE_BY_UV)
    reordered = text.replace(
        "[\"python_full_version >= '3.12'\", \"python_full_version < '3.12'\"]",
        "[\"python_full_version < '3.12'\", \"python_full_version >= '3.12'\"]",
    ).replace('    { path = "six-1.17.0-py3-none-any.whl", hash = "sha256:bb", size = 2 },\n', "")
    assert reordered != text
    assert lock.resolution(reordered) == lock.resolution(text)
    assert lock.resolution(text.replace("2.4.6", "2.4.5")) != lock.resolution(text)
    assert lock.resolution(text.replace("0.1.0", "0.2.0")) != lock.resolution(text)


def test_the_check_fails_on_an_address(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lock, "LOCK", tmp_path / "uv.lock")
    lock.LOCK.write_text(MADE_BY_UV)
    assert lock.check() == 1
    assert "uv.lock:9" in capsys.readouterr().err


def test_the_check_fails_on_a_stale_lock_and_passes_on_a_fresh_one(monkeypatch, tmp_path, capsys):
    text = lock.clean(MADE_BY_UV)
    monkeypatch.setattr(lock, "LOCK", tmp_path / "uv.lock")
    lock.LOCK.write_text(text)
    monkeypatch.setattr(lock, "locked_again", lambda: text.replace("1.17.0", "1.18.0"))
    assert lock.check() == 1
    assert "six 1.17.0" in capsys.readouterr().err
    monkeypatch.setattr(lock, "locked_again", lambda: text)
    assert lock.check() == 0
