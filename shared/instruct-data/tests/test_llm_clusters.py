"""Engines beyond this process: a real Ray cluster of one machine, over HTTP and with an engine's stand-in; and vLLM's
interface, by a stand-in too, since neither runs without a GPU."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_server import Server, answer, refusal

from instruct_data import Journal
from instruct_data.llm import Client, Request, ServiceFailed, stream
from instruct_data.llm.ray_data import RayData, shape_of
from instruct_data.llm.service import Service
from instruct_data.llm.vllm_model import VllmModel
from model_hooks import RequestError

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def request(text, schema=None, **sampling):
    return Request("test", "fake", ({"role": "user", "content": text},), sampling, schema)


def asked(backend, folder, requests):
    with Journal(folder, {}) as journal:
        client = Client(backend, journal)
        return list(stream(client, client.ask, requests)), client


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine; it tells nobody, and starts no dashboard."""
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    pytest.importorskip("ray.data.llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield ray
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_calls_servers_and_the_journal_has_every_reply(cluster, tmp_path):
    tried = {}

    def script(call):
        text = call.json["messages"][-1]["content"]
        assert None not in call.json.values()  # no field that the request does not have
        tried[text] = tried.get(text, 0) + 1
        if text == "1" and tried[text] == 1:
            return refusal(503)
        return refusal(400, "too long") if text == "2" else answer(f"{text}!")

    texts = [request(str(n), temperature=0.5) for n in range(12)]
    with Server(script) as server:
        replies, client = asked(RayData("fake", [server.url], "none", concurrency=4), tmp_path, texts)
        assert [r.text for r in replies] == [None if n == 2 else f"{n}!" for n in range(12)]
        assert "too long" in replies[2].error
        assert client.ledger.total.usage.total == 11 * 15
        assert tried == {str(n): 2 if n == 1 else 1 for n in range(12)}
        again, client = asked(RayData("fake", [server.url], "none"), tmp_path, texts[3:])
        assert [r.text for r in again] == [r.text for r in replies[3:]]
        assert client.ledger.sent == 0
    refused = {"reply": json.dumps({"error": {"message": "no such key", "code": "invalid_api_key"}})}
    with pytest.raises(ServiceFailed, match="no such key"):
        RayData("fake", ["http://127.0.0.1/v1"])._reply(refused, texts[0])
    assert cluster.is_initialized()  # a cluster that was there stays


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_asks_its_engines(cluster, tmp_path, monkeypatch):
    import ray.data.llm

    made = []

    def engine(row):
        """A worker's: what Ray's vLLM stage adds to a row."""
        how = dict(row["sampling_params"])
        text = f"{row['messages'][-1]['content']} {sorted(how)} {how['max_tokens']} {how.get('structured_outputs')}"
        return {**row, "generated_text": text, "num_input_tokens": 3, "num_generated_tokens": int(how["max_tokens"])}

    def build(config, preprocess, postprocess):
        made.append(config)
        return lambda data: data.map(preprocess).map(engine).map(postprocess)

    monkeypatch.setattr(ray.data.llm, "build_processor", build)
    wanted = [request("a"), request("b", SCHEMA, temperature=0.7, max_tokens=9)]
    (first, second), client = asked(RayData("some/model", workers=2, concurrency=4), tmp_path, wanted)
    assert first.text == "a ['max_tokens', 'temperature'] 512 None"
    assert second.text.startswith("b ['max_tokens', 'seed', 'structured_outputs', 'temperature'] 9 {'json'")
    assert (second.finish_reason, second.usage.total) == ("length", 12)
    assert {(one.model_source, one.concurrency, one.batch_size) for one in made} == {("some/model", 2, 4)}
    assert client.ledger.sent == 2
    with pytest.raises(RequestError, match="cannot take logit_bias"):
        asked(RayData("some/model"), tmp_path, [request("c", logit_bias=1)])


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)))
def test_bodies_of_one_shape_have_the_same_keys(body):
    assert shape_of(body) == shape_of(dict(reversed(body.items())))
    assert shape_of(body) != shape_of({**body, "another": None})
    assert shape_of([body, body]) == shape_of([body])


class Words:
    """A tokenizer whose tokens are words."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "\n".join(message["content"] for message in messages)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


class Llm:
    """The part of `vllm.LLM` that is used."""

    def __init__(self, model, **options):
        self.model, self.options = model, options
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))

    def get_tokenizer(self):
        return Words()

    def chat(self, messages, sampling_params=None, use_tqdm=True):
        assert len(messages) == len(sampling_params)
        assert use_tqdm is False
        for said, how in zip(messages, sampling_params):
            text = f"{said[-1]['content']} {sorted(how.given.items(), key=str)}"
            one = SimpleNamespace(text=text, finish_reason="stop", token_ids=[1, 2])
            yield SimpleNamespace(outputs=[one], prompt_token_ids=[1, 2, 3], num_cached_tokens=1)


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM = Llm
    module.SamplingParams = lambda **given: SimpleNamespace(given=given)
    module.sampling_params = SimpleNamespace(StructuredOutputsParams=lambda json: f"schema {sorted(json)}")
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_is_asked_with_what_a_request_says(vllm, tmp_path):
    wanted = [request("a"), request("b", SCHEMA, temperature=0.5, max_tokens=7), request("a")]
    service = Service(tmp_path / "journal", "test", backend="vllm")
    with Journal(tmp_path / "j", {}) as journal:
        backend = service.make("some/model", journal)
    assert isinstance(backend, VllmModel)
    replies, client = asked(backend, tmp_path / "j", wanted)
    assert replies[0].text == replies[2].text == "a [('max_tokens', 99), ('temperature', 0.0)]"  # the context's rest
    assert "('structured_outputs', \"schema ['properties', 'type']\")" in replies[1].text
    assert f"('seed', {wanted[1].seed})" in replies[1].text
    assert client.ledger.sent == 2
    assert (client.ledger.total.usage.total, client.ledger.total.usage.cached) == (10, 2)
    with pytest.raises(RequestError, match="cannot take logit_bias"):
        asked(VllmModel("some/model"), tmp_path / "j", [request("c", logit_bias=1)])


def test_a_prompt_that_vllm_cannot_take_fails_alone(vllm, tmp_path):
    wanted = [request("a"), request("word " * 100), request("word " * 99)]
    first, second, third = asked(VllmModel("some/model"), tmp_path / "j", wanted)[0]
    assert first.text.startswith("a [('max_tokens', 99)")
    assert (second.text, second.error) == (None, "prompt of 100 tokens, the model takes 100 with the answer")
    assert "('max_tokens', 1)" in third.text
    assert asked(VllmModel("some/model"), tmp_path / "k", wanted[1:2])[0][0].text is None


def test_servers_get_a_part_of_the_requests_at_a_time_and_engines_all():
    requests = [request(str(n)) for n in range(70)]
    servers, engines = (SimpleNamespace(urls=urls, workers=2, batch=1) for urls in (("http://a/v1",), ()))
    assert list(map(len, RayData.groups(servers, requests))) == [32, 32, 6]
    assert list(map(len, RayData.groups(engines, requests))) == [70]


def test_vllm_without_a_gpu_is_one_clear_line(vllm, monkeypatch):
    def none(self, model):
        raise RuntimeError("Device string must not be empty")  # what 0.33 says

    monkeypatch.setattr(Llm, "__init__", none)
    with pytest.raises(RequestError, match=r"vLLM cannot run some/model here, is there a GPU\? It said: Device string"):
        VllmModel("some/model")


@pytest.mark.parametrize(("name", "missing", "says"), [
    ("vllm", "vllm", r"the backend vllm needs vLLM: install with the extra \[vllm\]"),
    ("ray", "ray", r"the backend ray needs ray: install with the extra \[ray\]"),
])  # fmt: skip
def test_what_is_missing_is_named(name, missing, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RequestError, match=says), Journal(tmp_path / "j", {}) as journal:
        Service(tmp_path / "j", "test", backend=name).make("some/model", journal)
