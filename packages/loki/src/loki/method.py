"""What a method of sparse attention is: the interface that Loki and every baseline fill, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

from .config import Amount, LokiConfig
from .rows import Rows

NAMES = ("full", "topk", "h2o", "pca", "quest", "snapkv", "loki")
OWN = ("select", "group_reduce", "block", "mass")  # settings that only some methods read
FEW = 8  # queries that count as decoding: one, or a few that verify a draft
CHUNK = 1 << 25  # attention weights held at a time, in elements


@dataclass
class Step:
    """One call of one attention layer: B rows with Q queries each, which are the last of their S tokens.

    Attributes:
        q: [B, Hq, Q, D]; k, v: [B, Hkv, >= S, D]. Queries and keys are turned if the method is `turned`.
        rows: what each query may see.
        k_amount: the layer's share or count of tokens; d: its number of dimensions.
        scale, softcap: of the scores.
        first: nothing was cached before this call.
        state: of the cache layer, kept from call to call; None where the cache is a foreign one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Rows
    k_amount: Amount
    d: int
    scale: float
    softcap: float | None
    config: LokiConfig
    first: bool
    state: dict[str, Tensor] | None = None
    projection: Tensor | None = field(default=None, repr=False)  # [Hkv, D, D]: see `Basis.truncated`

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, S, D]"""
        return self.k[:, :, : self.tokens]

    @property
    def values(self) -> Tensor:
        return self.v[:, :, : self.tokens]

    @property
    def projected(self) -> Tensor:
        """The queries through `projection`: their products with whole keys are those of the first d turned numbers."""
        assert self.projection is not None
        return (self.q.float().unflatten(1, (self.kv_heads, -1)) @ self.projection[:, None]).flatten(1, 2)

    @property
    def read(self) -> Tensor:
        """How many tokens each query reads, [B or 1, 1, Q]."""
        return self.rows.read(self.k_amount, self.config)[:, None]


class Method:
    """A way for queries to read a part of the cached tokens. A new one is a subclass in a file of its own.

    A method says which tokens a query reads (`allowed`), and gets decoding and the masked form for perplexity tables
    (`prefill="masked"`) from that: attention over exactly these tokens, by dense work. One with a kernel of its own
    overrides `decode`, one that does not attend exactly overrides `attend`, one that keeps something from step to step
    overrides `prompt` and says so.

    Attributes:
        needs_basis: `enable` must be given a `Basis`.
        turned: keys are cached, and shown to the method, in the directions of the basis.
        evicts: tokens are given up for good, so that a cache cannot be cropped.
        masked: the masked form exists.
        reads_all: it is ordinary attention.
        approximates: it differs from ordinary attention even where it reads all tokens.
        uses: which of the settings `OWN` it reads.
    """

    needs_basis = False
    turned = False
    evicts = False
    masked = True
    reads_all = False
    approximates = False
    uses: frozenset[str] = frozenset()

    def allowed(self, step: Step) -> Tensor:
        """What each query reads: bool, [B, Hkv, Q, S] where the queries of a group agree, else [B, Hq, Q, S]."""
        raise NotImplementedError

    def attend(self, step: Step) -> Tensor:
        """[B, Hq, Q, D]: every query reads what it would read when decoding, whatever Q is."""
        return masked_attention(step, self.allowed(step))

    def decode(self, step: Step) -> Tensor:
        """[B, Hq, Q, D] for few queries (Q <= 8)."""
        return self.attend(step)

    def prompt(self, step: Step) -> Tensor | None:
        """Look at a prompt, of which all is in the cache. None lets it attend to all tokens, as models do."""
        return None


def find(name: str) -> Method:
    """The method of this name: the object `METHOD` of `loki.baselines.NAME` (Loki's own is in `loki.sparse`)."""
    if name not in NAMES:
        raise RequestError(f"method={name!r}: it is one of {', '.join(NAMES)}")
    module = import_module(".sparse" if name == "loki" else f".baselines.{name}", __package__)
    method: Method = module.METHOD
    return method


def method_of(config: LokiConfig) -> Method:
    """The method of these settings. Raises `RequestError` for one of `OWN` that was set and that it does not read."""
    method, plain = find(config.method), LokiConfig()
    for name in OWN:
        value = getattr(config, name)
        if value != getattr(plain, name) and not method.reads_all and name not in method.uses:
            readers = ", ".join(other for other in NAMES if name in find(other).uses)
            raise RequestError(
                f"{name}={value!r} is not read by method {config.method!r}; leave it out, or take {readers}"
            )
    return method


def masked_attention(
    step: Step, allowed: Tensor | None = None, q: Tensor | None = None, k: Tensor | None = None
) -> Tensor:
    """Softmax attention [B, Hq, Q, D] over what is both visible and `allowed` [B, Hkv or Hq, Q, S] (None: everything).

    `q` and `k` take the place of the step's where scores are not those of whole keys. Work is dense, memory bounded.
    """
    out = torch.empty_like(step.q)
    for part, weights in attention_weights(step, allowed, q, k):
        mixed = weights.flatten(2, 3) @ step.values.to(weights.dtype)  # [B, Hkv, G*Q', D]
        out[:, :, part] = mixed.view(*weights.shape[:4], -1).flatten(1, 2).to(out.dtype)
    return out


def attention_weights(
    step: Step, allowed: Tensor | None = None, q: Tensor | None = None, k: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries: (slice of them, their weights [B, Hkv, G, Q', S]). A query that sees nothing has zeros."""
    q, k = step.q if q is None else q, step.keys if k is None else k
    b, heads, queries, _ = q.shape
    group, tokens = heads // step.kv_heads, step.tokens
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype).transpose(-1, -2)
    for part in spans(queries, b * heads * tokens):
        n = part.stop - part.start
        grouped = q[:, :, part].to(dtype).reshape(b, step.kv_heads, group * n, -1)
        logits = (grouped @ keys).view(b, step.kv_heads, group, n, tokens) * step.scale
        if step.softcap is not None:
            logits = step.softcap * torch.tanh(logits / step.softcap)
        seen = step.rows.visible[:, :, part]
        if allowed is not None:
            seen = seen & allowed[:, :, part]
        # [B, 1 | Hkv | Hq, Q', S] to [B, Hkv | 1, G | 1, Q', S]
        seen = seen.unsqueeze(2) if seen.shape[1] != heads else seen.unflatten(1, (step.kv_heads, group))
        yield part, logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def spans(queries: int, elements: int) -> list[slice]:
    """Runs of queries that need `elements` numbers each, so that a run stays within `CHUNK`."""
    size = max(1, min(queries, CHUNK // max(1, elements)))
    return [slice(at, min(at + size, queries)) for at in range(0, queries, size)]


def scores_of(step: Step, part: slice, q: Tensor, k: Tensor) -> Tensor:
    """What tokens are ranked by: [B, Hkv, Q', S] with select="group", else [B, Hq, Q', S].

    Args:
        q, k: [B, Hq, Q, d] and [B, Hkv, S, d], whose products approximate the scores.
    """
    b, heads, _, width = q.shape
    n = part.stop - part.start
    group = heads // step.kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q[:, :, part].to(dtype).reshape(b, step.kv_heads, group * n, width)
    scores = (grouped @ k.to(dtype).transpose(-1, -2)).view(b, heads, n, -1)
    return agree(step, scores, step.rows.visible[:, :, part])


def agree(step: Step, scores: Tensor, visible: Tensor) -> Tensor:
    """One score for a group's heads from [B, Hq, Q', S], by `group_reduce`; as they are with select="head"."""
    if step.config.select == "head":
        return scores
    grouped = scores.unflatten(1, (step.kv_heads, -1))  # [B, Hkv, G, Q', S]
    if step.config.group_reduce == "max":
        return grouped.amax(2)
    shares = (grouped * step.scale).masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1)
    return shares.nan_to_num(0.0).mean(2)


def keep_top(scores: Tensor, visible: Tensor, counts: Tensor, sink: int | Tensor, recent: int | Tensor) -> Tensor:
    """The `counts` best visible tokens of each query, the first `sink` and last `recent` visible ones among them.

    The batched form of the rule in `lean_kernels.ref.loki.selected`, for all queries of a text at once.

    Args:
        scores: [B, H, Q, S]; visible: [B or 1, 1 or H, Q, S] bool; counts: [B or 1, 1, Q], as sink and recent may be.
    """
    place = visible.cumsum(-1)  # 1, 2, .. over visible tokens
    total = place[..., -1:]
    ends = (place <= _column(sink)) | (place > total - _column(recent))
    ranked = scores.masked_fill(~visible, -torch.inf).masked_fill(ends & visible, torch.inf)
    counts = torch.maximum(counts, torch.minimum(_number(sink) + _number(recent), total.squeeze(-1)))
    most = min(int(counts.max()), scores.shape[-1])
    best = ranked.topk(most, dim=-1).indices
    within = (torch.arange(most, device=scores.device) < counts[..., None]).expand(best.shape)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, within) & visible


def _column(amount: int | Tensor) -> int | Tensor:
    return amount[..., None] if isinstance(amount, Tensor) else amount


def _number(amount: int | Tensor) -> Tensor:
    return amount if isinstance(amount, Tensor) else torch.tensor(amount)


def keep_top_blocks(scores: Tensor, visible: Tensor, counts: Tensor, config: LokiConfig, block: int) -> Tensor:
    """As `keep_top`, in runs of `block` tokens: a run counts as its best token, and all its visible tokens are kept."""
    tokens = scores.shape[-1]
    if block == 1:
        return keep_top(scores, visible, counts, config.sink, config.recent)
    best = to_blocks(scores.masked_fill(~visible, -torch.inf), block, -torch.inf).amax(-1)
    place = visible.cumsum(-1)
    total = place[..., -1:]
    ends = visible & ((place <= config.sink) | (place > total - config.recent))
    return spread(best_blocks(best, ends, visible, counts, block), block, tokens) & visible


def best_blocks(scores: Tensor, ends: Tensor, visible: Tensor, counts: Tensor, block: int) -> Tensor:
    """Best blocks [B, H, Q, S/block], those that hold a token of `ends` first."""
    always = to_blocks(ends, block, False).any(-1)
    present = to_blocks(visible, block, False).any(-1)
    wanted = torch.maximum(-(-counts // block), always.sum(-1))
    return keep_top(scores.masked_fill(always, torch.inf), present, wanted, 0, 0)


def to_blocks(values: Tensor, block: int, fill: Any) -> Tensor:
    """[.., S] as [.., ceil(S / block), block], filled up with `fill`."""
    short = -values.shape[-1] % block
    padded = torch.nn.functional.pad(values, (0, short), value=fill) if short else values
    return padded.unflatten(-1, (-1, block))


def spread(blocks: Tensor, block: int, tokens: int) -> Tensor:
    """[.., ceil(S / block)] as [.., S]."""
    return blocks.repeat_interleave(block, dim=-1)[..., :tokens]
