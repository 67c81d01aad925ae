"""The formula gives the paper's figures and agrees with torch's counter."""

from __future__ import annotations

import pytest
import torch
import transformers
from meo import convert
from meo.flops import SIZES, count, named, sizes_of
from mergedmodels import GPT2, GROUPED, SMALL, T5, merged

from model_hooks import RequestError
from paper_tables.metrics import flops


@pytest.mark.parametrize(("size", "how", "giga"), [
    ("base", {}, 28.50), ("base", {"method": "moe", "k": 4}, 71.99), ("base", {"method": "meo", "k": 4}, 28.73),
    ("base", {"method": "meo", "k": 4, "additions": True}, 28.90), ("base", {"method": "meo", "k": 1}, 28.56),
    ("large", {}, 87.19), ("large", {"method": "moe", "k": 32}, 1684.92),
    ("small", {}, 7.42), ("small", {"method": "moe", "k": 32}, 74.0),
])  # fmt: skip
def test_the_papers_figures(size: str, how: dict[str, object], giga: float) -> None:
    assert count(SIZES[size], **how)["total"] / 1e9 == pytest.approx(giga, abs=0.01)


@pytest.mark.parametrize(("model", "config", "values"), [
    ("BertForMaskedLM", "BertConfig", SMALL), ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    ("GPT2LMHeadModel", "GPT2Config", GPT2), ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 64}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL), ("PhiForCausalLM", "PhiConfig", SMALL),
    ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": 97, "dim": 32, "hidden_dim": 64, "n_layers": 2,
                                                   "n_heads": 4}),
])  # fmt: skip
def test_torchs_counter_agrees(model: str, config: str, values: dict[str, object]) -> None:
    built = getattr(transformers, model)(getattr(transformers, config)(**values)).eval()
    frequencies = {"Llama": 4, "GPTNeoX": 1, "Phi": 2}.get(model.removesuffix("ForCausalLM"), 0)
    rotary = 2 * 16 * frequencies  # positions times frequencies
    expected = count(sizes_of(built.config), batch=2, tokens=16)["total"]
    assert flops(built, torch.ones(2, 16, dtype=torch.long)) == expected + rotary


def test_torchs_counter_sees_the_merges() -> None:
    """With order merge and all experts selected; torch counts k additions where k - 1 are needed."""
    config = transformers.BertConfig(**SMALL)
    model = convert(transformers.BertForMaskedLM(config), experts=4, k=4, order="merge", gate="topk").eval()
    for name, weight in model.named_parameters():  # equal gates would share a merge
        if name.endswith("w_gate"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    small = 2 * 2 * (2 * 2 * (32 + 64) * 4)  # layers, (gates and biases): [2 rows, width] x [width, 4] and back
    surplus = 2 * 2 * 2 * 32 * 64  # rows, layers, linears, weights
    meo = count(sizes_of(config), method="meo", k=4, batch=2, tokens=16, additions=True)["total"]
    assert flops(model, torch.arange(2 * 16).view(2, 16)) == meo + small + surplus
    merges = 2 * 2 * (2 * 4 * 32 * 64)  # layers, linears, experts' weights: what a second row with equal gates saves
    assert flops(model, torch.ones(2, 16, dtype=torch.long)) == meo + small + surplus - merges


def test_a_converted_models_sizes_are_its_bases() -> None:
    assert sizes_of(merged("llama", level="chunk").config) == sizes_of(transformers.LlamaConfig(**GROUPED))


def test_what_the_formula_does_not_count_is_refused() -> None:
    with pytest.raises(RequestError, match="t5 is an encoder-decoder"):
        sizes_of(transformers.T5Config(**T5))
    shared = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    with pytest.raises(RequestError, match="albert: the formula takes 3 layers"):
        sizes_of(transformers.AlbertConfig(**shared))


def test_unknown_names() -> None:
    with pytest.raises(RequestError, match="did you mean 'base'"):
        named("bas")
    with pytest.raises(RequestError, match="did you mean 'moe'"):
        count(SIZES["base"], method="mo")
