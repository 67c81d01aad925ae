"""Measure a model on calibration data, and keep the result in a file that knows what it was measured on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_drop.selection import Objective, Unit
from model_hooks import FingerprintMismatch, RequestError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "llm-drop scores 1"
KINDS = ("attention", "mlp", "block")


@dataclass(frozen=True)
class Scores:
    """Similarities of every unit that is in the model, by original index.

    Args:
        model, fingerprint: name of the scored model and fingerprint of its weights.
        num_layers: blocks of the original model, including any that were dropped before scoring.
        data, data_fingerprint, samples, tokens: what it was scored on.
        attention, mlp, block: mean cosine of the residual stream before and after the unit.
        ratio: "attention" | "mlp" | "block" -> index -> mean of |change| / |stream|, the objective "norm".
        gaps: `gaps[i][g-1]` is the mean cosine of the input of block i and the input of block i+g.
        group_tokens, group_sums: tokens, and sums of cosines by kind and index, of each group of samples: what
            `llm_drop.stability` resamples.
        deltas: mean change of each sublayer, [H], for `llm_drop.repair`; kept in a safetensors file beside the JSON.
    """

    model: str
    fingerprint: str
    num_layers: int
    data: str
    data_fingerprint: str
    samples: int
    tokens: int
    attention: Mapping[int, float]
    mlp: Mapping[int, float]
    block: Mapping[int, float]
    ratio: Mapping[str, Mapping[int, float]]
    gaps: Sequence[Sequence[float]] = ()
    group_tokens: Sequence[float] = ()
    group_sums: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    deltas: Mapping[Unit, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def importance(self, objective: Objective = "cosine") -> dict[Unit, float]:
        """Importance of every unit, attention before MLPs before blocks: 1 - cosine, or the relative change."""
        if objective not in ("cosine", "norm"):
            raise RequestError(f"unknown objective {objective!r}; there are 'cosine' and 'norm'")
        found: dict[Unit, float] = {}
        for kind in KINDS:
            similarity: Mapping[int, float] = getattr(self, kind)
            values = {i: 1.0 - s for i, s in similarity.items()} if objective == "cosine" else self.ratio[kind]
            found.update({(kind, i): values[i] for i in sorted(values)})
        return found

    def check(self, *, model: str | None = None, data: str | None = None) -> Scores:
        """Raise `FingerprintMismatch` unless these scores belong to this model and data (fingerprints)."""
        for what, mine, given in (("model", self.fingerprint, model), ("data", self.data_fingerprint, data)):
            if given is not None and given != mine:
                raise FingerprintMismatch(
                    f"the scores are of another {what}: made on {getattr(self, what)} ({mine}), given {given}; "
                    "score again"
                )
        return self

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the JSON file, and the mean changes as `<name>.safetensors` beside it, each atomically."""
        from safetensors.torch import save

        from model_hooks.files import atomic_write

        path = Path(path)
        refuse_taken(path, overwrite)
        record = {k: v for k, v in asdict(_without_deltas(self)).items() if k != "deltas"}
        if self.deltas:
            content = save({f"{kind}.{i}": v.float().contiguous() for (kind, i), v in self.deltas.items()})
            record["deltas"] = hashlib.sha256(content).hexdigest()
            atomic_write(_deltas_file(path), content)
        atomic_write(path, json.dumps({"format": FORMAT} | record, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises `RequestError` for any other file."""
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file; make one with `llm-drop score`") from None
        except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError) as error:
            raise RequestError(f"{path}: not a scores file ({error})") from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise RequestError(
                f"{path}: not a scores file of this version ({FORMAT!r}); make one with `llm-drop score`"
            )
        digest = record.pop("deltas", None)
        for kind in KINDS:
            record[kind] = _int_keys(record[kind])
            record["ratio"][kind] = _int_keys(record["ratio"][kind])
            record["group_sums"][kind] = _int_keys(record["group_sums"].get(kind, {}))
        return cls(**record, deltas=_read_deltas(path, digest) if digest else {})


def score(
    model: Any,
    sequences: Tensor,
    *,
    attention_mask: Tensor | None = None,
    name: str = "",
    data: str = "",
    batch_size: int = 4,
    groups: int = 16,
    gaps: bool = True,
    deltas: bool = True,
    journal: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """One pass of `sequences` through `model`; every selection can be made from the result.

    Args:
        model: any decoder-only transformers model, dropped sublayers allowed. It is not changed.
        sequences: token ids, [samples, T].
        attention_mask: [samples, T], 0 on padding, on either side; all tokens count without it.
        name, data: what to call them in the file.
        groups: groups of samples for the bootstrap of the selection.
        gaps, deltas: also measure runs of blocks; also the mean changes.
        journal: a file that holds the state while the pass runs, so that a killed run goes on where it was.
        progress: called with (batches done, batches).

    Raises:
        UnsupportedArchitectureError: the model's layers could not be read.
        RequestError: no data, or a score that is not finite (the unit is named).
    """
    from model_hooks import anatomy, fingerprint
    from model_hooks.similarity import ResidualSimilarity
    from model_hooks.watch import watch

    if sequences.dim() != 2 or sequences.numel() == 0:
        raise RequestError(
            f"calibration data has shape {tuple(sequences.shape)}; [samples, length] with data is needed"
        )
    parts = anatomy(model)
    hidden = model.get_input_embeddings().weight.shape[1]
    watcher = ResidualSimilarity(len(parts.blocks), hidden, groups=groups, gaps=gaps, deltas=deltas)
    watch(
        model,
        sequences,
        watcher,
        attention_mask=attention_mask,
        batch_size=batch_size,
        journal=journal,
        progress=progress,
    )
    return from_sums(
        watcher.sums,
        parts,
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        fingerprint=fingerprint(model),
        **_about(model, sequences, attention_mask, data),
    )


def score_layerwise(
    source: str, sequences: Tensor, *, data: str = "", batch_size: int = 4, buffer: Path | None = None,
    dtype: Any = None, progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """As `score`, for a checkpoint larger than memory: one layer is resident at a time, read from `source`.

    Blocks come one after another, so runs of blocks (`gaps`) are not measured, and nothing is kept of a killed run.

    Args:
        source: checkpoint folder, zoo:NAME or hub id.
        buffer: folder for the hidden states of all samples; without it they are held in RAM.
        dtype: torch's, of the weights; by default what the config says.
    """
    import torch

    from model_hooks.layer_stream import LayerStream
    from model_hooks.layerwise import watch_layerwise
    from model_hooks.similarity import ResidualSimilarity

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = LayerStream(source, device=device, dtype=dtype)
    hidden = stream.model.get_input_embeddings().weight.shape[1]
    watcher = ResidualSimilarity(len(stream.layers), hidden, gaps=False)
    parts = watch_layerwise(stream, sequences, watcher, batch_size=batch_size, buffer=buffer, progress=progress)
    about = _about(stream.model, sequences, None, data)
    return from_sums(watcher.sums, parts, model=source, fingerprint=stream.fingerprint(), **about)


def _about(model: Any, sequences: Tensor, attention_mask: Tensor | None, data: str) -> dict[str, Any]:
    return {
        "data": data,
        "data_fingerprint": data_fingerprint(sequences, attention_mask),
        "samples": len(sequences),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": _versions(),
    }


def from_sums(sums: Mapping[str, Tensor], parts: Any, **about: Any) -> Scores:
    """Means from a `ResidualSimilarity`'s sums, by original index, for the units that are there."""
    total = float(sums["tokens"].sum())
    here = {
        "attention": {b.index: o for b, o in zip(parts.blocks, parts.original_index, strict=True) if b.attention},
        "mlp": {b.index: o for b, o in zip(parts.blocks, parts.original_index, strict=True) if b.mlp},
        "block": {b.index: o for b, o in zip(parts.blocks, parts.original_index, strict=True) if b.attention or b.mlp},
    }
    means: dict[str, dict[int, float]] = {}
    ratio: dict[str, dict[int, float]] = {}
    groups: dict[str, dict[int, list[float]]] = {}
    for kind, index in here.items():
        means[kind] = {o: float(sums[kind][:, i].sum()) / total for i, o in index.items()}
        ratio[kind] = {o: float(sums[f"{kind}.ratio"][i]) / total for i, o in index.items()}
        groups[kind] = {o: sums[kind][:, i].tolist() for i, o in index.items()}
    _refuse_overflow(means, ratio, about.get("dtype"))
    depth = len(parts.blocks)
    gaps = [[float(sums["gaps"][i, j]) / total for j in range(i + 1, depth + 1)] for i in range(depth)] if (
        "gaps" in sums and depth == parts.num_original_layers
    ) else []  # fmt: skip
    deltas = {
        (kind, o): (sums[f"{kind}.delta"][i] / total).float()
        for kind in ("attention", "mlp") if f"{kind}.delta" in sums
        for i, o in here[kind].items()
    }  # fmt: skip
    return Scores(
        num_layers=parts.num_original_layers,
        tokens=int(total),
        attention=means["attention"],
        mlp=means["mlp"],
        block=means["block"],
        ratio=ratio,
        gaps=gaps,
        group_tokens=sums["tokens"].tolist(),
        group_sums=groups,
        deltas=deltas,
        **about,
    )


def _refuse_overflow(
    means: Mapping[str, Mapping[int, float]], ratio: Mapping[str, Mapping[int, float]], dtype: Any
) -> None:
    """Name the first unit, in the order in which the model runs, whose score is not a number."""
    units = sorted((index, KINDS.index(kind), kind) for kind in KINDS for index in means[kind])
    for index, _, kind in units:
        if not math.isfinite(value := means[kind][index]) or not math.isfinite(value := ratio[kind][index]):
            raise RequestError(
                f"{kind} {index} turned the residual stream into {value}: the model overflows in {dtype}; "
                "score it in float32 or bfloat16"
            )


def data_fingerprint(sequences: Tensor, attention_mask: Tensor | None = None) -> str:
    """Content hash of token ids, their shape, and where they are padding."""
    import torch

    ids = sequences.to("cpu", torch.int64).contiguous()
    digest = hashlib.blake2b(str(tuple(ids.shape)).encode(), digest_size=8)
    digest.update(ids.numpy().tobytes())
    if attention_mask is not None and not bool(attention_mask.all()):
        digest.update(attention_mask.to("cpu", torch.bool).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _without_deltas(scores: Scores) -> Scores:
    from dataclasses import replace

    return replace(scores, deltas={})


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise `RequestError` where scores in `path` would replace a file. Mean changes without their scores, as a kill
    between the two writes leaves them, are no such file; other tensors of that name are."""
    from safetensors import SafetensorError, safe_open

    from model_hooks.files import refuse_existing

    refuse_existing(path, overwrite)
    file = _deltas_file(path)
    try:
        with safe_open(file, "pt") as opened:
            ours = all(key.partition(".")[0] in KINDS for key in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        refuse_existing(file, overwrite)


def _deltas_file(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json") + ".safetensors")


def _read_deltas(path: Path, digest: str) -> dict[Unit, Tensor]:
    from safetensors.torch import load

    file = _deltas_file(path)
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        return {}  # repair asks for them and says so; everything else works without
    tensors = load(content)
    return {(name.partition(".")[0], int(name.partition(".")[2])): tensor for name, tensor in tensors.items()}


def _int_keys(mapping: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in mapping.items()}
