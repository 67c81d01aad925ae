"""Teach transformers model types such as `lean_<base>` without importing it: importing transformers takes seconds.

`import model_hooks` promises that the Auto classes load what this package saved. Where transformers' table of model
types is loaded already, the types are entered at once. Where it is not, a finder on `sys.meta_path` waits for that one
module, has its own loader load it, enters the types before anyone can read the table, and takes itself away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "lean_"
TABLE = "transformers.models.auto.configuration_auto"  # every Auto class reads its table of configurations


FAMILIES: dict[
    str, Callable[[str], Any]
] = {}  # prefix -> what makes the config class of `<prefix><base>` from `<base>`


class _LazyConfig:
    """What AutoConfig finds under `<prefix><base>`: when asked, makes the real config class and registers its model."""

    model_type: str
    prefix: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        make = FAMILIES[cls.prefix]
        return make(cls.model_type.removeprefix(cls.prefix)).from_dict(config_dict, **kwargs)


def _lean(base_model_type: str) -> Any:
    from .lean import make_lean_classes

    return make_lean_classes(base_model_type)


def add_family(prefix: str, make: Callable[[str], Any]) -> None:
    """Let the Auto classes resolve `<prefix><base>` for every base type that transformers knows.

    `make(base)` gives the config class and registers its models; it is called when a checkpoint asks for the type.
    """
    FAMILIES[prefix] = make
    register_when_needed()


def register() -> None:
    """Enter the model types of all families; nothing is built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for prefix in FAMILIES:
        for base in CONFIG_MAPPING_NAMES:
            name = prefix + base
            if name not in CONFIG_MAPPING:
                CONFIG_MAPPING.register(name, type(name, (_LazyConfig,), {"model_type": name, "prefix": prefix}))


def register_when_needed() -> None:
    """`register()`, now if the table is loaded, otherwise right after it is."""
    FAMILIES.setdefault(PREFIX, _lean)
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

    @staticmethod
    def remove() -> None:
        """Take away every finder that waits: one import has answered them all."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TableFinder)]


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
