"""What is asked for, what is accepted, and what a wrong request is told; the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mod_router import RouterConfig, attach
from mod_router.attaching import routers, set_tau
from mod_router.config import last_layers, paper_recipe
from mod_router.router import Router, pooled, straight_through
from routermodels import SMALL, build, ids
from torch import Tensor

from model_hooks import RequestError, UnsupportedArchitectureError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"unit": "attn_sequence"}, "it is one of attention, mlp, block"),
    ({"level": "batch"}, "it is one of sequence, token"),
    ({"pool": "max"}, "it is one of prompt_mean, masked_mean, last, ema"),
    ({"target_capacity": 0.0}, r"lies in \(0, 1\]"),
    ({"target_capacity": 1.5}, r"lies in \(0, 1\]"),
    ({"tau": 0.0}, r"lies in \(0, 1\)"),
    ({"tau": 1.0}, r"lies in \(0, 1\)"),
    ({"tau": float("nan")}, "finite number"),
    ({"penalty": -0.1}, "numbers from 0 on"),
    ({"distill": 2.0}, r"lies in \[0, 1\]"),
    ({"level": "token", "cheap_train": True}, "leave it out"),
    ({"layers": (0, 4)}, "layers 0 to 3"),
    ({"layers": (-1,)}, "layers 0 to 3"),
    ({"layers": ()}, "one or more of 0 to 3"),
    ({"layers": (1, 1)}, "given twice"),
    ({"layers": "1-9"}, "layers 0 to 3"),
    ({"layers": "last:4"}, "takes last:1 to last:3"),
    ({"layers": "last:0"}, "takes last:1 to last:3"),
    ({"layers": "last:x"}, "whole number"),
    ({"layers": "some"}, "numbers and ranges"),
    ({"layers": "auto:2"}, "needs scores"),
    ({"capacity": 0.5}, "it has layers, scores, unit"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_settings_are_refused_and_change_nothing(changes: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(RequestError, match=message) as error:
        attach(model, **changes)
    assert isinstance(error.value, ValueError)
    assert "_mod_router" not in vars(model)
    assert not any("depth_router" in name for name, _ in model.named_modules())


def test_attaching_twice_and_models_that_are_not_supported() -> None:
    import transformers

    model = attach(build())
    with pytest.raises(RequestError, match="has routers already"):
        attach(model)
    with pytest.raises(UnsupportedArchitectureError, match="fc1 stands in the block"):
        attach(build("opt"), unit="mlp")
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with pytest.raises(UnsupportedArchitectureError, match="encoder-decoder"):
        attach(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    mamba = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedArchitectureError):
        attach(transformers.MambaForCausalLM(mamba))


def test_a_biased_norm_after_the_unit_is_refused() -> None:
    """Zero would not stay zero on its way to the residual stream."""
    model = build("olmo2")
    block = model.model.layers[1]
    block.post_attention_layernorm = torch.nn.LayerNorm(SMALL["hidden_size"])
    with pytest.raises(UnsupportedArchitectureError, match="adds a bias after self_attn"):
        attach(model, layers=(1,))
    attach(model, layers=(1,), unit="block")


def test_the_papers_layers_are_the_last_without_the_very_last() -> None:
    assert last_layers(32, 16) == tuple(range(15, 31))
    assert last_layers(28, 8) == tuple(range(19, 27))
    assert RouterConfig(layers="last").resolved(32) == tuple(range(15, 31))
    assert RouterConfig(layers="3, 5,8-10").resolved(12) == (3, 5, 8, 9, 10)
    with pytest.raises(RequestError, match="last:1 to last:31"):
        last_layers(32, 32)


@given(st.integers(2, 100), st.data())
def test_last_n_is_n_layers_and_leaves_the_ends(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth - 1))
    found = last_layers(depth, count)
    assert len(found) == count
    assert found[-1] == depth - 2
    assert found == tuple(range(found[0], depth - 1))


def test_auto_takes_what_llm_drop_found_least_important(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    scores = {"0": 0.99, "1": 0.2, "2": 0.9, "3": 0.8, "4": 0.95, "5": 0.99}
    file.write_text(json.dumps({"num_layers": 6, "attention": scores, "mlp": dict.fromkeys(scores, 0.5)}))
    assert RouterConfig(layers="auto:2", scores=str(file)).resolved(6) == (2, 4)
    with pytest.raises(RequestError, match="the model has 4"):
        attach(build(), layers="auto:2", scores=str(file))
    with pytest.raises(RequestError, match="1 to 4 layers can be chosen"):
        RouterConfig(layers="auto:5", scores=str(file)).resolved(6)
    file.write_text("{}")
    with pytest.raises(RequestError, match="not a scores file"):
        RouterConfig(layers="auto:2", scores=str(file)).resolved(6)
    with pytest.raises(RequestError, match="llm-drop score"):
        RouterConfig(layers="auto:2", scores=str(tmp_path / "none")).resolved(6)


def test_the_papers_recipe() -> None:
    config = paper_recipe(layers="last:2")
    assert (config.objective, config.penalty, config.tau, config.unit, config.level) == (
        "paper", 0.0, 0.5, "attention", "sequence",
    )  # fmt: skip
    assert config.cheap_train
    model = attach(build(), config)
    assert {layer: r.weight.abs().sum().item() for layer, r in routers(model).items()} == {1: 0.0, 2: 0.0}
    assert sum(r.weight.numel() for r in routers(model).values()) == 2 * SMALL["hidden_size"]


def test_a_tie_is_open_and_the_threshold_moves_everything() -> None:
    from mod_router import decide

    model, x = attach(build(), layers=(1, 2)), ids(4, 6)
    assert all(bool(gate.all()) for gate in decide(model, x).values())  # p = 0.5 >= 0.5
    set_tau(model, 0.5 + 1e-6)
    assert not any(bool(gate.any()) for gate in decide(model, x).values())
    assert float(straight_through(torch.tensor(0.5), 0.5)) == 1.0


@pytest.mark.parametrize("pool", ["prompt_mean", "masked_mean", "last", "ema"])
def test_pooling_is_the_formula(pool: str) -> None:
    h = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    h[1, 0] = float("nan")  # of padding
    for row in range(3):
        tokens = [h[row, t].double() for t in range(6) if mask[row, t]]
        if pool == "last":
            weights = [0.0] * (len(tokens) - 1) + [1.0]
        elif pool == "ema":
            weights = [0.9 ** (len(tokens) - 1 - t) for t in range(len(tokens))]
        else:
            weights = [1.0] * len(tokens)
        want = sum((w * t for w, t in zip(weights, tokens)), torch.zeros(5, dtype=torch.float64)) / sum(weights)
        torch.testing.assert_close(pooled(h, mask, pool)[row].double(), want, atol=1e-6, rtol=1e-5)


def test_routers_stay_float32_and_raw_streams_are_normalised() -> None:
    router = Router(8, rms=True)
    router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(router(x), router(x * 1000), atol=1e-5)
    assert router(x.bfloat16()).dtype == torch.float32
    model = attach(build().bfloat16(), layers=(1,))
    assert next(iter(routers(model).values())).weight.dtype == torch.float32
    assert attach(build("olmo2"), layers=(1,)).model.layers[1].self_attn.depth_router.rms
    assert not attach(build("gemma2"), layers=(1,)).model.layers[1].self_attn.depth_router.rms


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def test_an_empty_mask_does_not_divide_by_zero() -> None:
    assert _finite(pooled(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), "prompt_mean"))
