"""The command as its users see it, on a tiny checkpoint; and lm-eval's requests, routed on their contexts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Command
from mod_router import attach, routing_context, save
from mod_router.cli import app
from mod_router.usage import plan
from routermodels import randomise

from model_hooks import drop, load
from model_hooks.zoo import tokenizer as zoo_tokenizer

DATA = ("--samples", "6", "--length", "48")


COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers with the zoo's tokenizer. Not to be written to."""
    import transformers
    from routermodels import SMALL

    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = zoo_tokenizer.load()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)})
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def routers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomise(attach(load(base, tokenizer=False)[0], layers=(1, 2)), scale=0.3, seed=2)
    return save(model, tmp_path_factory.mktemp("routers") / "routers", base=str(base), measured={"capacity": 0.5})


def test_eval_says_what_routing_costs(routers: Path) -> None:
    found = said("eval", routers, *DATA, "-o", "eval.json")
    (row,) = found["figures"]
    assert row["difference"] == pytest.approx(row["routed"] - row["ungated"], abs=1e-5)
    assert 0 < found["capacity"] < 1
    assert json.loads(Path("eval.json").read_text()) == found
    whole = said("eval", routers, *DATA, "--tau", 1e-6)
    assert whole["capacity"] == 1
    assert whole["figures"][0]["difference"] == 0
    assert whole["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_tasks_are_routed_on_their_contexts(routers: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    found = said("eval", routers, "--data", "", "--tasks", "zoo_name", "--limit", 8)
    (row,) = found["figures"]
    assert row["figure"] == "zoo_name"
    assert 0 <= row["routed"] <= 1
    assert "kept" in row


def test_lm_eval_requests_share_the_decision_of_their_context(base: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    from mod_router.lm import routed_lm

    model, tokenizer = load(base)
    randomise(attach(model, layers=(1, 2)), scale=0.3, seed=2)
    lm = routed_lm()(pretrained=model, tokenizer=tokenizer, batch_size=3)
    contexts = [[5, 9, 11, 40], [7, 8, 200, 31, 5, 6], [50, 60]]
    answers = [[3, 4], [90, 91, 92, 93, 94, 95], [17]]
    requests = [(("", ""), c, a) for c in contexts for a in answers]
    found = lm._loglikelihood_tokens(requests)
    for (_, context, answer), (log_likelihood, greedy) in zip(requests, found):
        ids = torch.tensor([context + answer])
        with torch.no_grad(), routing_context(prompt_lens=[len(context)]):
            log_p = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
        want = log_p.gather(1, torch.tensor(answer)[:, None])
        assert log_likelihood == pytest.approx(float(want.sum()), abs=1e-3)
        assert greedy == bool((log_p.argmax(-1) == torch.tensor(answer)).all())


def test_sweep_gives_the_curve_of_one_router(routers: Path) -> None:
    options = ("--samples", 24, "--length", 48, "--data", "zoo:heldout", "--calibration", "zoo:heldout")
    curve = said("sweep", routers, "--capacities", "0.25,0.75,1", *options)["curve"]
    assert [row["target"] for row in curve] == [0.25, 0.75, 1]
    assert [row["capacity"] for row in curve] == pytest.approx([0.25, 0.75, 1], abs=0.05)
    assert curve[2]["cost"] == pytest.approx(0, abs=1e-5)
    refused("shares in (0, 1]", "sweep", routers, "--capacities", "0.5,2")


def test_usage_is_a_row_for_each_data_set(routers: Path) -> None:
    found = said("usage", routers, "--data", "zoo:heldout", "--data", "zoo:calibration", *DATA, "--picture", "map.png")
    assert [row["data"] for row in found["usage"]] == ["zoo:heldout", "zoo:calibration"]
    for row in found["usage"]:
        assert row["capacity"] == pytest.approx((row["1"] + row["2"]) / 2)
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def test_usage_of_a_plain_model_shows_what_would_be_gated(base: Path) -> None:
    (row,) = said("usage", base, "--layers", "last:2", *DATA)["usage"]
    assert row == {"data": "zoo:heldout", "capacity": 1.0, "1": 1.0, "2": 1.0}


def test_freeze_writes_a_plan_that_drops_what_never_runs(routers: Path, base: Path) -> None:
    refused("no gated layer runs for less", "freeze", routers, *DATA, "--tau", 1e-6)
    found = said("freeze", routers, *DATA, "--below", "1", "-o", "plan.json")
    record = json.loads(Path("plan.json").read_text())
    assert record["format"] == "llm-drop plan 1"
    assert record["attention"] == found["attention"]
    model, _ = load(base)
    from model_hooks import fingerprint

    assert record["fingerprint"] == fingerprint(model)
    dropped = drop(load(base)[0], attention=record["attention"])
    closed = {i: torch.tensor([i not in record["attention"]]) for i in (1, 2)}
    x = torch.tensor([[5, 6, 7, 8]])
    attach(model, layers=(1, 2))
    with torch.no_grad(), routing_context(forced=closed):
        torch.testing.assert_close(model(input_ids=x).logits, dropped(input_ids=x).logits)


def test_a_plan_counts_in_the_undropped_model() -> None:
    made = {"num_layers": 8, "original": (0, 2, 4, 6), "name": "m", "fingerprint": "f"}
    assert plan({1: 0.0, 2: 0.5}, "attention", 0.1, **made)["attention"] == [2]
    assert plan({1: 0.0, 2: 0.5}, "mlp", 0.6, **made)["mlp"] == [2, 4]
    both = plan({1: 0.0}, "block", 0.1, **made)
    assert both["attention"] == both["mlp"] == [2]


def test_merge_inspect_and_generate(routers: Path, base: Path) -> None:
    found = said("inspect", routers)
    assert found["base"] == str(base)
    assert [row["layer"] for row in found["gates"]] == [1, 2]
    assert found["bytes"] <= 4 * 2 * 32 + 65536
    assert said("merge", routers, "-o", "merged")["model_type"] == "routed_llama"
    from_both = [
        said("generate", source, "--prompt", "import os", "--max-new-tokens", 5) for source in (routers, "merged")
    ]
    assert from_both[0] == from_both[1]
    assert from_both[0]["text"].startswith("import os")
    assert sorted(from_both[0]["ran"] + from_both[0]["skipped"]) == [1, 2]
    drafted = said("generate", routers, "--prompt", "import os", "--max-new-tokens", 5, "--lossless")
    open_all = said("generate", routers, "--prompt", "import os", "--max-new-tokens", 5, "--tau", 1e-6)
    assert drafted["text"] == open_all["text"]
    assert drafted["tokens_a_pass"] >= 1
    assert said("eval", "merged", *DATA)["capacity"] == said("eval", routers, *DATA)["capacity"]


def test_tune_and_its_common_name(base: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    options = ("--model", base, "--data", "zoo:calibration", "--samples", 8, "--heldout-samples", 4, "--length", 32,
               "--max-steps", 2, "--layers", "1,2")  # fmt: skip
    found = said("tune", *options, "-o", "out")
    assert said("train", *options, "-o", "again")["loss"] == found["loss"]
    assert said("inspect", "out")["steps"] == 2


def test_wrong_requests(routers: Path, base: Path, tmp_path: Path) -> None:
    Path("taken").mkdir()
    refused("no folder of routers", "eval", base)
    refused("no folder of routers", "eval", tmp_path / "none")
    refused("exists already", "merge", routers, "-o", "taken")
    refused("exists already", "freeze", routers, "-o", "taken")
    refused("belong to", "eval", routers, "--model", "zoo:llama")
    refused("prompt is empty", "generate", routers, "--prompt", "")
    refused("layers 0 to 3", "usage", base, "--layers", "9")
    refused("no router_config.json", "inspect", base)


def test_the_benchmark_of_a_small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run whole, on a model small enough to be quick; its speeds are noise, its bytes are not."""
    from paper_tables import probe

    monkeypatch.setattr(probe, "probe_model", lambda make=probe.probe_model: make(8, 128))
    found = said("bench", "--context", 32, "--new-tokens", 2, "--rounds", 3, "-o", "bench.json")
    assert [row["kv_bytes"] for row in found["speed"]] == [1, 1, 0.75, 0.5]
    assert found["optimizer_bytes"] == 2 * found["router_bytes"] == 2 * 4 * 128 * 4
    assert all(row["decode"] > 0 for row in found["speed"])


def test_help_is_there_for_every_verb() -> None:
    for verb in ("tune", "eval", "sweep", "usage", "freeze", "merge", "inspect", "generate", "bench", "reproduce"):
        result = call(verb, "--help")
        assert result.exit_code == 0
        assert verb in call("--help").output
