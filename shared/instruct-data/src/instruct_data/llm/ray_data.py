"""Many machines, by Ray Data's processors (`ray.data.llm`): vLLM engines on a cluster's GPUs, or servers over HTTP.

    ray start --head                                  # on one machine, and with its address on the others
    realign run ... --backend ray --model Qwen/...    # vLLM must be installed on the workers
    realign run ... --backend ray-http --base-url http://127.0.0.1:8000/v1

Ray shares the requests out and streams what is done back; what is in the journal is never sent, and each reply is
journalled when it comes, so the rows are those of a run on one machine and a killed run goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from model_hooks.errors import RequestError

from .errors import ServiceFailed
from .gathered import Gathered, Sleep
from .request import Reply, Request, Usage, reply_of

MOST = 16384  # requests of one pass over the cluster
EACH = 16  # requests of a pass over servers, for each that may be in flight
SAID = "reply"  # column with the reply as JSON
FAILED = "__inference_error__"  # Ray's, of a row whose engine has failed
DEFAULT_TOKENS = 512  # of an answer where the request says nothing
SAMPLING = {"temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty"}


class RayData(Gathered):
    """A back end on the Ray cluster that is running (`RAY_ADDRESS`, or one started on this machine for the run).

    Args:
        model: Of the engines: a hub id, or a folder that every machine has.
        urls: Servers of OpenAI's protocol to call instead, a share of the requests each.
        key: Of these servers.
        workers: Engines, or processes that call a server.
        concurrency: Requests that a worker has at once.
        attempts: Of a server, for 408, 429 and 502 to 504.

    Raises:
        RequestError: the extra [ray] is missing, or sampling fields that engines do not take.
        ServiceFailed: Ray ended, or a server refused the key.
    """

    def __init__(
        self, model: str, urls: Sequence[str] = (), key: str = "none", *, workers: int = 1, concurrency: int = 32,
        attempts: int = 8,
    ) -> None:  # fmt: skip
        try:
            import ray
            import ray.data.llm
        except ImportError as error:
            raise RequestError(f"the backend ray needs {error.name or 'ray'}: install with the extra [ray]") from None
        super().__init__(MOST, linger=0.5)
        self.model, self.urls, self.key = model, tuple(urls), key
        self.workers, self.batch, self.attempts = workers, concurrency, attempts
        self._started = not ray.is_initialized()
        if self._started:
            alone: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **alone)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)

    def groups(self, requests: Sequence[Request]) -> Iterable[Sequence[int]]:
        """Servers are paid for, so they get a part at a time; engines load anew for each pass, so they get all."""
        size = EACH * self.workers * self.batch if self.urls else max(1, len(requests))
        return [range(len(requests))[start : start + size] for start in range(0, len(requests), size)]

    async def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        rows = self._rows(self._shares(requests))
        while True:
            try:
                row = await asyncio.to_thread(next, rows, None)
            except Exception as error:  # whatever happens on other machines
                raise ServiceFailed(f"Ray: {' '.join(str(error).split())[:300]}") from error
            if row is None:
                return
            yield int(row["place"]), self._reply(row, requests[int(row["place"])])

    def _shares(self, requests: Sequence[Request]) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """Rows by their shape and the number of their server."""
        shares: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for place, request in enumerate(requests):
            body = self._body(request)
            shares.setdefault((shape_of(body), place % max(1, len(self.urls))), []).append({"place": place, **body})
        return shares

    def _rows(self, shares: Mapping[tuple[str, int], list[dict[str, Any]]]) -> Iterator[Mapping[str, Any]]:
        """What came back, a row for each of them, in any order."""
        import ray

        for (_, number), rows in shares.items():
            # a block is what a worker gets at once: enough of them that none waits for a slow one
            blocks = min(len(rows), max(4 * self.workers, -(-len(rows) // self.batch)))
            data = ray.data.from_items(rows, override_num_blocks=blocks)
            yield from self._processor(number)(data).iter_rows()

    def _body(self, request: Request) -> dict[str, Any]:
        if self.urls:
            return {"body": request.body()}
        unknown = set(request.sampling) - SAMPLING
        if unknown:
            raise RequestError(f"the backend ray cannot take {', '.join(sorted(unknown))}; it takes {sorted(SAMPLING)}")
        sampling = {"max_tokens": DEFAULT_TOKENS, "temperature": 0.0, **request.sampling}
        if sampling["temperature"]:
            sampling["seed"] = request.seed
        if request.schema is not None:
            sampling["structured_outputs"] = {"json": json.dumps(dict(request.schema))}
        return {"messages": [dict(message) for message in request.messages], "sampling": sampling}

    def _processor(self, number: int) -> Any:
        from ray.data.llm import HttpRequestProcessorConfig, build_processor, vLLMEngineProcessorConfig

        if self.urls:
            http = HttpRequestProcessorConfig(
                url=f"{self.urls[number].rstrip('/')}/chat/completions",
                headers={"Authorization": f"Bearer {self.key}"}, batch_size=self.batch, concurrency=self.workers,
                max_retries=self.attempts - 1, base_retry_wait_time_in_s=0.5,
            )  # fmt: skip
            return build_processor(http, preprocess=_to_server, postprocess=_from_server)
        engine = vLLMEngineProcessorConfig(
            model_source=self.model, batch_size=self.batch, concurrency=self.workers, should_continue_on_error=True
        )
        return build_processor(engine, preprocess=_to_engine, postprocess=_from_engine)

    def _reply(self, row: Mapping[str, Any], request: Request) -> Reply:
        if row.get(FAILED):
            return Reply(None, error=str(row[FAILED])[:300])
        said = json.loads(row[SAID])
        if self.urls:
            try:
                return reply_of(said)
            except ValueError as error:
                _refuse(said)
                return Reply(None, error=str((said or {}).get("error") or error)[:300])
        most = request.sampling.get("max_tokens")
        finish = "length" if said["new"] == (most or DEFAULT_TOKENS) else "stop"
        return Reply(said["text"], finish, Usage(said["prompt"], said["new"]), self.model)

    async def close(self) -> None:
        await super().close()
        if self._started:
            import ray

            ray.shutdown()


def shape_of(value: Any) -> str:
    """The keys and types in a body. Rows of one table must have the same: Arrow gives others None where they lack."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shape_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + "|".join(sorted({shape_of(part) for part in value})) + "]"
    return type(value).__name__


def _refuse(said: Any) -> None:
    """Raise `ServiceFailed` where a server's answer is about the key or the quota: no other request would do better."""
    found = said.get("error") if isinstance(said, Mapping) else None
    error: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    code = str(error.get("code") or error.get("type") or "")
    if code in ("invalid_api_key", "authentication_error", "insufficient_quota", "permission_denied", "401", "403"):
        raise ServiceFailed(f"the server refuses: {error.get('message', code)}"[:300])


# What runs on the workers: plain functions of a row.


def _to_server(row: dict[str, Any]) -> dict[str, Any]:
    return {"payload": row["body"], "place": row["place"]}


def _from_server(row: dict[str, Any]) -> dict[str, Any]:
    return {"place": row["place"], SAID: _dumped(row["http_response"])}


def _to_engine(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["messages"], "sampling_params": row["sampling"], "place": row["place"]}


def _from_engine(row: dict[str, Any]) -> dict[str, Any]:
    said = {"text": row["generated_text"], "prompt": row["num_input_tokens"], "new": row["num_generated_tokens"]}
    return {"place": row["place"], SAID: _dumped(said)}


def _dumped(value: Any) -> str:
    """JSON of what may hold NumPy's numbers and arrays, as Ray's rows do."""
    return json.dumps(value, default=lambda held: held.tolist())
