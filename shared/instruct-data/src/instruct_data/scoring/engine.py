"""Scoring: pairs in, summed losses out; every distinct segment is forwarded once, and nothing is lost to a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from instruct_data.ifd import ifd
from instruct_data.journal import Journal
from model_hooks import fingerprint
from model_hooks.errors import RequestError

from . import results
from .forward import Forward, Progress
from .heads import Heads
from .losses import Losses
from .pairs import STATUSES, Compat, Encoder, Pair
from .segments import Segments, SegmentWriter
from .shards import WINDOW, Shard, cost_of, ranks

ENCODE = 512  # pairs tokenised in one call


def score(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Pair],
    *,
    compat: Compat = "original",
    max_length: int = 1024,
    budget: int | Literal["auto"] | None = None,
    folder: str | Path | None = None,
    rank: int | None = None,
    world: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    heads: Sequence[str] = (),
) -> results.Scores:
    """Losses of each pair's response with and without its prompt, rows in input order.

    Args:
        model: a causal language model of transformers, on its device, in its dtype.
        pairs: read once, as a stream.
        compat: `original` or `aligned`, see `pairs`.
        max_length: of prompt and response in tokens; lowered, with a warning, to what the model's positions allow.
        budget: padded tokens a batch may hold; by default 256 on a CPU and 32,768 on a GPU; `auto` measures for at
            most about 5 seconds (and the folder remembers the answer, so that a resumed run makes the same batches).
        folder: holds the journal and the scores; a run that was stopped goes on there. None: nothing is kept.
        rank, world: the share of the pairs to score, by default from RANK and WORLD_SIZE; `merge` joins the shares.
        settings: further facts that a resumed run must share (the template's name), written to the manifest.
        progress: called with (tokens done, tokens in all) of this rank.
        heads: texts that many prompts begin with. Each is forwarded once and kept, where the model's cache gives what
            whole forwards give; else this has no effect. What a batch's rows lack of it they need not forward.

    Raises `RequestError` for a model or tokenizer that cannot do it, `FingerprintMismatch` for a folder made with other
    settings, `OSError` naming the path where the disk is full: what was journalled stays, and the run can go on.
    Texts and tokens stay on disk: a pair costs about 120 bytes of memory, 300 while segments are sorted.
    """
    began = time.perf_counter()
    rank, world = ranks(rank, world)
    if world > 1 and folder is None:
        raise RequestError(f"rank {rank} of {world} needs a folder that all ranks write to, so that merge finds them")
    if isinstance(budget, int) and budget < 1:
        raise RequestError(f"budget {budget}: a batch holds at least 1 token; 1 forwards one by one")
    losses, limit = Losses(model), context_limit(model, max_length)
    encoder = Encoder(tokenizer, compat, limit, vocabulary(model))
    # without a folder nobody compares, and hashing the weights takes a second
    identity = facts_of(model, tokenizer) if folder else {}
    dtype = str(model.dtype).removeprefix("torch.")
    given = {**(settings or {}), **identity, "dtype": dtype, "compat": compat, "max_length": limit}
    temporary = None if folder else tempfile.TemporaryDirectory(prefix="scores-")
    root = Path(folder or temporary.name)  # type: ignore[union-attr]
    target = results.shard_folder(root, rank, world)
    with (
        _naming(root),
        Journal(root, given, writer=f"rank-{rank}") as journal,
        _scratch(root / f".segments-{rank}") as scratch,
    ):
        shard = Shard(pairs, rank, world, cost_of(model, limit))
        segments = tokenise(shard, encoder, scratch)
        forward = Forward(losses, segments, journal)
        with _evaluating(model):
            forward.prepare(budget, (rank, world), Heads(encoder.heads(heads)))
            forward.run(progress)
        about = {"input": shard.digest, "total": shard.total, "settings": given, "rank": rank, "world": world}
        failed = int(_failed(segments, forward.sums, slice(None)).sum())
        took = {"failed": failed, "seconds": round(time.perf_counter() - began, 3)}
        results.write(target, _rows(segments, forward.sums, shard.total), {**about, **forward.facts, **took})
    return results.Scores(target, temporary)


def tokenise(pairs: Iterable[tuple[int, Pair]], encoder: Encoder, folder: Path) -> Segments:
    """Encode the pairs, with their indices, into files in `folder`."""
    stream = iter(pairs)
    with SegmentWriter(folder) as writer:
        while chunk := list(islice(stream, ENCODE)):
            for (index, pair), encoded in zip(chunk, encoder.encode([pair for _, pair in chunk])):
                writer.add(index, pair.key, encoded)
    return Segments(folder)


def context_limit(model: Any, max_length: int) -> int:
    """`max_length`, or the number of the model's positions where that is less (with a warning)."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or max_length <= context:
        return max_length
    warnings.warn(f"max_length {max_length} is lowered to {context}, the model's context", stacklevel=3)
    return context


def vocabulary(model: Any) -> int:
    """How many tokens the model both reads and predicts."""
    return int(min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]))


def facts_of(model: Any, tokenizer: Any) -> dict[str, str]:
    """What of a model and a tokenizer a score depends on, for the manifest."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass")
    return {
        "model": fingerprint(model),
        "tokenizer": hashlib.blake2b(vocab, digest_size=8).hexdigest(),
    }


def _side(segments: Segments, sums: NDArray[np.float64], name: str, rows: slice) -> tuple[Any, Any]:
    """(sum, count) of one side of the pairs `rows`; the sum is NaN where there is none."""
    numbers = np.asarray(segments.pairs[name][rows])
    counts = segments.targets(numbers)
    found = sums[segments.place[numbers]] if len(sums) else np.full(len(numbers), np.nan)
    return np.where(counts > 0, found, np.nan), counts


def _failed(segments: Segments, sums: NDArray[np.float64], rows: slice) -> NDArray[np.bool_]:
    failed: NDArray[np.bool_] = segments.pairs["status"][rows] == STATUSES.index("failed")
    for name in ("cond", "direct"):
        total, count = _side(segments, sums, name, rows)
        failed |= (count > 0) & np.isnan(total)
    return failed


def _rows(segments: Segments, sums: NDArray[np.float64], total: int) -> Iterator[pa.RecordBatch]:
    """One record batch per window of the input, also where none of its pairs are this rank's."""
    keys, index = segments.keys(), segments.pairs["index"]
    for start in range(0, total, WINDOW):
        rows = slice(*np.searchsorted(index, [start, start + WINDOW]))
        cond, n_cond = _side(segments, sums, "cond", rows)
        direct, n_direct = _side(segments, sums, "direct", rows)
        failed = _failed(segments, sums, rows)
        status = [
            "failed" if bad else STATUSES[code] for bad, code in zip(failed, segments.pairs["status"][rows].tolist())
        ]
        columns: dict[str, Any] = {
            "index": index[rows].tolist(), "key": list(islice(keys, len(failed))),
            "loss_cond_sum": _nullable(cond), "n_cond": n_cond.tolist(),
            "loss_direct_sum": _nullable(direct), "n_direct": n_direct.tolist(),
            "truncated": segments.pairs["truncated"][rows].tolist(), "status": status,
        }  # fmt: skip
        names = ("loss_cond_sum", "n_cond", "loss_direct_sum", "n_direct")
        scored = [ifd(*row) for row in zip(*(columns[name] for name in names))]
        for name in ("ppl_A_condition", "ppl_A_direct", "ifd_ppl", "ifd_loss"):
            columns[name] = [getattr(s, name) for s in scored]
        yield pa.RecordBatch.from_pydict(columns, results.SCHEMA)


def _nullable(values: NDArray[np.float64]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """An `OSError` that leaves the block without a path says `folder`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is not there before (a killed run may have left it) and not after."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    with _one_gelu(model):
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _one_gelu(model: Any) -> Iterator[None]:
    """Inside, GPT-2's activation in float32, which transformers writes as eight operations, is torch's one for it."""
    from transformers.activations import NewGELUActivation

    plain = model.dtype == torch.float32
    found = [m for m in model.modules() if plain and type(m) is NewGELUActivation and "forward" not in m.__dict__]
    for module in found:
        module.forward = partial(torch.nn.functional.gelu, approximate="tanh")
    try:
        yield
    finally:
        for module in found:
            del module.forward
