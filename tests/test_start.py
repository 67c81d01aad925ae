"""Commands start fast: what costs seconds to import is imported where a model or data is touched, not before."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import ModuleType

HEAVY = ("accelerate", "datasets", "matplotlib", "numpy", "pandas", "pyarrow", "torch", "transformers")

# The console script's own call, for help and for a request that cannot be met; then what has been imported.
CALLS = """
import importlib, json, sys
module, _, function = sys.argv[1].partition(":")
codes = []
for argument in ("--help", "no-such-verb"):
    sys.argv = [sys.argv[0], argument]
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps([codes, sorted(sys.modules)]))
"""


def fresh(code: str, *arguments: str) -> str:
    """What a new process prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_help_and_a_wrong_request_import_nothing_heavy(command):
    codes, modules = json.loads(fresh(CALLS, command))
    assert codes == [0, 2]
    assert [name for name in HEAVY if name in modules] == []


def test_the_tables_of_all_packages_are_found_with_nothing_heavy():
    code = "import json, sys, paper_tables; print(json.dumps([list(paper_tables.installed()[0]), sorted(sys.modules)]))"
    papers, modules = json.loads(fresh(code))
    assert papers
    assert [name for name in HEAVY if name in modules] == []


def test_public_names_are_there_and_no_module_takes_the_place_of_one(package):
    """Importing a submodule binds it in its package, over what a lazy package would make of that name."""
    module = importlib.import_module(package.import_name)
    folder = package.folder / "src" / package.import_name
    for name in {file.stem for file in folder.iterdir()} & set(module.__all__):
        importlib.import_module(f"{package.import_name}.{name}")
    assert [name for name in module.__all__ if isinstance(getattr(module, name), ModuleType)] == []
    assert set(module.__all__) <= set(dir(module))
