"""The three branches of a vision-language model: vision tower, connector, language model, found by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from model_hooks.errors import RequestError

BRANCHES = ("vision", "connector", "language")
MERGER = "merger"  # Qwen's connector lies inside its vision tower under this name


class BranchNotFoundError(RequestError):
    """A branch was not recognised; nothing was changed."""


@dataclass(frozen=True, eq=False)
class Branches:
    """Where the branches of `model` are.

    Attributes:
        vision: Path of the vision tower.
        connector: Paths of the modules and parameters between the two, mergers inside the vision tower included.
        language: Path of the language model.
        head: Path of the output layer, where it is a module of its own.
        blocks: "vision" and "language" -> paths of their transformer blocks, in the order in which they run.
    """

    model: Any
    vision: str
    connector: tuple[str, ...]
    language: str
    head: str | None
    blocks: dict[str, tuple[str, ...]]

    def of(self, path: str) -> str:
        """The branch of a module's or parameter's path: vision, connector, language or head; "" for none."""
        if any(_inside(path, p) for p in self.connector):
            return "connector"
        if self.head and _inside(path, self.head):
            return "head"
        for name in ("vision", "language"):
            if _inside(path, getattr(self, name)):
                return name
        return ""

    def linears(self, branch: str, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
        """Path -> linear layer: those inside the blocks of vision or language, or all of the connector.

        exclude: Paths, parts of paths ("self_attn") or patterns with * that are left out.
        """
        if branch not in BRANCHES:
            raise RequestError(f"branch {branch!r} is not accepted; give vision, connector or language")
        roots = self.connector if branch == "connector" else self.blocks[branch]
        parameters = {name for name, _ in self.model.named_parameters()}
        found = {}
        for root in (root for root in roots if root not in parameters):
            for path, module in self.model.get_submodule(root).named_modules(prefix=root):
                wanted = isinstance(module, nn.Linear) and self.of(path) == branch
                if wanted and not any(matches(path, pattern) for pattern in exclude):
                    found[path] = module
        return found


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` names the path, a part of it between dots, or fits it with *."""
    return f".{pattern}." in f".{path}." or fnmatchcase(path, pattern)


def find_branches(model: Any, *, vision: str = "", connector: str = "", language: str = "") -> Branches:
    """The branches of any transformers vision-language model.

    The vision tower is what `get_encoder(modality="image")` gives, the language model the largest part around
    `get_decoder()` without the tower, the connector what is left.

    Args:
        vision, language: Paths that go before what is found.
        connector: The same, separated by commas.

    Raises:
        BranchNotFoundError: a branch is not there; the message names what could be one.
    """
    vision = _given(model, vision, "--vision-path") or _found(model, "vision")
    language = _given(model, language, "--language-path") or _found(model, "language", vision)
    if not vision or not language or _inside(language, vision) or _inside(vision, language):
        missing = "vision tower" if not vision else "language model"
        candidates = ", ".join(sorted({path.rpartition(".")[0] for path in _block_lists(model, "")})) or "none"
        raise BranchNotFoundError(
            f"{type(model).__name__}: no {missing} was found; modules with blocks of one class: {candidates}; "
            f"name them with --vision-path and --language-path"
        )
    head = _head(model)
    named = tuple(path.strip() for path in connector.split(",") if path.strip())
    for path in named:
        _given(model, path, "--connector-path")
    between = named or tuple(_between(model, vision, language, head))
    blocks = {}
    for name, root in (("vision", vision), ("language", language)):
        lists = [path for path in _block_lists(model, root) if not any(_inside(path, c) for c in between)]
        blocks[name] = tuple(f"{path}.{i}" for path in lists for i in range(len(model.get_submodule(path))))
        if not blocks[name]:
            raise BranchNotFoundError(f"{type(model).__name__}: {root} has no blocks with linear layers of one class")
    return Branches(model, vision, between, language, head, blocks)


def refuse_experts(branches: Branches, skip_experts: bool) -> dict[str, int]:
    """Path -> values of 3-D weights of experts inside the blocks. Raises `RequestError` unless they are skipped."""
    roots = [root for paths in branches.blocks.values() for root in paths]
    held = {n: p.numel() for n, p in branches.model.named_parameters() if p.dim() == 3 and _within(n, roots)}
    if held and not skip_experts:
        total = sum(p.numel() for p in branches.model.parameters())
        raise RequestError(
            f"{next(iter(held))} holds the weights of all experts in one tensor, which is not pruned; such tensors are "
            f"{sum(held.values()) / total:.0%} of the model: --skip-experts leaves them dense"
        )
    return held


def _within(path: str, roots: list[str]) -> bool:
    return any(_inside(path, root) for root in roots)


def _inside(path: str, root: str) -> bool:
    return bool(root) and (path == root or path.startswith(f"{root}."))


def _given(model: Any, path: str, flag: str) -> str:
    if path:
        parameters = dict(model.named_parameters())
        try:
            path in parameters or model.get_submodule(path)
        except AttributeError:
            children = ", ".join(name for name, _ in model.named_children())
            raise BranchNotFoundError(f"{flag} {path}: the model has no such module; its own are {children}") from None
    return path


def _found(model: Any, kind: str, vision: str = "") -> str:
    """The path of a branch as the model's own methods tell it; "" where they do not."""
    try:
        module = model.get_encoder(modality="image") if kind == "vision" else model.get_decoder()
    except (AttributeError, TypeError, NotImplementedError):
        return ""
    path = next((name for name, m in model.named_modules() if m is module), "")
    if kind == "vision" or not path:
        return path
    while (parent := path.rpartition(".")[0]) and not _inside(vision, parent):
        path = parent  # a text model with an encoder gives its decoder alone
    return path


def _head(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head and head is not None), None)


def _between(model: nn.Module, vision: str, language: str, head: str | None) -> Iterator[str]:
    """The largest modules outside the towers and the head that hold parameters; then mergers inside the tower."""
    ends = [path for path in (vision, language, head) if path]

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        if path in ends or not any(True for _ in module.parameters()):
            return
        if path and not any(_inside(end, path) for end in ends):
            yield path
            return
        yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}".lstrip("."))

    yield from walk(model, "")
    yield from (f"{vision}.{n}" for n, _ in model.get_submodule(vision).named_children() if MERGER in n)


def _block_lists(model: nn.Module, root: str) -> list[str]:
    """The outermost ModuleLists inside `root` whose members have one class and hold linear layers."""
    found: list[str] = []
    for path, module in model.get_submodule(root).named_modules(prefix=root):
        if not isinstance(module, nn.ModuleList) or not len(module) or any(_inside(path, outer) for outer in found):
            continue
        one_class = len({type(child) for child in module}) == 1
        if one_class and any(isinstance(m, nn.Linear) for m in module[0].modules()):
            found.append(path)
    return found
