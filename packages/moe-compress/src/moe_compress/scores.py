"""Scores: what a pass over calibration data measured, as a file; and the two ways to measure them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import FingerprintMismatch, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from model_hooks import Anatomy
    from moe_compress.stats import TrimStats

FORMAT = "moe-compress scores 1"
METRICS = ("gate", "freq", "reap", "norm", "output-cos", "reconstruction")


@dataclass(frozen=True)
class Experts:
    """One mixture: how it routes, and each expert's sums per token (`count`: tokens that were routed to it)."""

    top_k: int
    groups: int
    topk_group: int
    count: list[int]
    gate: list[float]
    weighted_norm: list[float]
    norm: list[float]
    cosine: list[float]
    reconstruction: list[float]

    def __len__(self) -> int:
        return len(self.count)

    def importance(self, metric: str, tokens: int) -> list[float]:
        """Of each expert; what is least goes first. An expert that no token chose has no importance but by `gate`.

        gate: mean routing score; freq: share of tokens; reap: mean over routed tokens of gate * |E(x)|; norm: mean over
        all tokens of |E(x)|; output-cos: mean over routed tokens of 1 - cos(y, y - gate * E(x)); reconstruction: error
        of the layer's output without the expert.
        """
        if metric == "gate":
            return [value / tokens for value in self.gate]
        if metric == "freq":
            return [count / tokens for count in self.count]
        if metric == "reap":
            return [v / max(n, 1) for v, n in zip(self.weighted_norm, self.count, strict=True)]
        if metric == "norm":
            return [value / tokens for value in self.norm]
        if metric == "output-cos":
            return [(n - v) / max(n, 1) for v, n in zip(self.cosine, self.count, strict=True)]
        if not self.reconstruction:
            raise RequestError(f"these scores hold no {metric}; score again with --reconstruction (not with layerwise)")
        return self.reconstruction


@dataclass(frozen=True)
class Scores:
    """All layers of a model, by original index.

    Attributes:
        experts: block -> its mixture; dense blocks are not in it.
        mlp: MoE sublayer -> mean cosine of the residual stream before and after it (norm and all).
        block: block -> the same of the whole block.
        gaps: [i][g]: similarity of the inputs of blocks i and i + g + 1; empty where it was not measured.
    """

    model: str
    fingerprint: str
    data: str
    samples: int
    tokens: int
    num_layers: int
    experts: dict[int, Experts]
    mlp: dict[int, float]
    block: dict[int, float]
    gaps: list[list[float]]
    versions: dict[str, str]

    def check(self, fingerprint: str) -> None:
        """Raise `FingerprintMismatch` unless these scores are of that model."""
        if fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"the scores are of {self.model} ({self.fingerprint}), not of this model ({fingerprint}): score it"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        from model_hooks.files import atomic_write, refuse_existing

        refuse_existing(path, overwrite)
        atomic_write(path, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file; make one with `moe-compress score`") from None
        except ValueError as error:
            raise RequestError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise RequestError(f"{path}: not scores of this version ({FORMAT!r}); score again")
        for name in ("mlp", "block"):
            record[name] = {int(k): v for k, v in record[name].items()}
        record["experts"] = {int(k): Experts(**v) for k, v in record["experts"].items()}
        return cls(**record)


def score(
    model: Any, sequences: Tensor, *, attention_mask: Tensor | None = None, name: str = "", data: str = "",
    batch_size: int = 4, reconstruction_tokens: int = 0, journal: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """Score a model that is in memory on token ids `sequences` [samples, T], in one pass.

    `reconstruction_tokens`: inputs of each layer that are kept for the metric "reconstruction"; 0: none.
    Raises `RequestError` for a model without experts, or data that it cannot read.
    """
    from model_hooks import anatomy, fingerprint
    from model_hooks.experts import moe_layers, watching_experts
    from model_hooks.watch import watch
    from moe_compress.stats import reconstruction_errors

    parts = anatomy(model)
    layers = moe_layers(parts)
    watcher = _watcher(parts, reconstruction_tokens)
    with watching_experts(model, layers, watcher):
        watch(
            model, sequences, watcher, attention_mask=attention_mask, batch_size=batch_size, journal=journal,
            progress=progress,
        )  # fmt: skip
    errors: dict[int, list[float]] = {}
    if reconstruction_tokens:
        if layers[0].num_groups > 1:
            raise RequestError(f"{type(model).__name__} routes by groups; reconstruction takes experts out one by one")
        errors = {layer.block: reconstruction_errors(layer, watcher.sample[layer.block]) for layer in layers}
    return _scores(
        watcher, parts, errors, model=name or type(model).__name__, fingerprint=fingerprint(model), data=data,
        samples=len(sequences),
    )  # fmt: skip


def score_layerwise(
    source: str, sequences: Tensor, *, data: str = "", batch_size: int = 4, buffer: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """As `score`, with the weights of one layer in memory at a time; runs of blocks and reconstruction are left out."""
    from model_hooks.experts import moe_layers, watching_experts
    from model_hooks.layer_stream import LayerStream
    from model_hooks.layerwise import watch_layerwise

    stream = LayerStream(source)
    parts = stream.anatomy()
    watcher = _watcher(parts, 0, gaps=False)
    with ExitStack() as stack:
        stack.enter_context(watching_experts(stream.model, moe_layers(parts), watcher))
        watch_layerwise(stream, sequences, watcher, batch_size=batch_size, buffer=buffer, progress=progress)
    return _scores(
        watcher, parts, {}, model=source, fingerprint=stream.fingerprint(), data=data, samples=len(sequences)
    )  # fmt: skip


def _watcher(parts: Anatomy, sample_tokens: int, gaps: bool = True) -> TrimStats:
    from model_hooks.experts import moe_layers
    from moe_compress.stats import TrimStats

    most = max(layer.num_experts for layer in moe_layers(parts))
    width = parts.model.get_input_embeddings().weight.shape[-1]
    return TrimStats(len(parts.blocks), width, most, gaps=gaps, sample_tokens=sample_tokens)


def _scores(watcher: TrimStats, parts: Anatomy, errors: Mapping[int, list[float]], **about: Any) -> Scores:
    from model_hooks.experts import moe_layers
    from moe_compress.stats import EXPERT_SUMS

    sums, original = watcher.sums, parts.original_index
    tokens = int(sums["tokens"].sum())
    experts = {}
    for layer in moe_layers(parts):
        found = {name: sums[f"experts.{name}"][layer.block, : layer.num_experts].tolist() for name in EXPERT_SUMS}
        found["count"] = [int(count) for count in found["count"]]
        experts[original[layer.block]] = Experts(
            layer.top_k, layer.num_groups, layer.topk_group, **found, reconstruction=errors.get(layer.block, [])
        )
    depth = len(parts.blocks)
    whole = "gaps" in sums and depth == parts.num_original_layers
    gaps = (
        [[float(sums["gaps"][i, j]) / tokens for j in range(i + 1, depth + 1)] for i in range(depth)] if whole else []
    )
    return Scores(
        **about, tokens=tokens, num_layers=parts.num_original_layers, experts=experts,
        mlp={o: float(sums["mlp"][:, i].sum()) / tokens for i, o in enumerate(original) if o in experts},
        block={o: float(sums["block"][:, i].sum()) / tokens for i, o in enumerate(original)},
        gaps=gaps,
        versions={package: version(package) for package in ("moe-compress", "torch", "transformers")},
    )  # fmt: skip
