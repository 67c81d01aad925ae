"""One package alone: from its folder, from a git URL, from wheel files, each in an environment that holds nothing else.

A worker of pytest makes one environment, and every installation removes what it does not need itself (`--exact`): the
same packages as in an empty one, but Python need not compile torch and transformers for every test again.

Third-party versions are held to the lock's, so that what is tested is our metadata and not the index of the day.
The names of some packages belong to other projects on the public index, so every one of ours must come from here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import environment
import pytest
from filelock import FileLock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# of extras and the developer's group, unless it is what a package asks for
NEVER = {"deepspeed", "lm-eval", "peft", "pytest", "ruff", "sentence-transformers", "trl"}


@cache
def settings() -> tuple[str, dict[str, str]]:
    """uv, and an environment without a trace of the workspace."""
    kept = {key: value for key, value in environment.site_environment().items() if not key.startswith("PYTHON")}
    kept["PATH"] = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if ".venv" not in part)
    return str(environment.find_uv()), kept


def call(*command: object, cwd: Path, **extra: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=settings()[1] | extra, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def locked_versions(tmp_path_factory):
    """The lock's third-party versions as constraints."""
    uv, _ = settings()
    options = [*environment.EXPORT, "--no-hashes", "--no-header"]
    file = tmp_path_factory.mktemp("lock") / "constraints.txt"
    file.write_text(call(uv, "export", "--quiet", *options, cwd=environment.ROOT))
    return file


@pytest.fixture(scope="session")
def wheels(snapshot):
    """Wheel files of all packages, by distribution name; made once for all workers."""
    folder = Path(os.environ["LEANFORMERS_TEST_HOME"]) / "wheels"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            call(settings()[0], "build", "--quiet", "--all-packages", "--out-dir", f"{folder}.new", cwd=snapshot)
            Path(f"{folder}.new").rename(folder)
    return {file.name.split("-")[0].replace("_", "-"): file for file in folder.glob("*.whl")}


def needed(name: str, packages) -> list[str]:
    """A package of the workspace and the siblings that its plain install needs."""
    projects = {package.name: package.project for package in packages}
    names, open_names = [], [name]
    while open_names:
        names.append(open_names.pop())
        requirements = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in projects[names[-1]]["dependencies"]]
        open_names += [other for other in requirements if other in projects and other not in [*names, *open_names]]
    return names


def test_wheels_hold_everything_that_the_package_reads(wheels, package):
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheels[package.name])], capture_output=True, text=True
    )
    inside = {line.split()[0] for line in listed.stdout.splitlines()[1:] if line.split()}
    wanted = set()
    inner = {"src": "", "configs": f"{package.import_name}/_configs", "tables": f"{package.import_name}/_tables"}
    for start, place in inner.items():
        for file in (package.folder / start).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                wanted.add((Path(place) / file.relative_to(package.folder / start)).as_posix())
    assert wanted
    assert wanted <= inside


def test_the_readme_names_the_wheel_files_that_its_package_needs(packages):
    (line,) = re.findall(r"uv pip install (dist/llm_drop.*)", (environment.ROOT / "README.md").read_text())
    named = [re.fullmatch(r"dist/(\w+)-\*\.whl", word)[1].replace("_", "-") for word in line.split()]
    assert sorted(named) == sorted(needed("llm-drop", packages))


@pytest.fixture(scope="session")
def venv(tmp_path_factory):
    """An environment with its own Python, empty at first."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    call(settings()[0], "venv", "--quiet", "--python", sys.executable, folder, cwd=folder.parent)
    return folder


@pytest.mark.parametrize("source", ["folder", "git", "wheels"])
def test_package_alone(method, source, packages, snapshot, wheels, locked_versions, venv, tmp_path):
    uv, _ = settings()
    own = needed(method.name, packages)
    place = method.folder.relative_to(environment.ROOT).as_posix()
    what = {
        "folder": [f"./{place}"],
        "git": [f"{method.name} @ git+{snapshot.as_uri()}#subdirectory={place}"],
        "wheels": [wheels[name] for name in own],
    }[source]
    room = tmp_path / "room"
    room.mkdir()
    where = snapshot if source == "folder" else room
    install = [uv, "pip", "install", "--quiet", "--exact", "--python", venv, "--constraints", locked_versions]
    call(*install, *what, cwd=where)

    installed = {
        row["name"] for row in json.loads(call(uv, "pip", "list", "--format", "json", "--python", venv, cwd=room))
    }
    assert installed & {package.name for package in packages} == set(own)
    asked = {re.split(r"[^\w-]", text, maxsplit=1)[0] for text in method.project["dependencies"]}
    assert not installed & NEVER - asked
    call(uv, "pip", "check", "--python", venv, cwd=room)
    for name in own:
        (origin,) = venv.glob(f"lib/python3*/site-packages/{name.replace('-', '_')}-*.dist-info/direct_url.json")
        assert json.loads(origin.read_text())["url"].startswith("file://"), f"{name} came from an index"

    home = {"HOME": str(room), "HF_HOME": str(room / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert "Usage" in call(venv / "bin" / method.name, "--help", cwd=room, **home)
    command, *arguments = shlex.split(method.smoke)
    before = set(room.iterdir())
    call(venv / "bin" / command, *arguments, cwd=room, **home)
    made = {file for file in set(room.iterdir()) - before if file.stat().st_size and not file.name.startswith(".")}
    assert made - {room / "hf"}, f"{method.smoke} left no result"
