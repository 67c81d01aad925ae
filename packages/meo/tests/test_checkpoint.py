"""Saved and loaded models are the same bit for bit; what does not fit is refused; baking and export are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from meo import bake, convert, gating, load, save
from meo.converting import banks
from meo.deploy import export
from mergedmodels import FAMILIES, dense, ids, inputs, merged
from processes import run
from safetensors.torch import load_file, save_file

from model_hooks import RequestError


def same(a: Any, b: Any) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("name", ["bert", "deberta", "gpt2", "t5-gated", "bart", "opt", "llama", "classifier"])
def test_a_checkpoint_is_the_model(name: str, tmp_path: Path) -> None:
    model = merged(name, **({"init": "lora", "level": "chunk"} if name == "llama" else {}))
    save(model, tmp_path / "one")
    again, _ = load(tmp_path / "one", tokenizer=False)
    same(model, again)
    assert type(again) is type(model)
    given = inputs(name, 2, 8)
    assert torch.equal(model(**given).logits, again(**given).logits)
    use = (tmp_path / "one" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(use.replace('"this folder"', f'"{tmp_path / "one"}", tokenizer=False'), names)
    same(model, names["model"])
    save(again, tmp_path / "two")
    same(model, load(tmp_path / "two", tokenizer=False)[0])


@pytest.mark.parametrize(("name", "auto"), [("bert", "MaskedLM"), ("gpt2", "CausalLM"), ("bart", "Seq2SeqLM"),
                                            ("classifier", "SequenceClassification")])  # fmt: skip
def test_the_auto_classes_load_it(name: str, auto: str, tmp_path: Path) -> None:
    model = merged(name)
    save(model, tmp_path / "m", verify=False)
    kind = getattr(transformers, f"AutoModelFor{auto}")
    same(model, kind.from_pretrained(tmp_path / "m"))
    bodies = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert len(banks(bodies)) == len(banks(model))
    if name == "bert":  # a body that was saved alone, under a head
        save(bodies, tmp_path / "body")
        headed, _ = load(tmp_path / "body", head="mlm", tokenizer=False)
        assert torch.equal(headed.bert(ids(1, 5))[0], model.bert(ids(1, 5))[0])


@pytest.mark.slow
def test_the_stock_class_of_its_type_is_refused_without_meo(tmp_path: Path) -> None:
    save(merged("gpt2"), tmp_path / "m", verify=False)
    code = (
        "import sys, transformers\ntry:\n    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n    print('refused', 'meo_gpt2' in str(error))"
    )
    assert run("-c", code, tmp_path / "m", log=tmp_path / "log").strip().splitlines()[-1] == "refused True"


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    save(merged("gpt2"), tmp_path / "m", verify=False)
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    key = "transformer.h.0.mlp.c_fc.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["transformer.h.0.mlp.c_fc.experts"] = torch.zeros(2)
    else:
        state[key] = state[key][:2].clone()
    save_file(state, file, {"format": "pt"})
    for read in (lambda: load(tmp_path / "m", tokenizer=False),
                 lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")):  # fmt: skip
        with pytest.raises((RequestError, RuntimeError), match=r"c_fc|size mismatch|ignore_mismatched"):
            read()


def test_another_version_is_refused(tmp_path: Path) -> None:
    save(merged("gpt2"), tmp_path / "m", verify=False)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["meo"]["config"]["version"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(RequestError, match="version 2, this meo reads 1"):
        load(tmp_path / "m", tokenizer=False)
    with pytest.raises(RequestError, match="convert it first"):
        save(dense("gpt2"), tmp_path / "n")
    with pytest.raises(RequestError, match="exists already"):
        save(merged("gpt2"), tmp_path / "m")
    with pytest.raises(RequestError, match="unknown head 'cls'"):
        load(tmp_path / "m", head="cls")


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    from transformers.distributed import DistributedConfig

    save(merged("llama", level="chunk"), tmp_path / "m", verify=False)
    for how in ({"tp_plan": "auto"}, {"distributed_config": DistributedConfig(tp_plan="auto")}):
        with pytest.raises(RequestError, match="cannot be cut by tensor parallelism"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **how)


def test_a_new_head_is_new_and_the_body_is_read(tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path / "m")
    model, _ = load(tmp_path / "m", head="classification", tokenizer=False, num_labels=3)
    assert model.config.num_labels == 3
    first, kept = (m.bert.encoder.layer[0].output.dense.weight for m in (model, dense("bert")))
    assert torch.equal(first, kept)
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["bert.encoder.layer.0.output.dense.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"missing, first bert.encoder.layer.0.output.dense.weight"):
        load(tmp_path / "m", head="classification", tokenizer=False)


def test_a_body_without_a_name_of_its_own_is_checked_too(tmp_path: Path) -> None:
    dense("t5").save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m", head="seq2seq", tokenizer=False)[0].config.is_encoder_decoder
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["encoder.block.0.layer.1.DenseReluDense.wi.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"missing, first encoder.block.0.layer.1.DenseReluDense.wi.weight"):
        load(tmp_path / "m", head="seq2seq", tokenizer=False)


@pytest.mark.parametrize(("name", "scope"), [("gpt2", "linear"), ("llama", "ffn"), ("classifier", "model"),
                                             ("t5", "linear")])  # fmt: skip
def test_a_baked_task_is_a_dense_model_with_the_same_logits(name: str, scope: str, tmp_path: Path) -> None:
    model = merged(name, level="task", gate_scope=scope, tasks={"a": "", "b": ""})
    given = inputs(name, 2, 8)
    with gating(task="b"):
        want = model(**given).logits
    bake(model, "b")
    assert type(model).__name__ == FAMILIES[name][0]
    model.save_pretrained(tmp_path / "m")
    again = type(dense(name)).from_pretrained(tmp_path / "m")
    assert "meo" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert again.state_dict().keys() == dense(name).state_dict().keys()
    torch.testing.assert_close(again(**given).logits, want, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_baked_is_refused() -> None:
    with pytest.raises(RequestError, match="gated by sequence, not by task"):
        bake(merged("bert"), "a")
    tasks = {"a": "", "b": ""}
    with pytest.raises(RequestError, match="has a token block"):
        bake(merged("bert", level="task", token_block=True, reduce=16, tasks=tasks), "a")
    model = merged("bert", level="task", tasks=tasks)
    with pytest.raises(RequestError, match="unknown task 'c'; it is one of a, b"):
        bake(model, "c")
    assert len(banks(model)) == 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_exported_experts_are_adapters(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = merged(name, level="chunk", experts=3)
    with torch.no_grad():  # without differences of biases an adapter of full rank is exact
        for bank in banks(model).values():
            if bank.bias is not None:
                bank.bias.copy_(bank.bias[:1].expand_as(bank.bias))
    experts = {n: bank.weight.detach().clone() for n, bank in banks(model).items()}
    rows = export(model, tmp_path / "out", rank=64)
    assert max(row["error"] for row in rows) < 1e-5
    assert max(row["bias"] for row in rows) == pytest.approx(0, abs=1e-6)
    plain = type(dense(name)).from_pretrained(tmp_path / "out" / "dense")
    for i in range(3):
        expected = dense(name)
        expected.load_state_dict(plain.state_dict())
        with torch.no_grad():
            for bank, weight in experts.items():
                kept = expected.get_submodule(bank).weight
                kept.copy_(weight[i].T if name == "gpt2" else weight[i])
        base = type(dense(name)).from_pretrained(tmp_path / "out" / "dense")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / f"expert-{i}")
        tokens = ids(2, 7)
        torch.testing.assert_close(adapted(tokens).logits, expected(tokens).logits, atol=1e-4, rtol=1e-4)
    assert 0 < max(row["error"] for row in export(merged(name, level="chunk"), tmp_path / "low", rank=4)) < 1


def test_low_rank_experts_are_small() -> None:
    """At n = 8 and rank d / 48 a bank stores at most 1.3 times its dense linear (d = 384, 4d)."""
    config = transformers.BertConfig(vocab_size=50, hidden_size=384, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=1536)  # fmt: skip
    model = transformers.BertModel(config)
    before = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith(("intermediate.dense",)))
    convert(model, experts=8, init="lora", gate="topk")
    bank = banks(model)["encoder.layer.0.intermediate.dense"]
    assert sum(p.numel() for n, p in bank.named_parameters() if n != "bias") <= 1.3 * before
