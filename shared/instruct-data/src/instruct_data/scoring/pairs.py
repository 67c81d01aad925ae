"""Pairs of texts, and the token segments whose losses say how well a model predicts a response with and without prompt.

Two ways of cutting texts into segments, never to be mixed in one ranking:

`original`: what Superfiltering's published code does, off-by-ones included. The prompt and the response are tokenised
together and the response alone; the response starts after as many tokens as the prompt alone has, even where the
tokenizer merges characters across the border; GPT-2 adds no BOS, so the response alone predicts one token fewer.

`aligned`: both sides average the same tokens. The response is the tokens of the whole text from the first that the
prompt alone does not have; alone, it stands behind a BOS (or EOS) token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from model_hooks.errors import RequestError

Compat = Literal["original", "aligned"]
Status = Literal["ok", "empty_response", "prompt_too_long", "one_token", "no_target", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Pair(NamedTuple):
    """A response after a prompt; the text scored is `prompt + response`. `key` names the row, no more."""

    key: str
    prompt: str
    response: str


class Segment(NamedTuple):
    """Token ids of which those from `first` on are predicted, each from all before it; first >= 1."""

    ids: Sequence[int]
    first: int

    @property
    def targets(self) -> int:
        return max(0, len(self.ids) - self.first)


class Encoded(NamedTuple):
    """A pair as segments: the response after its prompt, and alone.

    status: `ok`; `empty_response`; `prompt_too_long` (no token of the response is left within max_length);
    `one_token` (the response alone is a single token with nothing before it, so it has no loss); `no_target` (merged
    into the prompt, or no token at all); `failed` (text that is not Unicode).
    """

    cond: Segment | None
    direct: Segment | None
    truncated: bool
    status: Status


@dataclass
class Encoder:
    """Turns pairs into segments of at most `max_length` tokens. `vocab`: ids from this on have no embedding."""

    tokenizer: Any
    compat: Compat
    max_length: int
    vocab: int

    def __post_init__(self) -> None:
        if self.compat not in get_args(Compat):
            raise RequestError(f"compat {self.compat!r} is not known; choose one of {', '.join(get_args(Compat))}")
        if self.max_length < 2:
            raise RequestError(f"max_length {self.max_length} leaves nothing to predict; give 2 or more")
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.closing = len(mask) - 1 - max((i for i, special in enumerate(mask) if not special), default=len(mask) - 1)
        begin = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.begin: int | None = next((token for token in begin if token is not None), None)
        if self.compat == "aligned" and self.begin is None:
            raise RequestError("compat aligned needs a tokenizer with a BOS or EOS token; this one has neither")

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Segments of each pair, in order. Raises `RequestError` for ids the model has no embedding for."""
        scored = [p for p in pairs if p.response != "" and _is_unicode(p)]
        wholes = self._ids([p.prompt + p.response for p in scored])
        prompts = self._ids([p.prompt for p in scored])
        if self.compat == "original":
            alone = self._ids([p.response for p in scored])
            encoded = iter([self._original(*ids) for ids in zip(wholes, prompts, alone)])
        else:
            encoded = iter([self._aligned(*ids) for ids in zip(wholes, prompts)])
        self._check_vocabulary(scored, wholes)
        result = []
        for pair in pairs:
            if pair.response == "":
                result.append(Encoded(None, None, False, "empty_response"))
            else:
                result.append(next(encoded) if _is_unicode(pair) else Encoded(None, None, False, "failed"))
        return result

    def heads(self, texts: Sequence[str]) -> list[list[int]]:
        """Beginnings as token ids, without the last one, which what follows may change, and without closing tokens."""
        return [ids[: len(ids) - self.closing - 1] for ids in self._ids(list(texts))]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        made = self.tokenizer(texts, return_attention_mask=False, truncation=False, padding=False, verbose=False)
        return made["input_ids"]  # type: ignore[no-any-return]

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        """Truncated on the right as tokenizers do it: special tokens that close a text stay."""
        if len(ids) <= limit or not self.closing:
            return ids[:limit]
        return ids[: max(0, limit - self.closing)] + ids[-self.closing :]

    def _original(self, whole: list[int], prompt: list[int], alone: list[int]) -> Encoded:
        limit = self.max_length
        room = limit - min(len(prompt), limit) + 1  # the + 1 pays for a BOS, whether there is one or not
        cond = Segment(self._cut(whole, limit), max(1, len(prompt)))
        direct = Segment(self._cut(alone, room), 1)
        status: Status = "ok"
        if len(prompt) >= limit:
            status = "prompt_too_long"
        elif len(alone) == 1:
            status = "one_token"
        elif not (cond.targets and direct.targets):
            status = "no_target"
        return Encoded(cond, direct, len(whole) > limit or len(alone) > room, status)

    def _aligned(self, whole: list[int], prompt: list[int]) -> Encoded:
        assert self.begin is not None
        start = next((i for i, (a, b) in enumerate(zip(whole, prompt)) if a != b), min(len(whole), len(prompt)))
        if start == 0:  # nothing before the response: it gets the same start on both sides
            whole, start = [self.begin, *whole], 1
        cond = Segment(self._cut(whole, self.max_length), start)
        direct = Segment([self.begin, *cond.ids[start:]], 1)
        status: Status = "ok"
        if not cond.targets:
            status = "prompt_too_long" if start >= self.max_length else "no_target"
        return Encoded(cond, direct, len(whole) > self.max_length, status)

    def _check_vocabulary(self, pairs: list[Pair], wholes: list[list[int]]) -> None:
        for pair, ids in zip(pairs, wholes):
            if ids and max(ids) >= self.vocab:
                raise RequestError(
                    f"the tokenizer gives token {max(ids)} for {pair.key}, the model has {self.vocab} embeddings; "
                    "give the tokenizer that belongs to the model"
                )


def _is_unicode(pair: Pair) -> bool:
    """False for lone surrogates, which JSON can carry and no tokenizer takes."""
    try:
        (pair.prompt + pair.response).encode()
    except UnicodeEncodeError:
        return False
    return True
