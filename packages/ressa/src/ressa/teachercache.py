"""A teacher asked once, before training: its most likely tokens wherever an answer is learned, in a folder.

    ressa teacher-cache llava-hf/llava-1.5-7b-hf --data records.jsonl --samples 25000 -o taught
    ressa repair --model sparse --teacher-cache taught --data records.jsonl --samples 25000 -o repaired

Training then holds one model without its dense weights, and no step has a second forward pass. For each place, shards
hold the `top` largest log-probabilities at the temperature T, their tokens, and that of all other tokens together. KL
over these top + 1 events is never above the KL over the vocabulary, and equals it where `top` is the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_hooks.errors import RequestError
from ressa.encoding import IGNORED

RECORD, REQUEST = "teacher.json", "request.json"
NONE = -1e4  # log-probability of what cannot be; its exp is 0, and no difference from it is NaN
BAD = 0  # the digest of a record that could not be used
KEYS = ("teacher_tokens", "teacher_log_probs", "teacher_rest")  # of an example, beside its inputs


@dataclass(frozen=True)
class Answers:
    """What a teacher says at P places.

    Attributes:
        tokens: Its k most likely, int [P, k].
        log_probs: Theirs, [P, k].
        rest: That of all others together, [P]; `NONE` where there are no others.
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) summed over the places, of the student's logits [P, V] at this temperature."""
        ours = F.log_softmax(logits.float() / temperature, -1)
        tokens = self.tokens.long()
        found, theirs = ours.gather(-1, tokens), self.log_probs.detach()
        if tokens.shape[-1] < ours.shape[-1]:
            rest = ours.scatter(-1, tokens, -torch.inf).logsumexp(-1)
            found, theirs = torch.cat([found, rest[:, None]], -1), torch.cat([theirs, self.rest[:, None]], -1)
        return F.kl_div(found, theirs, reduction="sum", log_target=True)


def answers_of(logits: Tensor, temperature: float, top: int) -> Answers:
    """The teacher's answers, of its logits [P, V]."""
    said = F.log_softmax(logits.float() / temperature, -1)
    log_probs, tokens = said.topk(min(top, said.shape[-1]), -1)
    rest = said.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return Answers(tokens.int(), log_probs.clamp(min=NONE), rest.clamp(min=NONE))


def targets_of(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """Logits [P, V] of the places whose next token is learned, of logits [B, T, V] and labels [B, T]."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != IGNORED]


def digest_of(row: dict[str, Tensor]) -> int:
    """64 bits that tell an encoded example from any other."""
    found = hashlib.sha256()
    for name in sorted(row):
        found.update(f"{name}{list(row[name].shape)}".encode())
        found.update(row[name].contiguous().numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "little", signed=True)


@dataclass(frozen=True)
class Request:
    """What a cache holds, and all that decides it."""

    teacher: str
    data: str
    samples: int
    seed: int
    max_length: int
    temperature: float
    top: int
    dtype: str


def write(
    request: Request, output: Path, *, batch_size: int = 16, shard: int = 512, skip_bad_rows: int = 0,
    device_map: str = "", overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Ask the teacher about every example and write the folder. The same call goes on where a killed one was.

    Raises:
        RequestError: the output exists, or is being made by another request; the model or the data cannot be used.
    """
    from safetensors import safe_open

    from model_hooks.files import refuse_existing, refuse_overlap
    from model_hooks.loading import load_placed
    from model_hooks.processors import load_processor
    from paper_tables import progress
    from ressa.data import BadRow, read
    from ressa.encoding import encoder_of

    refuse_existing(output, overwrite)
    refuse_overlap(output, request.teacher)
    examples = read(request.data, request.samples, seed=request.seed, skip_bad_rows=skip_bad_rows, apart=True)
    part = _begun(output.with_name(f"{output.name}.part"), request)
    model = load_placed(request.teacher, request.dtype, device_map)[0].eval()
    encoder = encoder_of(model.config, load_processor(request.teacher), request.max_length)
    bad = 0
    with progress("examples", len(examples)) as bar:
        for start in range(0, len(examples), shard):
            file, chosen = part / f"{start:08d}.safetensors", examples[start : start + shard]
            if not file.is_file():
                rows: list[dict[str, Tensor] | None] = []
                for one in chosen:
                    try:
                        rows.append(encoder.encode(one))
                    except BadRow:
                        bad += 1
                        if bad > skip_bad_rows:
                            raise
                        rows.append(None)
                _write_shard(file, _asked(model, encoder, rows, request, batch_size, bar.advance))
            else:
                with safe_open(file, "pt") as opened:
                    bad += int((opened.get_tensor("digests") == BAD).sum())
                bar.advance(len(chosen))
    size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
    words = model.config.get_text_config(decoder=True).vocab_size
    record = {**asdict(request), "shard": shard, "examples": len(examples), "vocabulary": words}
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if output.exists():
        shutil.rmtree(output)
    part.rename(output)
    (output / REQUEST).unlink()  # only now: without it a killed run could not go on
    return {"output": output, "examples": len(examples), "top": min(request.top, words), "bytes": size}


def _begun(part: Path, request: Request) -> Path:
    """The folder that the shards go to. Raises `RequestError` where another request has begun there."""
    file, now = part / REQUEST, asdict(request)
    if part.exists():
        try:
            then = json.loads(file.read_text())
        except (OSError, ValueError):
            raise RequestError(f"{part} is in the way: move it or rename --output") from None
        changed = [name for name in now if then.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise RequestError(
                f"{part} was begun with {name} {then.get(name)!r}, now {now[name]!r}; give the same to go on, or "
                "remove that folder"
            )
        return part
    from model_hooks.files import atomic_folder

    with atomic_folder(part) as made:
        (made / REQUEST).write_text(json.dumps(now) + "\n")
    return part


@torch.no_grad()
def _asked(
    model: Any, encoder: Any, rows: Sequence[dict[str, Tensor] | None], request: Request, batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """A shard's tensors: answers of all places, `ends` of each example's places, digests."""
    from ressa.encoding import collate

    shift = not encoder.encoder_decoder
    found: list[Answers] = []
    good = [row for row in rows if row is not None]
    for start in range(0, len(good), batch_size):
        some = good[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collate(some, encoder.pad).items()}
        labels = batch["labels"]
        if shift:
            batch.pop("labels")
        logits = targets_of(model(**batch, use_cache=False).logits, labels, shift)
        found.append(answers_of(logits, request.temperature, request.top))
        advance(len(some))
    advance(len(rows) - len(good))
    places = [0 if r is None else int((r["labels"][:, 1:] if shift else r["labels"]).ne(IGNORED).sum()) for r in rows]
    digests = [BAD if row is None else digest_of(row) for row in rows]
    if not found:  # only bad rows
        words = model.config.get_text_config(decoder=True).vocab_size
        found.append(answers_of(torch.empty(0, words), request.temperature, request.top))
    joined = [torch.cat([getattr(a, name) for a in found]).cpu() for name in ("tokens", "log_probs", "rest")]
    own = {"ends": torch.tensor(places).cumsum(0), "digests": torch.tensor(digests)}
    return {**dict(zip(KEYS, joined, strict=True)), **own}


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    from model_hooks.files import atomic_file

    with atomic_file(file) as made:
        save_file(tensors, made)


class Cache:
    """A folder that `write` wrote, read a row at a time."""

    def __init__(self, folder: str | Path) -> None:
        """Raises `RequestError` for any other folder."""
        self.folder = Path(folder)
        try:
            self.record: dict[str, Any] = json.loads((self.folder / RECORD).read_text())
        except (OSError, ValueError):
            raise RequestError(
                f"--teacher-cache {folder} has no {RECORD}; give a folder that `ressa teacher-cache` wrote"
            ) from None
        self._open: dict[str, Any] = {}

    def refuse_others(self, config: Any, vocabulary: int) -> None:
        """Raise `RequestError` unless the teacher was asked what the repair `config` is about."""
        for name in ("data", "samples", "seed", "max_length", "temperature"):
            then, now = self.record[name], getattr(config, name)
            if then != now:
                flag = name.replace("_", "-")
                raise RequestError(
                    f"--teacher-cache {self.folder} was made with --{flag} {then}, now {now}; give {then}"
                )
        if self.record["vocabulary"] != vocabulary:
            raise RequestError(
                f"--teacher-cache {self.folder}: its teacher has {self.record['vocabulary']} words in its vocabulary, "
                f"{config.model} has {vocabulary}"
            )

    def of(self, index: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answers for the example at this place of the data, by `KEYS`.

        Raises `RequestError` where the teacher was shown something else there.
        """
        shard, place = divmod(index, self.record["shard"])
        name = f"{shard * self.record['shard']:08d}.safetensors"
        if name not in self._open:
            from safetensors import safe_open

            self._open = {name: safe_open(self.folder / name, "pt")}
        file = self._open[name]
        ends = file.get_tensor("ends")
        if int(file.get_tensor("digests")[place]) != digest_of(row):
            raise RequestError(
                f"--teacher-cache {self.folder}: example {index + 1} of {self.record['data']} is not what its teacher "
                "was shown; make the cache again with this data and this model's processor"
            )
        start, end = int(ends[place - 1]) if place else 0, int(ends[place])
        return {key: file.get_slice(key)[start:end] for key in KEYS}
