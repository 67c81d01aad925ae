"""Teach transformers the model types `lean_<base>` without importing it: importing transformers takes seconds.

`import model_hooks` promises that the Auto classes load what this package saved. Where transformers' table of model
types is loaded already, the types are entered at once. Where it is not, a finder on `sys.meta_path` waits for that one
module, has its own loader load it, enters the types before anyone can read the table, and takes itself away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "lean_"
TABLE = "transformers.models.auto.configuration_auto"  # every Auto class reads its table of configurations


class _LazyLeanConfig:
    """What AutoConfig finds under `lean_<base>`: makes the real config class, and registers its model, when asked."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from .lean import make_lean_classes

        return make_lean_classes(cls.model_type.removeprefix(PREFIX)).from_dict(config_dict, **kwargs)


def register() -> None:
    """Let the Auto classes resolve `lean_<base>` for every base type that transformers knows; nothing is built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for base in CONFIG_MAPPING_NAMES:
        name = PREFIX + base
        if name not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(name, type(name, (_LazyLeanConfig,), {"model_type": name}))


def register_when_needed() -> None:
    """`register()`, now if the table is loaded, otherwise right after it is."""
    finder = _TableFinder()
    sys.meta_path.insert(0, finder)  # before the look: another thread may import transformers in between
    if TABLE in sys.modules:
        register()  # waits where another thread is still loading the table
        finder.remove()


class _TableFinder(MetaPathFinder):
    """Finds the table as the finders after it do, and gives it a loader that registers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _TableFinder)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _RegisteringLoader(Loader):
    """Leaves all of the loading to `loader`, whose module it becomes; then registers."""

    def __init__(self, loader: Loader, finder: _TableFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        register()
        self.finder.remove()
