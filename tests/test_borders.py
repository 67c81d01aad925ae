"""The import borders hold, and a package that crosses one is caught."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import borders
import environment
import pytest

TREE = {
    "shared/model-hooks": ("model_hooks", [], ""),
    "shared/paper-tables": ("paper_tables", ["model-hooks==0.1.0"], "import model_hooks\n"),
    "packages/meo": ("meo", ["model-hooks==0.1.0"], "import model_hooks\n"),
    "packages/loki": ("loki", ["paper-tables==0.1.0"], "import paper_tables\n"),
}


def build(root: Path, **bodies: str) -> Path:
    """A small workspace; `bodies` replaces what a package's __init__.py holds."""
    (root / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["packages/*", "shared/*"]\n')
    for folder, (name, dependencies, body) in TREE.items():
        source = root / folder / "src" / name
        source.mkdir(parents=True)
        project = f'[project]\nname = "{name.replace("_", "-")}"\ndependencies = {dependencies!r}\n'
        (root / folder / "pyproject.toml").write_text(project)
        (source / "__init__.py").write_text(bodies.get(name, body))
    return root


def verdict(root: Path) -> subprocess.CompletedProcess[str]:
    script = environment.ROOT / "tools" / "borders.py"
    return subprocess.run([sys.executable, str(script), str(root)], capture_output=True, text=True)


def test_the_workspace_keeps_its_borders():
    done = subprocess.run([sys.executable, "tools/borders.py"], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_contracts_name_every_package(packages):
    roots = tomllib.loads(borders.contracts(borders.read_members()))["tool"]["importlinter"]["root_packages"]
    assert sorted(roots) == sorted(package.import_name for package in packages)


def test_a_tree_that_keeps_the_borders_passes(tmp_path):
    done = verdict(build(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "body"),
    [
        pytest.param("meo", "def late():\n    import loki\n", id="method imports method"),
        pytest.param("paper_tables", "from meo import x\n", id="runner imports method"),
        pytest.param("model_hooks", "import paper_tables\n", id="sibling that is not declared"),
        pytest.param("meo", "import paper_tables.runner\n", id="shared package that is not declared"),
    ],
)
def test_a_crossing_is_caught(tmp_path, name, body):
    done = verdict(build(tmp_path, **{name: body}))
    assert done.returncode != 0
    assert "broken" in done.stdout


def test_a_dependency_on_a_method_package_is_caught():
    member = borders.Member("meo", True, frozenset({"loki"}))
    problems = borders.wrong_dependencies([member, borders.Member("loki", True, frozenset())])
    assert problems == ["meo declares a dependency on loki, a method package: move what both need to shared/"]
