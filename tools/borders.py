"""Checks the import borders with import-linter, on contracts made from the folders and the packages' metadata.

A method package (packages/) imports shared packages and kernels, never another method package. A shared package or the
kernels import another one of the workspace only where their pyproject.toml names it as a dependency, and never a
method package (paper_tables finds those by entry point). A new folder is covered by being there.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from environment import ROOT, members, say


@dataclass(frozen=True)
class Member:
    """One package of the workspace: its import name, whether it is a paper's, and the siblings it declares."""

    name: str
    method: bool
    declared: frozenset[str]


def import_name(distribution: str) -> str:
    return re.sub(r"[-_.]+", "_", distribution).lower()


def read_members(root: Path = ROOT) -> list[Member]:
    found = []
    for folder in members(root):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        groups = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
        requirements = [text for group in groups for text in group]
        names = frozenset(import_name(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in requirements)
        found.append(Member(import_name(project["name"]), folder.parent.name == "packages", names))
    return found


def wrong_dependencies(packages: list[Member]) -> list[str]:
    """Dependencies that no package may declare: on a method package."""
    methods = {package.name for package in packages if package.method}
    return [
        f"{package.name} declares a dependency on {name}, a method package: move what both need to shared/"
        for package in packages
        for name in sorted(package.declared & methods)
        if name != package.name
    ]


def contracts(packages: list[Member]) -> str:
    """The configuration of import-linter, as TOML."""
    names = [package.name for package in packages]
    lines = ["[tool.importlinter]", f"root_packages = {names!r}", "include_external_packages = false"]
    for package in packages:
        forbidden = [name for name in names if name != package.name and name not in package.declared]
        if forbidden:
            lines += [
                "[[tool.importlinter.contracts]]",
                f'name = "{package.name} imports only the siblings that its pyproject.toml names"',
                'type = "forbidden"',
                f"source_modules = {[package.name]!r}",
                f"forbidden_modules = {forbidden!r}",
                "allow_indirect_imports = true",
            ]
    methods = [package.name for package in packages if package.method]
    if len(methods) > 1:
        lines += [
            "[[tool.importlinter.contracts]]",
            'name = "method packages do not import each other"',
            'type = "independence"',
            f"modules = {methods!r}",
        ]
    shared = [package.name for package in packages if not package.method]
    if methods and shared:
        lines += [
            "[[tool.importlinter.contracts]]",
            'name = "shared packages import no method package"',
            'type = "forbidden"',
            f"source_modules = {shared!r}",
            f"forbidden_modules = {methods!r}",
        ]
    return "\n".join(lines) + "\n"


def main(root: Path = ROOT) -> int:
    from importlinter.cli import lint_imports

    packages = read_members(root)
    if problems := wrong_dependencies(packages):
        say("\n".join(problems))
        return 1
    sys.path[:0] = [str(folder / "src") for folder in members(root)]
    report = io.StringIO()
    with tempfile.TemporaryDirectory() as room, contextlib.redirect_stdout(report):
        config = Path(room) / "pyproject.toml"
        config.write_text(contracts(packages))
        code = lint_imports(config_filename=str(config), no_cache=True)
    lines = report.getvalue().strip().splitlines()
    print("\n".join(lines if code else lines[-1:]))
    return code


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
