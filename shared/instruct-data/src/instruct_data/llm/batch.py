"""OpenAI's batch API: half the price, an answer within a day, and nothing lost on the way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from instruct_data.journal import Journal, content_key
from model_hooks.errors import RequestError

from .errors import ServiceFailed
from .gathered import Gathered, Sleep
from .request import Reply, Request, reply_of

if TYPE_CHECKING:
    import openai

MOST = 50_000  # requests of one batch
ENDED = ("completed", "failed", "expired", "cancelled")


class BatchEndpoint(Gathered):
    """A back end that uploads requests as files and polls. `custom_id` of a line is the request's key.

    A batch's id is journalled before anything else is done with it; a run that was killed finds its open batches, waits
    for them, and takes their answers. Requests that came back with an error, or not at all because the batch expired,
    are sent again in a further batch, `rounds` times in all; those that are still left have failed.

    Raises `ServiceFailed` where the server refuses a new batch as a whole.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, journal: Journal, *, most: int = MOST, poll: float = 30.0,
        linger: float = 2.0, rounds: int = 3,
    ) -> None:  # fmt: skip
        if not 1 <= most <= MOST:
            raise RequestError(f"a batch of {most} requests; 1 to {MOST} are accepted")
        super().__init__(most, linger)
        self.client, self.journal, self.poll, self.rounds = client, journal, poll, rounds
        self._answers: dict[str, Reply] = {}
        self._resumed = False

    async def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        if not self._resumed:
            self._resumed = True
            await self._resume(sleep)
        errors: dict[str, str] = {}
        for _ in range(self.rounds):
            missing = [request for request in requests if request.key not in self._answers]
            if not missing:
                break
            batch = await self._ended(await self._submit(missing), sleep)
            if batch.status == "failed":
                raise ServiceFailed(f"the batch {batch.id} failed: {' '.join(str(batch.errors).split())[:300]}")
            errors |= await self._take(batch)
        lost = Reply(None, error="the batch ended without it")
        for place, r in enumerate(requests):
            yield place, self._answers.pop(r.key, Reply(None, error=errors[r.key]) if r.key in errors else lost)

    async def _resume(self, sleep: Sleep) -> None:
        """Take the answers of earlier runs' batches. One that failed has none, nor has one that the server lost."""
        from openai import NotFoundError

        for id in _journalled(self.journal):
            with suppress(NotFoundError):
                await self._take(await self._ended(id, sleep))

    async def _submit(self, requests: Sequence[Request]) -> str:
        """Upload and start a batch; returns its id, which is in the journal then."""
        lines = (
            json.dumps({"custom_id": r.key, "method": "POST", "url": "/v1/chat/completions", "body": r.body()})
            for r in requests
        )
        data = "\n".join(lines).encode()
        file = await self.client.files.create(file=("requests.jsonl", data), purpose="batch")
        batch = await self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        self.journal.append(_place(len(_journalled(self.journal))), batch.id)
        return str(batch.id)

    async def _ended(self, id: str, sleep: Sleep) -> Any:
        """The batch, when it has ended."""
        while True:
            batch = await self.client.batches.retrieve(id)
            if batch.status in ENDED:
                return batch
            await sleep(self.poll)

    async def _take(self, batch: Any) -> dict[str, str]:
        """Take the answers of a batch; returns the errors by key."""
        errors: dict[str, str] = {}
        async for line in self._lines(batch):
            response = line.get("response") or {}
            try:
                self._answers[line["custom_id"]] = reply_of(response.get("body"))
            except ValueError as error:
                said = line.get("error") or (response.get("body") or {}).get("error") or error
                errors[line["custom_id"]] = f"{response.get('status_code', '')} {said}".strip()[:300]
        return errors

    async def _lines(self, batch: Any) -> AsyncIterator[dict[str, Any]]:
        """The lines of the output file and of the error file."""
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                content = await self.client.files.content(file)
                for line in content.text.splitlines():
                    if line.strip():
                        yield json.loads(line)

    async def close(self) -> None:
        await super().close()
        await self.client.close()


def _place(number: int) -> str:
    return content_key({"batch": number})


def _journalled(journal: Journal) -> list[str]:
    """The ids of all batches of a journal, in the order of their beginning."""
    found: list[str] = []
    while (id := journal.get(_place(len(found)))) is not None:
        found.append(id)
    return found
