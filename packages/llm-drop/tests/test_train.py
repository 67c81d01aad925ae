"""Healing: what is trained, that it helps, that a stopped run goes on, that a wrong request changes nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llm_drop import healing
from llm_drop.plan import Plan
from llm_drop.prepare import lora_targets
from llm_drop.train import TrainConfig, main, train
from torch import Tensor, nn

from model_hooks import RequestError, anatomy, load
from model_hooks.text import load_sequences
from model_hooks.zoo import tokenizer as zoo_tokenizer
from paper_tables.errors import TableError
from paper_tables.launch import deepspeed_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft", reason="needs the extra [train]")

CONFIGS = Path(__file__).parents[1] / "configs"
LENGTH, SEQUENCES = 32, 24
QUICK: dict[str, Any] = {
    "samples": SEQUENCES, "length": LENGTH, "heldout_samples": 4, "batch_size": 4, "accumulation": 2, "epochs": 2.0,
    "learning_rate": 1e-2, "log_every": 1,
}  # fmt: skip
IDS = torch.arange(12).view(1, 12) * 5 + 16


def write_tiny(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of four layers with the zoo's tokenizer."""
    tokenizer = zoo_tokenizer.load()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
             "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text("".join(f"def f{n % 7}(x):\n    return x + {n % 10}\n\n" for n in range(400)))
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return Plan(4, attention=(1, 2)).save(tmp_path / "plan.json")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models as they were when training ended, before anything was written."""
    models: list[Any] = []
    save = healing.Healer.save_model

    def keep(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        save(self, output_dir, _internal_call)
        if not _internal_call:
            models.append(self.model)

    monkeypatch.setattr(healing.Healer, "save_model", keep)
    return models


def config(tiny: Path, text: Path, output: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": str(tiny), "output": output, "data": str(text), **QUICK, **changes})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder, tokenizer=False)[0].state_dict())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_lora_heals_and_leaves_an_ordinary_dropped_checkpoint(
    tiny: Path, text: Path, plan: Path, tmp_path: Path, trained: list[Any]
) -> None:
    output = tmp_path / "healed"
    result = train(config(tiny, text, output, plan=plan, rank=4))
    assert result["loss_after"] < result["loss_before"] - 0.3
    assert result["steps"] == 6
    assert result["tokens"] == 6 * 8 * LENGTH

    model, original = trained[0], load(tiny, tokenizer=False)[0].state_dict()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert {n.split(".lora_")[0].split(".layers.")[1] for n in names} == {
        f"{i}.{layer}" for i in range(4)
        for layer in ([f"self_attn.{x}_proj" for x in "qkvo"] if i in (0, 3) else [])
        + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    }  # fmt: skip
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(p, original[n]) for n, p in frozen.items() if "lora_" not in n)

    again, tokenizer = load(output)
    assert tokenizer is not None
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    assert anatomy(again).dropped_attention == (1, 2)
    cache = again(input_ids=IDS, use_cache=True).past_key_values
    assert [layer.keys is not None for layer in cache.layers] == [True, False, False, True]
    card = (output / "README.md").read_text()
    assert f"{result['loss_after']:.6g}" in card
    assert "attention of blocks [1, 2] dropped" in card
    assert not (tmp_path / "healed.training").exists()
    assert log_of(output)[0]["eval_loss"] == result["loss_before"]


def test_full_training_keeps_the_stored_dtype(text: Path, tmp_path: Path, trained: list[Any]) -> None:
    start = write_tiny(tmp_path / "bf16", dtype=torch.bfloat16, tie_word_embeddings=True)
    result = train(config(start, text, tmp_path / "healed", method="full", gradient_checkpointing=True, bf16=True))
    assert result["trainable"] == result["parameters"]
    assert result["loss_after"] < result["loss_before"] - 0.5
    again, _ = load(tmp_path / "healed")
    assert again.dtype == torch.bfloat16
    expected = trained[0].to(torch.bfloat16).state_dict()
    assert largest_difference(dict(again.state_dict()), dict(expected)) == 0
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_kept_adapter_is_for_the_model_as_given(tiny: Path, text: Path, tmp_path: Path, trained: list[Any]) -> None:
    from peft import PeftModel

    train(config(tiny, text, tmp_path / "adapter", keep_adapter=True, max_steps=2))
    model = PeftModel.from_pretrained(load(tiny, tokenizer=False)[0], tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(trained[0]), atol=1e-6, rtol=0)
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_is_the_hand_computed_one(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "CHUNK", 3)
    torch.manual_seed(1)
    student, parent = torch.randn(2, 8, 11, requires_grad=True), torch.randn(2, 8, 11)
    ids = torch.randint(11, (2, 8))
    loss = healing.healing_loss(student, ids, parent, weight)
    q, p = student.double().softmax(-1), parent.double().softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(7):
            kl = (p[b, t] * (p[b, t].log() - q[b, t].log())).sum()
            expected = expected - (1 - weight) * q[b, t, ids[b, t + 1]].log() + weight * kl
    torch.testing.assert_close(loss.double(), expected / 14)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected / 14, student)[0], atol=1e-6, rtol=1e-4)


def test_distillation_looks_at_the_undropped_parent(tiny: Path, text: Path, plan: Path, tmp_path: Path) -> None:
    from llm_drop.repair import apply

    steps = {"samples": 4, "accumulation": 1, "max_steps": 1}
    train(config(tiny, text, tmp_path / "healed", plan=plan, distill=0.25, **steps))
    parent, tokenizer = load(tiny)
    dropped = apply(load(tiny, tokenizer=False)[0], Plan.load(plan))
    ids = load_sequences(tokenizer, text, samples=8, length=LENGTH)[:4]
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (parent, dropped))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    next_token = -q.gather(-1, ids[:, 1:, None]).mean()
    assert kl > 1e-4
    assert log_of(tmp_path / "healed")[1]["loss"] == pytest.approx(float(0.75 * next_token + 0.25 * kl), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    method: str, tiny: Path, text: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"plan": plan, "method": method, "save_every": 2}
    straight = train(config(tiny, text, tmp_path / "straight", **settings))
    step, calls = healing.Healer.training_step, iter(range(100))

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 10:  # in the sixth step, after checkpoint-4
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(healing.Healer, "training_step", stop)
    stopped = config(tiny, text, tmp_path / "stopped", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert not stopped.output.exists()
    monkeypatch.setattr(healing.Healer, "training_step", step)
    with pytest.raises(RequestError, match=r"unfinished run with learning_rate 0.01, now 0.1"):
        train(config(tiny, text, tmp_path / "stopped", **settings, **{"learning_rate": 0.1}))
    (stopped.work / "checkpoint-4" / "trainer_state.json").write_text("{")  # killed while writing it
    result = train(stopped)
    assert largest_difference(weights(tmp_path / "straight"), weights(tmp_path / "stopped")) == 0
    assert (result["loss_before"], result["loss_after"]) == (straight["loss_before"], straight["loss_after"])
    assert [e["step"] for e in log_of(stopped.output) if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_experts_are_adapted_and_routers_are_not(text: Path, tmp_path: Path, trained: list[Any]) -> None:
    start = write_tiny(tmp_path / "moe", "Mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    modules, banks = lora_targets(anatomy(load(start, tokenizer=False)[0]))
    assert len(modules) == 2 * 4
    assert sorted(banks) == [f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("down_proj", "gate_up_proj")]
    result = train(config(start, text, tmp_path / "healed", max_steps=2))
    assert result["loss_after"] < result["loss_before"]
    torch.testing.assert_close(logits(load(tmp_path / "healed")[0]), logits(trained[0]), atol=1e-4, rtol=0)


def test_gpt2_is_adapted_too() -> None:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert lora_targets(anatomy(model))[0] == [f"transformer.h.{i}.{n}" for i in (0, 1) for n in names]


def test_so_are_both_matrices_of_opts_feed_forward() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)).eval()
    names = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
    assert lora_targets(anatomy(model))[0] == [f"model.decoder.layers.0.{n}" for n in names]


class Matrix(nn.Module):
    """A linear layer that is no nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_lora_without_linear_layers_is_refused(tiny: Path) -> None:
    model, _ = load(tiny, tokenizer=False)
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Matrix(child))
    with pytest.raises(RequestError, match="no linear layers in its attentions and feed-forwards"):
        lora_targets(anatomy(model))


WRONG: dict[str, tuple[list[str], str]] = {
    "method": (["--method", "lorra"], "did you mean 'lora'?"),
    "rank": (["--rank", "0"], "rank is 0; at least 1"),
    "learning rate": (["--learning-rate", "nan"], "learning_rate is nan"),
    "share": (["--distill", "1.5", "--parent", "zoo:llama"], "distill is 1.5"),
    "no parent": (["--distill", "0.5"], "--parent"),
    "other parent": (["--distill", "0.5", "--parent", "other-vocabulary"], "cannot be compared"),
    "too long": (["--length", "65"], "context of 64 tokens"),
    "too little text": (["--heldout-samples", "4000"], "are to be held out"),
    "no model": (["--model", "./nowhere"], "no folder ./nowhere"),
    "plan of another model": (["--plan", "plan-for-5.json"], "for 5 layers, the model has 4"),
    "plan of other weights": (["--plan", "plan-of-others.json"], "made from others"),
    "adapter of a lost base": (["--keep-adapter", "--plan", "plan.json"], "dropped already"),
    "full adapter": (["--keep-adapter", "--method", "full"], "needs --method lora"),
    "no launcher": (["--deepspeed", "zero2"], "needs a launcher"),
    "existing output": (["--output", "taken"], "--overwrite"),
    "output in the input": (["--output", "model/healed"], "overlaps the input"),
    "existing work": (["--output", "busy"], "is in the way"),
    "unknown key": (["--config", "typo.yaml"], "did you mean 'learning_rate'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    case: str, text: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(Path("model"))
    if case == "other parent":
        write_tiny(Path("other-vocabulary"), vocab_size=99)
    Plan(5, attention=(1,)).save("plan-for-5.json")
    Plan(4, attention=(1,), model="others", fingerprint="00").save("plan-of-others.json")
    for folder in ("taken", "busy.training"):
        Path(folder).mkdir()
    Path("busy.training/notes.txt").write_text("mine")
    Path("typo.yaml").write_text("learning_rat: 1\n")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "model", "--output", "healed", "--data", str(text), "--length", "32", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2, said
    assert message in said.err
    assert len([line for line in said.err.splitlines() if message in line]) == 1
    assert "Traceback" not in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_output_and_model_are_needed(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "zoo:llama"])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err


def test_a_loss_that_is_no_number_fails_and_writes_nothing(tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tiny), "--output", str(tmp_path / "healed"), "--data", str(text), "--length", "32",
              "--samples", "8", "--heldout-samples", "4", "--accumulation", "1", "--method", "full",
              "--learning-rate", "1e30"])  # fmt: skip
    assert stopped.value.code == 1
    assert "lower --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize("name", ["heal-lora", "heal-full"])
def test_shipped_configurations_run(
    name: str, tiny: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(values) <= {f.name for f in fields(TrainConfig)} - {"model", "output"}
    with pytest.raises(SystemExit) as stopped:
        main(["--local_rank=0", "--config", str(CONFIGS / f"{name}.yaml"), "--model", str(tiny), "-o",
              str(tmp_path / "healed"), "--data", str(text), "--heldout", str(text), "--length", "32", "--samples", "8",
              "--heldout-samples", "4", "--max-steps", "1", "--deepspeed", "", "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert json.loads(said.out)["steps"] == 1


def test_shipped_deepspeed_files_are_found() -> None:
    for stage, name in ((2, "zero2"), (3, "zero3"), (3, "zero3-offload")):
        file = deepspeed_file(healing.__file__, name)
        assert file is not None
        assert json.loads(Path(file).read_text())["zero_optimization"]["stage"] == stage
    with pytest.raises(TableError, match="zero2, zero3, zero3-offload"):
        deepspeed_file(healing.__file__, "zero4")
