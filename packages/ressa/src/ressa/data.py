"""Images with text to calibrate, repair and measure on: read, checked, and made into a model's inputs.

A source is one of

    zoo:shapes[:SPLIT]             drawn shapes with questions: train, calibration or heldout
    FILE.jsonl                     a record each
    FOLDER                         a dataset saved by `datasets`
    OWNER/NAME[:CONFIG[:SPLIT]]    a hub dataset, read as a stream; the split is "train" if none is named

A record has `image` (or `images`), which are file names beside the file, bytes or PIL images; and either `question`
with `answer` (or `answers`, those of several people), or `caption` (or `annotations_captions`, as NoCaps has it), or
`messages` in chat form.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

PROMPT = "describe"  # before a caption, where the record has no question
SHAPES = "zoo:shapes"
ANSWERS = ("answers", "answer", "caption", "annotations_captions")  # the columns that may hold one or several
FORMS = "image with question and answer, image with caption, or image with messages"


class BadRow(RequestError):
    """A record that cannot be used: the message names it. `--skip-bad-rows` passes over some."""


@dataclass(frozen=True, eq=False)
class Example:
    """A record read: `messages` in chat form with an image part for each of `images`.

    `images` are what `open_image` opens: those of a whole data set are never held decoded. `answers` are all that count
    as right, the trained one first; `kind` groups figures; `where` names the record.
    """

    images: tuple[Any, ...]
    messages: tuple[dict[str, Any], ...]
    answers: tuple[str, ...]
    kind: str
    where: str

    @property
    def answer(self) -> str:
        return self.answers[0]

    def pictures(self) -> list[Any]:
        """The images, PIL in RGB."""
        return [open_image(image, self.where) for image in self.images]

    def answered(self, answer: str) -> Example:
        """The same with this answer alone."""
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return replace(self, messages=(*self.messages[:-1], said), answers=(answer,))

    def apart(self) -> list[Example]:
        """An example for each of the answers."""
        return [self] if len(self.answers) == 1 else [self.answered(answer) for answer in self.answers]


def read(
    source: str, samples: int, *, seed: int = 0, skip_bad_rows: int = 0, apart: bool = False, whole: bool = False
) -> list[Example]:  # fmt: skip
    """The first `samples` examples of `source`, fewer where it has fewer.

    seed: Of the drawn shapes alone. skip_bad_rows: So many records that cannot be used are passed over. apart: A record
    is an example for each of its answers, to train on; else one, with all of them to measure by. whole: Fewer than
    `samples` are refused.

    Raises `RequestError` for a source that cannot be read, holds no record or no image; `BadRow` for a record.
    """
    if samples < 1:
        raise RequestError(f"samples is {samples}; at least 1 is needed")
    found: list[Example] = []
    skipped: list[str] = []
    for where, record in _records(source, samples, seed):
        try:
            one = example(record, where, base=Path(source).parent)
            found += one.apart() if apart else [one]
        except BadRow as error:
            skipped.append(str(error))
            if len(skipped) > skip_bad_rows:
                more = f"; {skip_bad_rows} were passed over before" if skip_bad_rows else ""
                raise BadRow(f"{error}{more}; mend it, or give --skip-bad-rows {len(skipped)} or more") from None
        if len(found) >= samples:
            break
    if not found:
        raise RequestError(
            f"{source} gives no examples{f', {len(skipped)} bad ones were passed over' if skipped else ''}"
        )
    if whole and len(found) < samples:
        raise RequestError(f"{source} gives {len(found)} examples, {samples} are asked for; ask fewer")
    return found[:samples]


def _records(source: str, samples: int, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if source == SHAPES or source.startswith(f"{SHAPES}:"):
        yield from _shapes(source, samples, seed)
        return
    path = Path(source)
    if path.is_file():
        if path.suffix != ".jsonl":
            raise RequestError(
                f"{source}: unknown kind of file; .jsonl, a folder saved by datasets or a hub name is read"
            )
        yield from _jsonl(path)
        return
    looks_local = path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute() or source.startswith((".", "~"))
    if looks_local and not path.is_dir():
        raise RequestError(f"no file {source}; give a .jsonl file, a saved dataset, owner/name or {SHAPES}")
    yield from _dataset(source)


def _shapes(source: str, samples: int, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from model_hooks.zoo import shapes

    split = source.removeprefix(SHAPES).removeprefix(":") or "train"
    try:
        items = shapes.items(split, samples, seed)
    except ValueError as error:
        raise RequestError(str(error)) from None
    for i, item in enumerate(items):
        row = {"image": item.image, "question": item.question, "answer": item.answer, "kind": item.kind}
        yield f"{source}, row {i}", row


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise RequestError(f"{path}:{number}: not JSON in UTF-8 ({error}); mend or remove this line") from None
            yield f"{path}:{number}", record


def _dataset(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a saved or a hub dataset; images stay bytes, so that a broken one is one bad row and not the end."""
    from paper_tables.frame import require

    datasets = require("datasets", extra="train", package="ressa")
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        if Path(source).is_dir():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RequestError(f"no dataset {source}: {reason}; give a .jsonl file, owner/name or {SHAPES}") from None
    if isinstance(found, Mapping):
        raise RequestError(f"{source} holds the splits {', '.join(found)}; name one of them")
    for column, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(found):
        yield f"{source}, row {number}", row


def example(record: Any, where: str, base: Path = Path()) -> Example:
    """The example of a record; file names of images are relative to `base`. Raises `BadRow`."""
    if not isinstance(record, Mapping):
        raise BadRow(f"{where}: a {type(record).__name__} is not a record; it needs {FORMS}")
    given = record.get("images") if record.get("images") is not None else record.get("image")
    several = given if isinstance(given, (list, tuple)) else [given]
    images = tuple(base / one if isinstance(one, str) else one for one in several if one is not None)
    if not images:
        raise BadRow(f"{where}: no image in it; a record needs {FORMS}")
    for image in images:
        open_image(image, where)  # a broken one is a bad row now, not a failure in the middle of training
    messages, answers = _conversation(record, where, len(images))
    placeholders = sum(part["type"] == "image" for m in messages for part in m["content"])
    if placeholders != len(images):
        have = f"{len(images)} image{'s are' if len(images) != 1 else ' is'} given"
        raise BadRow(f"{where}: {placeholders} image placeholder{'s' * (placeholders != 1)} in the text, {have}")
    return Example(images, messages, answers, str(record.get("kind", "")), where)


def open_image(image: Any, where: str) -> Any:
    """The PIL image, in RGB, of a path, bytes, a mapping with either, an array [H, W, 3] or one. Raises `BadRow`."""
    from PIL import Image

    if isinstance(image, Mapping):  # as `datasets` stores it
        image = image.get("bytes") or Path(str(image.get("path")))
    try:
        if isinstance(image, Image.Image):
            found = image
        elif isinstance(image, (Path, bytes)):
            found = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        else:
            found = Image.fromarray(image)
        return found.convert("RGB")
    except FileNotFoundError:
        raise BadRow(f"{where}: no image file {image}") from None
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise BadRow(f"{where}: the image cannot be read ({str(error).splitlines()[0]})") from None


def _conversation(record: Mapping[str, Any], where: str, images: int) -> tuple[tuple[dict[str, Any], ...], Any]:
    """The messages with their content as parts, and the answers."""
    if record.get("messages"):
        messages = tuple(_message(m, where) for m in record["messages"])
        if messages[-1]["role"] != "assistant":
            raise BadRow(f"{where}: the last message is the {messages[-1]['role']}'s; an assistant's is needed")
        said = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        return messages, (said,)
    answers: Any = next((record[name] for name in ANSWERS if record.get(name)), None)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, (list, tuple)) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise BadRow(f"{where}: no answer in it; a record needs {FORMS}")
    question = str(record.get("question") or PROMPT)
    parts = _split(question)
    if not any(part["type"] == "image" for part in parts):  # a question without placeholders: the images come first
        parts = [{"type": "image"}] * images + parts
    user = {"role": "user", "content": parts}
    return (user, {"role": "assistant", "content": [{"type": "text", "text": answers[0]}]}), tuple(answers)


def _message(message: Any, where: str) -> dict[str, Any]:
    try:
        role, content = str(message["role"]), message["content"]
        if isinstance(content, str):
            return {"role": role, "content": _split(content)}
        return {"role": role, "content": [_part(part) for part in content]}
    except (KeyError, TypeError):
        raise BadRow(f"{where}: {message!r} is not a message with role and content") from None


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _split(text: str) -> list[dict[str, Any]]:
    """Parts of a text with `<image>` in it."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def answers_by_kind(examples: Iterable[Example]) -> dict[str, int]:
    """How many examples of each kind there are."""
    counts: dict[str, int] = {}
    for one in examples:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return counts
