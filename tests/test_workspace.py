"""Rules that every file and every package of the workspace keeps; a new package is covered by being there."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import environment
import pytest

REQUIREMENT = re.compile(r"^([\w.-]+)(?:\[([\w,.-]+)\])?\s*([^;]*)")
MACHINE_PATH = re.compile(r"(?<![\w.<>{}$-])/(?:root|home|Users|work|tmp|opt|mnt)/[\w.-]+")
INDEX_ADDRESS = re.compile(
    r"https?://(?![\w.-]*\.example\b)[\w.-]*(?:pypi|pythonhosted|pytorch\.org/whl|/simple)[\w./-]*", re.IGNORECASE
)
TEXT = {".py", ".toml", ".lock", ".md", ".yaml", ".yml", ".json", ".cfg", ".txt", ".sh", ".jinja", ""}
STANDARD_LIBRARY_TEXT = "zoo/data"  # the zoo's text and vocabulary are Python's own


def parsed(requirement: str) -> tuple[str, str]:
    """Name and version specifier of a requirement."""
    found = REQUIREMENT.match(requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[3].replace(" ", "")


def test_every_folder_of_packages_and_shared_is_a_member(packages):
    members = {package.folder for package in packages}
    folders = {file.parent for name in ("packages", "shared") for file in (environment.ROOT / name).glob("*/*")}
    folders |= {environment.ROOT / "kernels"} & {file.parent for file in environment.ROOT.glob("kernels/*")}
    assert members == folders


def test_names_agree(package):
    assert package.name == package.folder.name or package.name == f"lean-{package.folder.name}"
    assert (package.folder / "src" / package.import_name / "__init__.py").is_file()
    assert (package.folder / "README.md").read_text().startswith(f"# {package.name}")


def test_one_version_and_one_range_of_pythons(packages):
    assert len({package.project["version"] for package in packages}) == 1
    assert {package.project["requires-python"] for package in packages} == {">=3.11,<3.14"}


def test_siblings_are_pinned_to_the_common_version_and_come_from_the_workspace(package, packages):
    versions = {other.name: other.project["version"] for other in packages}
    sources = package.metadata.get("tool", {}).get("uv", {}).get("sources", {})
    siblings = [text for text in package.requirements if parsed(text)[0] in versions]
    for text in siblings:
        name, specifier = parsed(text)
        assert specifier == f"=={versions[name]}", f"{package.name}: {text}"
    assert {parsed(text)[0] for text in siblings} == set(sources)
    assert all(source == {"workspace": True} for source in sources.values())


def test_requirements_have_a_lower_bound_and_the_next_major_as_upper(package, packages):
    names = {other.name for other in packages}
    for text in package.requirements:
        name, specifier = parsed(text)
        if name in names:
            continue
        bounds = dict(re.findall(r"(>=|<)([\d.]+)", specifier))
        assert set(bounds) == {">=", "<"}, f"{package.name}: {text}"
        assert bounds["<"].isdigit(), f"{package.name}: the upper bound of {text} is a major version"
        assert int(bounds["<"]) > int(bounds[">="].split(".")[0]), f"{package.name}: {text}"


def test_a_method_package_has_one_command_of_its_own_name_and_a_tiny_job(method):
    assert list(method.project["scripts"]) == [method.name]
    assert method.smoke.split()[0] == method.name
    assert list(method.project["entry-points"]["paper_tables.tables"]) == [method.name]


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_no_table_asks_a_zoo_model_for_what_it_is_near_chance_at():
    """Tables of a model that guesses would say nothing: each task that one is asked for is in its card, and high."""
    from model_hooks.zoo import resolve
    from model_hooks.zoo.export import COMPETENT
    from paper_tables import installed

    tables = [table for paper in installed()[0].values() for table in paper.tables().values()]
    cells = [unit.cell for table in tables for scale in ("quick", "tiny") for unit in table.units(scale)]
    asked = {(cell["model"], task) for cell in cells for task in cell.get("tasks", ()) if task.startswith("zoo_")}
    assert asked
    for model, task in asked:
        stated = json.loads((resolve(model) / "measurements.json").read_text())[task]
        assert stated >= COMPETENT, f"{model} answers {stated} of {task}"


def test_every_import_is_declared(package, packages):
    """By the package, for its core or an extra, or by a sibling that it depends on (both have the same version)."""
    owners = importlib.metadata.packages_distributions()
    siblings = {other.name: {parsed(text)[0] for text in other.requirements} for other in packages}
    declared = {parsed(text)[0] for text in package.requirements}
    for name in declared & siblings.keys():
        declared |= siblings[name]
    for file in sorted((package.folder / "src").rglob("*.py")):
        for name in imported(file) - sys.stdlib_module_names - {package.import_name}:
            distributions = {parsed(owner)[0] for owner in owners.get(name, [name])}
            where = file.relative_to(environment.ROOT)
            assert distributions & declared, f"{where} imports {name}, which is not declared"


def test_every_trainer_waits_for_the_files_of_all_processes(files):
    bases = [
        (path.as_posix(), found)
        for path in files
        if path.suffix == ".py" and "src" in path.parts
        for found in re.findall(r"^class \w+\((.*Trainer)\):", (environment.ROOT / path).read_text(), re.MULTILINE)
    ]
    assert len(bases) >= 6
    assert [where for where, found in bases if "WholeCheckpoints" not in found] == []


def test_python_files_are_short(files):
    lengths = {file: len((environment.ROOT / file).read_text().splitlines()) for file in files if file.suffix == ".py"}
    assert lengths
    assert {str(file): length for file, length in lengths.items() if length > 400} == {}


def offending(text: str) -> list[str]:
    """Index addresses and paths of one machine in a text."""
    return INDEX_ADDRESS.findall(text) + MACHINE_PATH.findall(text)


@pytest.mark.parametrize(
    "text",
    ["https://" + "pypi.org/simple", "see " + "/".join(("", "root", ".cache", "x")), "/".join(("'", "home", "me"))],
)
def test_addresses_and_machine_paths_are_recognised(text):
    assert offending(text)


def test_no_file_holds_an_index_address_or_a_machine_path(files):
    found = {}
    for file in files:
        if file.suffix in TEXT and STANDARD_LIBRARY_TEXT not in file.as_posix():
            found[str(file)] = offending((environment.ROOT / file).read_text())
    assert "uv.lock" in found
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_no_file_is_a_pickle_and_none_is_large(files):
    assert [str(file) for file in files if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}] == []
    sizes = {str(file): (environment.ROOT / file).stat().st_size for file in files}
    assert {name: size for name, size in sizes.items() if size > 24 * 2**20} == {}


def test_the_lock_knows_every_package(packages):
    lock = tomllib.loads((environment.ROOT / "uv.lock").read_text())
    assert sorted(lock["manifest"]["members"]) == sorted(package.name for package in packages)
