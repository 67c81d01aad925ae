"""Results on disk: one JSON file for each table and scale, whole or absent, written by one run at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import TableError
from .version import Code, same

FORMAT = 1


@dataclass
class Results:
    """What was measured of one table at one scale. `units`: unit id -> record (key, code, values, ...); if the last
    try failed, with its `error` and `where`, and values only if an earlier one gave them; `code`: what `Code.used`
    gave, by the name that the records have of it."""

    package: str
    table: str
    scale: str
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, dict[str, str]] = field(default_factory=dict)

    def text(self) -> str:
        head = {"format": FORMAT, "package": self.package, "table": self.table, "scale": self.scale}
        found = {**head, "machines": self.machines, "code": self.code, "units": self.units}
        return json.dumps(found, indent=1, allow_nan=False) + "\n"

    def fresh(self, unit: str, key: Mapping[str, Any], code: Code) -> bool:
        """Is there a record of the unit that was measured under `key` by `code`?"""
        record = self.units.get(unit, {})
        return same(record.get("key"), key) and code.holds(self.code.get(record.get("code", "")))

    def keep(self, units: Iterable[str]) -> None:
        """Drop all but the records of `units`, taken in that order, and the machines and the code that they name."""
        self.units = {unit: self.units[unit] for unit in units if unit in self.units}
        machines, code = ({record.get(name) for record in self.units.values()} for name in ("machine", "code"))
        self.machines = {name: found for name, found in self.machines.items() if name in machines}
        self.code = {name: found for name, found in self.code.items() if name in code}


def results_path(root: Path, package: str, table: str, scale: str) -> Path:
    return root / package / table / f"{scale}.json"


def read_results(path: Path, package: str, table: str, scale: str) -> Results:
    """The results at `path`, empty where there are none. Raises `TableError` for a file that is not one of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Results(package, table, scale)
    except (ValueError, OSError) as error:
        raise TableError(f"{path} is not a results file ({error}); move it away and run again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("units"), dict):
        raise TableError(f"{path} is not a results file of format {FORMAT}; move it away and run again")
    return Results(package, table, scale, content["units"], content.get("machines", {}), content.get("code", {}))


def write(path: Path, content: str | bytes) -> None:
    """Write `path` so that a crash or a full disk leaves the old file or the new one, never a part."""
    from model_hooks.files import (
        atomic_write,
    )  # here: with it come torch and transformers, seconds that reading needs not

    atomic_write(path, content)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`'s lock; a second run of the same table is refused. The system frees it when a process dies."""
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on this system: one run at a time is then the user's care
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TableError(f"another run is writing {path}; wait for it, or give another --results") from None
        for stale in path.parent.glob(f".{path.name}.*"):  # parts left by a killed run
            if stale != lock:
                stale.unlink(missing_ok=True)
        yield
