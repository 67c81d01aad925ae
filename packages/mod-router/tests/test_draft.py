"""A routed model drafts for its own base: the text is the base's, whatever the routers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mod_router import attach
from mod_router.attaching import set_tau
from mod_router.draft import generate_lossless, sharing_copy
from routermodels import build, ids, randomise

from model_hooks import RequestError


def greedy(**options: Any) -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": 10, **options}


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_the_text_is_the_bases(name: str) -> None:
    differs = 0
    for seed in range(3):
        model, x = randomise(attach(build(name), layers=(1, 2)), seed), ids(1, 8, seed=seed)
        out, passes = generate_lossless(model, x, num_assistant_tokens=3, **greedy())
        assert torch.equal(out, build(name).generate(input_ids=x, **greedy()))
        assert 2 <= passes <= 10
        differs += not torch.equal(out, model.generate(input_ids=x, **greedy()))
    assert differs  # from what the routed model writes alone


def test_a_draft_that_agrees_saves_passes_of_the_base() -> None:
    model, x = attach(build(), layers=(1, 2)), ids(1, 8)  # untrained: all that is drafted is right
    out, passes = generate_lossless(model, x, num_assistant_tokens=4, **greedy())
    assert torch.equal(out, model.generate(input_ids=x, **greedy()))
    assert passes <= 6  # for ten tokens
    set_tau(model, 0.9)  # all closed
    assert generate_lossless(model, x, num_assistant_tokens=4, **greedy())[1] > passes
    assert model.generation_config.num_assistant_tokens == build().generation_config.num_assistant_tokens


def test_no_weight_is_copied_and_several_prompts_are_refused() -> None:
    model = attach(build(), layers=(1,))
    assert {p.data_ptr() for p in sharing_copy(model).parameters()} == {p.data_ptr() for p in model.parameters()}
    with pytest.raises(RequestError, match="one by one"):
        generate_lossless(model, ids(2, 4))
    with pytest.raises(RequestError, match="layers of this model look back 5"):
        generate_lossless(attach(build("gemma3"), layers=(1,)), ids(1, 4), max_new_tokens=2)
    with pytest.raises(RequestError, match="no routers"):
        generate_lossless(build(), ids(1, 4))
