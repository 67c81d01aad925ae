"""A run of 300 requests that test_llm_kill.py kills: python llm_kill.py URL FOLDER [pause]

With "pause" it imports everything, says so, and then forks a child for each line that it reads, whose process id it
prints: one import for all kills.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, Request, stream


def run(url: str, folder: Path) -> None:
    texts = [f"record {n}" for n in range(300)]

    async def rewrite(text: str) -> list[str | None]:
        base = Request("rewrite", "fake", ({"role": "user", "content": text},), {"temperature": 0.3})
        replies = await asyncio.gather(*(client.ask(r) for r in base.candidates(2)))
        return [reply.text for reply in replies]

    with Journal(folder / "journal", {}) as journal:
        client = Client(Endpoint([url], concurrency=16), journal)
        rows = list(stream(client, rewrite, texts))
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "sent").write_text(str(client.ledger.sent))


if __name__ == "__main__":
    url, folder = sys.argv[1], Path(sys.argv[2])
    if len(sys.argv) > 3:
        print("ready", flush=True)
        for _ in sys.stdin:
            child = os.fork()
            if child == 0:
                run(url, folder)
                os._exit(0)
            print(child, flush=True)
            os.waitpid(child, 0)  # all its threads are gone then, and what they held
            print("ended", flush=True)
    else:
        run(url, folder)
