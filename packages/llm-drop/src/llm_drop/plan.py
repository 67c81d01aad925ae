"""A plan: which sublayers leave the model. Always in the indices of the original, undropped model.

A plan file is one JSON object; `Plan.load` also reads what the paper's own code writes (`config.json` with
`drop_attn_list` and `drop_mlp_list`, as index lists or as one boolean per layer).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_hooks import RequestError

FORMAT = "llm-drop plan 1"
ONE_MUST_STAY = "at least one attention layer must stay"


@dataclass(frozen=True)
class Plan:
    """Sublayers to drop.

    Args:
        num_layers: blocks of the original model; every index lies in `0..num_layers-1`.
        attention: attention sublayers to drop, sorted.
        mlp: feed-forward (or mixture-of-experts) sublayers to drop, sorted. A block in both loses its whole body.
        how: the request that made this plan, for people ("attention 4", "kv 0.5").
        model: name of the model that was scored.
        fingerprint: its weights' fingerprint; empty when the plan was written by hand or imported.
        importance: summed importance of what is dropped; None when nothing was measured.

    Raises:
        RequestError: an index is out of range or given twice, or no attention layer would stay.
    """

    num_layers: int
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    how: str = ""
    model: str = ""
    fingerprint: str = ""
    importance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise RequestError(f"num_layers is {self.num_layers!r}; a whole number of at least 1 is needed")
        for kind in ("attention", "mlp"):
            object.__setattr__(self, kind, _checked(kind, getattr(self, kind), self.num_layers))
        if len(self.attention) == self.num_layers:
            raise RequestError(
                f"the plan drops all {self.num_layers} attention layers; {ONE_MUST_STAY}: "
                f"drop at most {self.num_layers - 1}"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that lose both sublayers, and so leave the model altogether."""
        return tuple(sorted(set(self.attention) & set(self.mlp)))

    @property
    def units(self) -> tuple[tuple[str, int], ...]:
        """Every dropped sublayer as ("attention" | "mlp", index)."""
        return tuple(("attention", i) for i in self.attention) + tuple(("mlp", i) for i in self.mlp)

    def describe(self) -> str:
        """One line for people."""
        kinds = (("attention", self.attention), ("MLP", self.mlp))
        parts = [f"{name} of blocks {', '.join(map(str, ids))}" for name, ids in kinds if ids]
        return f"{' and '.join(parts) or 'nothing'} dropped, of {self.num_layers} blocks"

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the plan, atomically. An existing file is kept unless `overwrite`."""
        from model_hooks.files import atomic_write

        path = Path(path)
        if path.exists() and not overwrite:
            raise RequestError(f"{path} exists; give another name or --overwrite")
        atomic_write(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path, *, num_layers: int | None = None) -> Plan:
        """Read a plan file, or a `config.json` of the paper's own code.

        Args:
            path: the file, or a folder that holds a `config.json`.
            num_layers: needed only where the file does not say it.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{file}: no such file; make one with `llm-drop plan` or `llm-drop import`") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RequestError(f"{file}: not a JSON file ({error})") from None
        if not isinstance(record, dict):
            raise RequestError(f"{file}: a JSON object is needed, found {type(record).__name__}")
        if record.get("format") == FORMAT:
            return cls._from_record(record, file)
        return from_original(record, name=str(file), num_layers=num_layers)

    @classmethod
    def _from_record(cls, record: Mapping[str, Any], file: Path) -> Plan:
        fields = {k: v for k, v in record.items() if k != "format"}
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown or "num_layers" not in fields:
            raise RequestError(f"{file}: {'unknown key ' + unknown[0] if unknown else 'num_layers is missing'}")
        try:
            return cls(**fields)
        except RequestError as error:
            raise RequestError(f"{file}: {error}") from None


def from_original(config: Mapping[str, Any], *, name: str = "config", num_layers: int | None = None) -> Plan:
    """The plan in a configuration of the paper's own code (CASE-Lab-UMD/LLM-Drop).

    Its `drop_attn_list` and `drop_mlp_list` hold either indices or one boolean per layer (true: dropped).

    Raises:
        RequestError: neither list is there, or the number of layers is unknown or contradicts a mask.
    """
    if "drop_attn_list" not in config and "drop_mlp_list" not in config:
        raise RequestError(f"{name}: neither a plan file nor a configuration with drop_attn_list or drop_mlp_list")
    layers = config.get("num_hidden_layers", num_layers)
    if layers is None:
        raise RequestError(f"{name}: num_hidden_layers is missing, so the lists cannot be checked; add it")
    if num_layers is not None and layers != num_layers:
        raise RequestError(f"{name}: made for {layers} layers, the model has {num_layers}")
    lists = {}
    for kind, key in (("attention", "drop_attn_list"), ("mlp", "drop_mlp_list")):
        entries = config.get(key) or []
        if not isinstance(entries, list):
            raise RequestError(f"{name}: {key} must be a list, found {type(entries).__name__}")
        lists[kind] = _from_mask(entries, layers, f"{name}: {key}")
    return Plan(layers, attention=lists["attention"], mlp=lists["mlp"], how=f"imported from {Path(name).name}")


def _from_mask(entries: Sequence[Any], layers: int, name: str) -> tuple[int, ...]:
    if not entries or not all(isinstance(entry, bool) for entry in entries):
        return tuple(entries)
    if len(entries) != layers:
        raise RequestError(f"{name} has {len(entries)} booleans for {layers} layers; one per layer is needed")
    return tuple(index for index, dropped in enumerate(entries) if dropped)


def _checked(kind: str, indices: Iterable[Any], layers: int) -> tuple[int, ...]:
    indices = list(indices)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise RequestError(f"{kind} index {index!r} is not a whole number; allowed: 0..{layers - 1}")
        if not 0 <= index < layers:
            raise RequestError(f"{kind} index {index} is out of range; allowed: 0..{layers - 1}")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise RequestError(f"{kind} index {twice[0]} is given twice; give each of 0..{layers - 1} at most once")
    return tuple(sorted(indices))
