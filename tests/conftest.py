"""What the workspace's tests share: its packages, and a copy of the checkout as a commit would hold it."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import pytest


@dataclass(frozen=True)
class Package:
    """One package of the workspace: its folder and what its pyproject.toml says."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def project(self) -> dict[str, Any]:
        return self.metadata["project"]

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def requirements(self) -> list[str]:
        """Requirements of the package and of all its extras, as written."""
        groups = [self.project.get("dependencies", []), *self.project.get("optional-dependencies", {}).values()]
        return [text for group in groups for text in group]

    @property
    def smoke(self) -> str:
        """The package's tiny job, a command line that runs with the declared dependencies alone."""
        return self.metadata["tool"]["leanformers"]["smoke"]


def read_packages(root: Path = environment.ROOT) -> list[Package]:
    found = environment.members(root)
    return [Package(folder, tomllib.loads((folder / "pyproject.toml").read_text())) for folder in found]


def repository_files() -> list[Path]:
    """Files that a commit of everything would hold: tracked or new, not ignored, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(Path(name) for name in listed.split("\0") if name and (environment.ROOT / name).is_file())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test for every `package` of the workspace, every `method` (under packages/), every console `command`."""
    everything = read_packages()
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", everything, ids=lambda package: package.name)
    if "method" in metafunc.fixturenames:
        methods = [package for package in everything if package.folder.parent.name == "packages"]
        metafunc.parametrize("method", methods, ids=lambda package: package.name)
    if "command" in metafunc.fixturenames:
        commands = {name: call for package in everything for name, call in package.project.get("scripts", {}).items()}
        metafunc.parametrize("command", commands.values(), ids=commands.keys())


@pytest.fixture(scope="session")
def packages() -> list[Package]:
    return read_packages()


@pytest.fixture(scope="session")
def files() -> list[Path]:
    return repository_files()


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of its own whose one commit is this checkout with its changes."""
    root = tmp_path_factory.mktemp("snapshot") / "leanformers"
    for file in repository_files():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(environment.ROOT / file, root / file)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "--all"], [*identity, "commit", "-q", "-m", "snapshot"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    return root
