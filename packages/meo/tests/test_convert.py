"""Conversion keeps the function, finds the right linears, refuses what it cannot do, and leaves models as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meo import MeoConfig, convert, gating
from meo.bank import MergedLinear
from meo.converting import banks, task_codes
from mergedmodels import FAMILIES, HIDDEN, LAYERS, dense, inputs, merged

from model_hooks import RequestError, drop


@torch.no_grad()
def logits(model: Any, name: str, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(**inputs(name, 2, 9), **more).logits
    return found


@pytest.mark.parametrize("init", ["copy", "noise", "split", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_computes_what_the_dense_one_does(name: str, init: str) -> None:
    model = dense(name)
    want = logits(model, name)
    convert(model, init=init)
    found = banks(model)
    stacks = 2 if model.config.is_encoder_decoder else 1
    each = 3 if name in ("llama", "qwen2", "qwen3", "mistral", "t5-gated") else 2
    assert len(found) == LAYERS * stacks * each
    assert type(model).__name__ == f"Meo{FAMILIES[name][0]}"
    assert not any("attention" in bank or "attn" in bank.lower() for bank in found)
    assert float((logits(model, name) - want).abs().max()) <= 1e-6 * float(want.abs().max()) + 1e-6
    if init in ("noise", "split", "lora"):
        bank = next(iter(found.values()))
        table = bank.up if init == "lora" else bank.weight
        assert not torch.equal(table[0], table[1])


def test_biases_are_kept_and_the_mean_of_the_experts_is_the_dense_matrix() -> None:
    model = dense("gpt2")
    linear = model.transformer.h[0].mlp.c_fc
    bank = banks(convert(model, experts=8, k=3))["transformer.h.0.mlp.c_fc"]
    torch.testing.assert_close(bank.weight.mean(0), linear.weight.T, atol=1e-6, rtol=0)
    assert torch.equal(bank.bias, linear.bias.expand(8, -1))
    relative = (bank.weight - linear.weight.T).std() / linear.weight.std()
    assert 0.005 < float(relative) < 0.02


def test_gates_may_be_shared() -> None:
    decide = {"linear": 6, "ffn": 2, "layer": 2, "model": 1}
    for scope, count in decide.items():
        model = merged("llama", gate_scope=scope, level="chunk")
        assert sum(hasattr(bank, "w_gate") for bank in banks(model).values()) == count
        with gating(record=True) as seen:
            logits(model, "llama")
        assert len(seen.gates) == count


@pytest.mark.parametrize("changes", [{"level": "token", "reduce": 16}, {"init": "lora"}, {"gate": "hash"}])
def test_the_seed_decides_what_is_drawn_and_nothing_else_is(changes: dict[str, Any]) -> None:
    made = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        made.append(convert(dense("bert"), seed=3, **changes).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    other = convert(dense("bert"), seed=4, **changes).state_dict()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in made[0].items())


def test_targets_and_excludes_are_patterns_of_names() -> None:
    model = convert(dense("llama"), targets=(r"layers\.1\.mlp\.(up|down)_proj$",), exclude=("down",))
    assert list(banks(model)) == ["model.layers.1.mlp.up_proj"]
    assert list(banks(convert(dense("bert"), targets=("attention.output.dense",)))) == [
        f"bert.encoder.layer.{i}.attention.output.dense" for i in range(LAYERS)
    ]


def test_token_blocks_are_on_every_bank_at_level_token() -> None:
    model = convert(dense("bert"), level="token", reduce=16)
    assert all(bank.token is not None for bank in banks(model).values())
    want = logits(dense("bert"), "bert")
    torch.testing.assert_close(logits(model, "bert"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("bert", {"k": 9}, "k is 9; between 1 and the 8"), ("bert", {"k": 0}, "k is 0"),
    ("bert", {"experts": 1, "k": 1}, "at least 2"), ("bert", {"level": "sentence"}, "did you mean 'sequence'"),
    ("bert", {"gate": "topkk"}, "did you mean 'topk'"), ("bert", {"targets": ("nothing",)}, "matches no linear"),
    ("bert", {"targets": ("LayerNorm",)}, "is a LayerNorm; only Linear"), ("bert", {"exclude": (".",)}, "no linear is"),
    ("bert", {"level": "task"}, "needs tasks"), ("bert", {"level": "token", "reduce": 5}, "give a reduce"),
    ("bert", {"targets": ("(",)}, "no regular expression"),
    ("gpt2", {"level": "sequence"}, "sequence-level gating looks at future tokens; use prefix, chunk or task"),
    ("llama", {"level": "token"}, "token-level gating looks at future tokens"),
    ("bert", {"method": "moe", "init": "lora"}, "no low-rank experts"),
    ("bert", {"bias_rate": -1.0}, "bias_rate is -1"),
    ("bert", {"bias_rate": 0.1, "gate": "softmax"}, "selects the same experts always"),
])  # fmt: skip
def test_wrong_requests_change_nothing(name: str, changes: dict[str, Any], message: str) -> None:
    model = dense(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        convert(model, **changes)
    assert type(model).__name__ == FAMILIES[name][0]
    assert not any(isinstance(m, MergedLinear) for m in model.modules())
    assert not hasattr(model.config, "meo")
    assert state.keys() == model.state_dict().keys()


def test_other_refusals() -> None:
    with pytest.raises(RequestError, match="converted already"):
        convert(merged("bert"))
    with pytest.raises(RequestError, match="no banks"):
        banks(dense("bert"))
    quantized = dense("bert")
    quantized.hf_quantizer = object()
    with pytest.raises(RequestError, match="quantized"):
        convert(quantized)
    dropped = dense("llama")
    drop(dropped, attention=[1])
    with pytest.raises(RequestError, match="lean_llama is no model type of transformers"):
        convert(dropped)
    import transformers

    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=50, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
                                   num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )  # fmt: skip
    with pytest.raises(RequestError, match="mixture of experts already"):
        convert(mixtral)
    with pytest.raises(RequestError, match=r"unknown key 'expert'.*did you mean 'experts'"):
        MeoConfig.from_dict({**MeoConfig().to_dict(), "expert": 3})
    with pytest.raises(RequestError, match="version 9"):
        MeoConfig.from_dict({**MeoConfig().to_dict(), "version": 9})


def test_descriptions_are_read_with_the_models_own_embeddings() -> None:
    model = dense("bert")

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    config = MeoConfig(level="task", tasks={"a": "one three fifth", "b": ""})
    codes = task_codes(model, config, tokenizer)
    mean = model.get_input_embeddings().weight[[3, 5, 5]].mean(0)
    torch.testing.assert_close(codes[0], mean / mean.square().mean().sqrt())
    torch.testing.assert_close(codes.square().mean(1), torch.ones(2))
    with pytest.raises(RequestError, match="give the tokenizer"):
        convert(model, config)


def test_the_whole_text_may_decide_where_the_last_token_alone_is_read() -> None:
    import transformers
    from mergedmodels import GPT2

    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2)).eval()
    assert convert(model, level="sequence").config.meo["stacks"][0]["level"] == "sequence"
    leaky = convert(dense("gpt2"), level="sequence", allow_future_leak=True)
    assert leaky.config.meo["stacks"][0] == {"name": "transformer", "level": "sequence", "causal": True}
