"""Batches against a server that loses parts of them, a model in this process, and transformers serve."""

from __future__ import annotations

import json

import pytest
from llm_server import Answer, Server, refusal

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, Request, ServiceFailed, Stopped, stream
from instruct_data.llm.batch import BatchEndpoint
from instruct_data.llm.local import LocalModel
from model_hooks import RequestError, load, zoo

CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def request(text, **sampling):
    return Request("test", "fake", ({"role": "user", "content": text},), sampling)


class BatchServer(Server):
    """The batch API. `outcome(custom_id, times)` says what becomes of a line: ok, error, lost; `status` of a batch."""

    def __init__(self, outcome=lambda text, times: "ok", status=lambda number: "completed"):
        super().__init__(self.serve)
        self.outcome, self.status, self.files, self.batches, self.sizes = outcome, status, {}, [], []
        self.seen, self.gone = {}, set()

    def serve(self, call):
        path = call.path.removeprefix("/v1")
        if path == "/files":
            content = call.body.partition(b'filename="requests.jsonl"')[2].partition(b"\r\n\r\n")[2]
            self.files[f"file-{len(self.files)}"] = content.partition(b"\r\n--")[0].decode()
            return self.said({"id": f"file-{len(self.files) - 1}", "object": "file"})
        if path == "/batches" and call.method == "POST":
            self.run(self.files[call.json["input_file_id"]])
            return self.said(self.batches[-1])
        if path.startswith("/batches/"):
            number = int(path.rpartition("-")[2])
            return refusal(404) if number in self.gone else self.said(self.batches[number])
        return Answer(self.files[path.split("/")[2]].encode())

    def run(self, content):
        lines = [json.loads(line) for line in content.splitlines()]
        good, bad = [], []
        for line in lines:
            text = line["body"]["messages"][-1]["content"]
            self.seen[text] = self.seen.get(text, 0) + 1
            found = self.outcome(text, self.seen[text])
            body = {"choices": [{"message": {"content": f"{text}!"}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 3, "completion_tokens": 2}}  # fmt: skip
            response = {"status_code": 200, "body": body}
            if found == "error":
                response = {"status_code": 500, "body": {"error": {"message": "broken"}}}
            if found != "lost":
                (good if found == "ok" else bad).append({"custom_id": line["custom_id"], "response": response})
        number = len(self.batches)
        self.sizes.append(len(lines))
        batch = {"id": f"batch-{number}", "object": "batch", "status": self.status(number)}
        for name, found in (("output", good), ("error", bad)):
            if found:
                self.files[f"{name}{number}"] = "\n".join(map(json.dumps, reversed(found)))
                batch[f"{name}_file_id"] = f"{name}{number}"
        self.batches.append(batch)

    def said(self, value):
        return Answer(json.dumps(value).encode())


def batched(server, folder, texts, **options):
    from openai import AsyncOpenAI

    with Journal(folder, {}) as journal:
        backend = BatchEndpoint(
            AsyncOpenAI(api_key="none", base_url=server.url, max_retries=0), journal, poll=0.01, linger=0.1, **options
        )
        client = Client(backend, journal)
        return list(stream(client, client.ask, [request(text) for text in texts], ahead=1000)), client


def test_only_what_a_batch_lost_is_sent_again(tmp_path):
    def outcome(text, times):
        number = int(text)
        return "ok" if times > 1 else "error" if number % 5 == 1 else "lost" if number % 5 == 2 else "ok"

    texts = [str(n) for n in range(50)]
    with BatchServer(outcome, lambda number: "expired" if number == 0 else "completed") as server:
        replies, client = batched(server, tmp_path, texts)
        assert [r.text for r in replies] == [f"{n}!" for n in range(50)]
        assert server.sizes == [50, 20]
        assert client.ledger.total.usage.total == 5 * 50
        replies, client = batched(server, tmp_path, texts)
        assert (client.ledger.sent, len(server.sizes)) == (0, 2)


def test_what_every_batch_loses_fails_with_its_reason(tmp_path):
    with BatchServer(lambda text, times: "error" if text == "1" else "ok") as server:
        replies, _ = batched(server, tmp_path, ["0", "1", "2"], rounds=2)
    assert [r.text for r in replies] == ["0!", None, "2!"]
    assert "broken" in replies[1].error
    assert server.sizes == [3, 1]


def test_batches_have_a_most_and_a_failed_one_stops(tmp_path):
    with BatchServer() as server:
        replies, _ = batched(server, tmp_path / "most", [str(n) for n in range(25)], most=10)
        assert [r.text for r in replies] == [f"{n}!" for n in range(25)]
        assert server.sizes == [10, 10, 5]
    with BatchServer(status=lambda number: "failed") as server, pytest.raises(ServiceFailed, match="batch-0 failed"):
        batched(server, tmp_path / "failed", ["a"])
    with pytest.raises(RequestError, match="1 to 50000"):
        batched(server, tmp_path / "many", ["a"], most=50_001)


def test_a_batch_that_failed_or_is_gone_does_not_stop_the_next_run(tmp_path):
    with BatchServer(status=lambda number: "failed" if number == 0 else "completed") as server:
        with pytest.raises(ServiceFailed, match="batch-0 failed"):
            batched(server, tmp_path, ["a"])
        assert batched(server, tmp_path, ["b"])[0][0].text == "b!"
        server.gone = {0, 1}
        replies, _ = batched(server, tmp_path, ["a", "b", "c"])
        assert [r.text for r in replies] == ["a!", "b!", "c!"]
        assert server.sizes == [1, 1, 2]


def test_a_killed_run_takes_the_answers_of_its_open_batch(tmp_path):
    with BatchServer(status=lambda number: "in_progress") as server:

        async def stop(self, seconds):
            raise Stopped("killed while it polls")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Client, "_sleep", stop)
            with pytest.raises(Stopped):
                batched(server, tmp_path, ["a", "b"])
        assert server.sizes == [2]
        server.batches[0]["status"] = "completed"
        replies, _ = batched(server, tmp_path, ["a", "b"])
        assert [r.text for r in replies] == ["a!", "b!"]
        assert server.sizes == [2]


@pytest.fixture(scope="module")
def small():
    """zoo:llama with a chat template."""
    model, tokenizer = load("zoo:llama", dtype="float32")
    tokenizer.chat_template = CHAT
    return model, tokenizer


def local(small, folder, *requests, **options):
    model, tokenizer = small
    with Journal(folder, {}) as journal:
        client = Client(LocalModel(model, tokenizer, **options), journal)
        return list(stream(client, client.ask, requests))


def test_a_model_in_this_process_answers_as_it_generates(small, tmp_path):
    import torch

    model, tokenizer = small
    prompts = ["import os", "def add(a, b):", "x"]
    replies = local(small, tmp_path, *(request(p, max_tokens=6) for p in prompts), batch_size=2)
    for prompt, reply in zip(prompts, replies):
        ids = tokenizer(f"{prompt}\n", add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert reply.text == tokenizer.decode(out, skip_special_tokens=True)
        assert reply.usage.prompt == ids["input_ids"].shape[1]
        assert reply.finish_reason == ("length" if len(out) == 6 else "stop")


def test_a_prompt_that_is_too_long_fails_alone_and_an_answer_ends_with_the_context(small, tmp_path):
    model, tokenizer = small
    lengths = {text: len(tokenizer(f"{text}\n")["input_ids"]) for text in ("x", "x y", "x y z " * 5)}
    short, longer, longest = lengths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "max_position_embeddings", lengths[longest])
        asked = [request(text, max_tokens=4) for text in (longest, short, longer)]
        failed, *good = local(small, tmp_path / "a", *asked)
        most = lengths[longest] - lengths[short]
        cut, whole = local(small, tmp_path / "b", request(short, max_tokens=most + 9), request(longer, max_tokens=4))
    assert failed.text is None
    assert failed.error == f"prompt of {lengths[longest]} tokens, the model takes {lengths[longest]} with the answer"
    assert [reply.usage.prompt for reply in good] == [lengths[short], lengths[longer]]
    assert cut.usage.completion <= most
    assert cut.truncated == (cut.usage.completion == most)
    assert whole.text == good[1].text


def test_samples_are_drawn_by_their_request(small, tmp_path):
    drawn = request("import", max_tokens=8, temperature=1.0).candidates(3)
    one = [r.text for r in local(small, tmp_path / "a", *drawn)]
    two = [r.text for r in local(small, tmp_path / "b", *reversed(drawn))]
    assert one == two[::-1]
    assert len(set(one)) > 1


def test_a_model_in_this_process_refuses_what_it_cannot_do(small, tmp_path):
    model, tokenizer = small
    with pytest.raises(RequestError, match="logit_bias"):
        local(small, tmp_path, request("x", logit_bias={}))
    schema = Request("test", "fake", ({"role": "user", "content": "x"},), schema={"type": "object"})
    with pytest.raises(RequestError, match="a schema"):
        local(small, tmp_path, schema)
    tokenizer.chat_template = None
    try:
        with pytest.raises(RequestError, match="chat template"):
            LocalModel(model, tokenizer)
    finally:
        tokenizer.chat_template = CHAT


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_in_this_process(small, tmp_path):
    _, tokenizer = small
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    for file in zoo.resolve("zoo:llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    from instruct_data.llm.serve import serving

    with serving(tmp_path) as url, Journal(tmp_path / "journal", {}) as journal:
        client = Client(Endpoint([url], concurrency=4), journal)
        asked = [Request("t", str(tmp_path), request(p).messages, {"max_tokens": 6, "temperature": 0}) for p in "ab"]
        served = list(stream(client, client.ask, asked))
    here = local(small, tmp_path / "here", *(request(p, max_tokens=6) for p in "ab"))
    assert [r.text for r in served] == [r.text for r in here]
    assert [r.usage.prompt for r in served] == [r.usage.prompt for r in here]
