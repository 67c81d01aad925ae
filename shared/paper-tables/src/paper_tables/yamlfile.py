"""YAML that remembers its lines, so that an error can say where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import TableError, nearest


class Map(dict[Any, Any]):
    """A YAML mapping that knows its line and those of its keys."""

    line: int = 0
    lines: dict[Any, int]


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    result = Map()
    result.line, result.lines = node.start_mark.line + 1, {}
    yield result
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in result.lines:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        result[key], result.lines[key] = loader.construct_object(value_node, deep=True), line


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> Map:
    """The mapping in the YAML file `path`. Raises `TableError` naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise TableError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        content = Map()
        content.lines = {}
    if not isinstance(content, Map):
        raise TableError(f"{path}: a mapping of keys to values is expected, found {type(content).__name__}")
    return content


class Reader:
    """Takes values out of a mapping and says what is wrong with them, with file and line."""

    def __init__(self, path: Path, mapping: Any, what: str, line: int = 1) -> None:
        self.path, self.what = path, what
        if not isinstance(mapping, Map):
            raise TableError(f"{path}:{line}: {what} must be a mapping (key: value), found {mapping!r}")
        self.map = mapping

    def fail(self, message: str, key: Any = None) -> TableError:
        line = self.map.lines.get(key, self.map.line)
        return TableError(f"{self.path}:{line}: {self.what}: {message}")

    def inner(self, key: str, what: str) -> Reader:
        """A reader of the mapping under `key`."""
        return Reader(self.path, self.map.get(key), what, self.line(key))

    def only(self, known: Iterable[str], needed: Iterable[str] = ()) -> None:
        """Refuse keys that are not `known` and the lack of one that is `needed`."""
        allowed = list(known)
        for key in self.map:
            if key not in allowed:
                raise self.fail(f"unknown key {key!r}{nearest(key, allowed)}", key)
        for key in needed:
            if key not in self.map:
                raise self.fail(f"{key!r} is missing")

    def text(self, key: str, default: str = "") -> str:
        value = self.map.get(key, default)
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise self.fail(f"{key!r} must be text, found {value!r}", key)
        return str(value)

    def choice(self, key: str, allowed: Iterable[str], default: str = "") -> str:
        value = self.text(key, default)
        if value and value not in allowed:
            raise self.fail(f"{key}: {value!r} is not accepted{nearest(value, allowed)}", key)
        return value

    def number(self, key: str) -> float | None:
        value = self.map.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.fail(f"{key!r} must be a number, found {value!r}", key)
        return None if value is None else float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.map.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.fail(f"{key!r} must be a mapping (name: value), found {value!r}", key)
        return {str(k): v for k, v in value.items()}

    def items(self, key: str) -> list[Any]:
        value = self.map.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(f"{key!r} must be a list, found {value!r}", key)
        return value

    def words(self, key: str) -> tuple[str, ...]:
        return tuple(str(item) for item in self.items(key))

    def seeds(self, key: str) -> tuple[int, ...] | None:
        if key not in self.map:
            return None
        seeds = self.items(key)
        if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            raise self.fail(f"{key!r} must be a list of whole numbers, found {self.map[key]!r}", key)
        if len(set(seeds)) != len(seeds):
            raise self.fail(f"{key!r} holds a seed twice: {seeds}", key)
        return tuple(seeds)

    def line(self, key: Any = None) -> int:
        return int(self.map.lines.get(key, self.map.line))
