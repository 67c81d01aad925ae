"""Several replies by one request (`n` of OpenAI's protocol): the prompt is sent, and paid for, once.

`n` is not portable: many servers take it and send one choice. `Client` and journal know nothing of it: each candidate
stays a request of its own, with its own key, so that a run begun in one way goes on in the other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .endpoint import REPEATED, Endpoint
from .rate import Sleep
from .request import Reply, Request, Usage, said_in

Waiting = list[tuple[Request, "asyncio.Future[Reply]"]]


class ChoicesEndpoint(Endpoint):
    """An `Endpoint` that sends candidates of the same messages, where they are asked for together, as one request.

    The usage of a reply is the first candidate's; the others have none, so that an account adds up to what the server
    counted. Where a server sends fewer choices than asked for, or refuses `n`, the rest is asked for one by one, and
    all that follow: `several` says whether that has not been seen yet.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.several = True
        self._groups: dict[str, Waiting] = {}

    async def complete(self, request: Request, may_send: Callable[[], None], sleep: Sleep) -> Reply:
        if not self.several:
            return await super().complete(request, may_send, sleep)
        groups, key = self._groups, replace(request, candidate=0).key
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if key in groups:
            groups[key].append((request, future))
            return await future
        groups[key] = [(request, future)]
        await asyncio.sleep(0)  # the others of `asyncio.gather` are here after this
        group = sorted(groups.pop(key), key=lambda waiting: waiting[0].candidate)
        try:
            replies = await self._together([member for member, _ in group], may_send, sleep)
        except BaseException as error:
            for _, other in group:
                if not other.done():
                    other.set_exception(error)
            future.exception()  # it is raised here, too
            raise
        for (_, other), reply in zip(group, replies, strict=True):
            other.set_result(reply)
        return await future

    async def _together(self, group: Sequence[Request], may_send: Callable[[], None], sleep: Sleep) -> list[Reply]:
        """A reply for each of `group`, by as few requests as the server lets it be."""
        found: list[Reply] = []
        several = self.several
        while len(found) < len(group):
            count = len(group) - len(found) if several else 1
            first = group[len(found)]
            if count == 1:
                found.append(reply := await super().complete(first, may_send, sleep))
                self.several = self.several and (several or reply.text is None)
                continue
            wanted = replace(first, sampling={**first.sampling, "n": count})
            reply = await super().complete(wanted, may_send, sleep)
            if reply.text is not None:
                found += _apart(reply, count)
                several = self.several = self.several and len(found) == len(group)
            elif reply.error.startswith("4") and not reply.error.startswith(tuple(map(str, REPEATED))):
                several = False  # the server may not know `n`; it does if it refuses a request without it, too
            else:
                found += [reply] * count
        return found

    async def _post(self, body: Mapping[str, Any]) -> Any:
        found = await super()._post(body)
        return packed(found) if body.get("n", 1) > 1 else found


def _apart(reply: Reply, count: int) -> list[Reply]:
    """The replies that `packed` made one, `count` at most."""
    choices = [replace(reply, text=text, finish_reason=finish) for text, finish in json.loads(reply.text or "[]")]
    return [choices[0], *(replace(choice, usage=Usage(), attempts=0) for choice in choices[1:count])]


def packed(body: Any) -> Any:
    """`body` with one choice whose text holds those of all, as JSON: [[text, finish reason], ...]. A body that is no
    completion as it is."""
    try:
        choices = [said_in(choice) for choice in body["choices"]]
    except (TypeError, KeyError, AttributeError):
        return body
    whole = [choice for choice in choices if isinstance(choice[0], str)]
    if not whole:
        return body
    return {**body, "choices": [{"message": {"content": json.dumps(whole)}, "finish_reason": ""}]}
