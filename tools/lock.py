"""Writes and checks uv.lock: versions and hashes of everything, and no index address.

    python3 tools/lock.py                       lock again; keeps the locked versions where they still fit
    python3 tools/lock.py --upgrade-package X   the same, with any options of `uv lock`
    python3 tools/lock.py --check               fails on an address, a missing hash, or a lock that is out of date

An address in the lock would tie every install to the index it was made with. So each source becomes
`{ registry = "index" }` and each artifact its file name; the hashes stay and are what an install is checked against,
whichever index or mirror serves the files. `uv export --frozen` reads such a lock as it is (tools/environment.py
installs from that); plain `uv sync` resolves again with the locked versions as preferences and writes addresses into
the working copy, which this tool takes out again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from environment import ROOT, find_uv, members, run, say, site_environment

LOCK = ROOT / "uv.lock"
SOURCE = re.compile(r'\{ registry = "[^"]*" \}')
ARTIFACT = re.compile(r'\{ (?:url|path) = "(?:[^"]*/)?([^"/]+)"(?=, hash = )')
ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://|"/|"~|"[A-Za-z]:\\')


def clean(text: str) -> str:
    """The text of a uv.lock without its addresses."""
    return ARTIFACT.sub(r'{ path = "\1"', SOURCE.sub('{ registry = "index" }', text))


def addresses(text: str) -> list[str]:
    """Lines of a lock that hold an address, an absolute path, or an index other than "index"."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        foreign = [source for source in SOURCE.findall(line) if source != '{ registry = "index" }']
        if foreign or ADDRESS.search(line):
            found.append(f"uv.lock:{number}: {line.strip()[:120]}")
    return found


def unhashed(text: str) -> list[str]:
    """Names of the packages from an index that have an artifact without a hash, or no artifact."""
    names = []
    for package in tomllib.loads(text)["package"]:
        if "registry" in package["source"]:
            artifacts = package.get("wheels", []) + [package[key] for key in ("sdist",) if key in package]
            if not artifacts or any(not artifact.get("hash", "").startswith("sha256:") for artifact in artifacts):
                names.append(package["name"])
    return names


def resolution(text: str) -> dict[str, Any]:
    """What a lock decides: all of it but the lists of files, which an index may add to, and uv's order of markers."""
    lock = tomllib.loads(text)
    decided = {key: value for key, value in lock.items() if key not in ("package", "revision")}
    for key in ("resolution-markers", "supported-markers"):
        decided[key] = sorted(decided.get(key, []))
    for package in lock["package"]:
        entry = {key: value for key, value in package.items() if key not in ("wheels", "sdist")}
        if "resolution-markers" in entry:
            entry["resolution-markers"] = sorted(entry["resolution-markers"])
        decided[f"{package['name']} {package['version']}"] = entry
    return decided


def locked_again() -> str:
    """The lock that uv makes now from the committed one, in a copy, so that the working tree stays as it is."""
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room)
        for file in [LOCK, ROOT / "pyproject.toml", *(folder / "pyproject.toml" for folder in members())]:
            (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy / file.relative_to(ROOT))
        (copy / "wheels").mkdir()
        command = [find_uv(), "lock", "--quiet", "--python", sys.executable]
        run(command, cwd=copy, env=site_environment(), stderr=subprocess.PIPE)
        return clean((copy / "uv.lock").read_text())


def check() -> int:
    text = LOCK.read_text()
    problems = addresses(text)
    if problems:
        more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
        say("\n".join(problems[:5]) + more + "\nuv.lock holds addresses: run `python3 tools/lock.py` and commit it")
        return 1
    if names := unhashed(text):
        say(f"uv.lock has no sha256 for {', '.join(names)}: run `python3 tools/lock.py`")
        return 1
    now, then = resolution(locked_again()), resolution(text)
    differing = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if differing:
        say(f"uv.lock is out of date for {', '.join(differing)}: run `python3 tools/lock.py` and commit it")
        return 1
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return check()
    run([find_uv(), "lock", "--python", sys.executable, *arguments], cwd=ROOT, env=site_environment())
    LOCK.write_text(clean(LOCK.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
