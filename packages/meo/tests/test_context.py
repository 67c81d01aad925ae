"""Padding, other rows, packing, later tokens and the cache never change what a token's output is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from meo import convert, gating
from meo.converting import banks
from mergedmodels import DECODERS, dense, ids, inputs, merged, randomise

from model_hooks import RequestError

CARRIED = ("prefix", "chunk", "cumulative")


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, **more).logits
    return found


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "level"), [("bert", "sequence"), ("bert", "token"), ("llama", "prefix"),
                                             ("llama", "chunk"), ("gpt2", "cumulative"), ("opt", "chunk")])  # fmt: skip
def test_padding_and_other_rows_change_nothing(name: str, level: str) -> None:
    model = merged(name, level=level, reduce=16)
    rows = [ids(1, n, seed=n) for n in (5, 9, 7)]
    for side in ("right", "left"):
        batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        for row, (tokens, out) in enumerate(zip(rows, batch)):
            place = slice(None, tokens.shape[1]) if side == "right" else slice(9 - tokens.shape[1], None)
            out[place], mask[row, place] = tokens[0], 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        places = {} if name == "opt" else {"position_ids": positions}
        found = logits(model, batch, attention_mask=mask, **places)
        for row, tokens in enumerate(rows):
            near(found[row][mask[row].bool()], logits(model, tokens)[0])
        turned = [2, 0, 1]
        places = {k: v[turned] for k, v in places.items()}
        near(logits(model, batch[turned], attention_mask=mask[turned], **places), found[turned])


@pytest.mark.parametrize("level", ["sequence", "prefix", "chunk", "cumulative"])
def test_packed_documents_are_gated_as_if_alone(level: str) -> None:
    model = merged("llama", level=level, allow_future_leak=True)
    texts = [ids(1, n, seed=n) for n in (6, 3, 9)]
    packed = torch.cat(texts, 1)
    positions = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    alone = torch.cat([logits(model, t, use_cache=False) for t in texts], 1)
    near(logits(model, packed, position_ids=positions, use_cache=False), alone)
    documents = torch.tensor([[0] * 6 + [1] * 3 + [2] * 9])
    with gating(documents=documents):
        near(logits(model, packed, position_ids=positions, use_cache=False), alone)


@pytest.mark.parametrize("level", CARRIED)
@pytest.mark.parametrize("name", DECODERS)
def test_no_output_depends_on_a_later_token(name: str, level: str) -> None:
    model = merged(name, level=level)
    tokens = ids(1, 11)
    want = logits(model, tokens)
    for t in (1, 4, 7, 10):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1 - 3) % 90 + 3
        got = logits(model, changed)
        near(got[:, :t], want[:, :t])
        assert not torch.allclose(got[:, t], want[:, t], atol=1e-3)


def test_with_a_leak_the_first_output_sees_the_last_token() -> None:
    model = merged("gpt2", level="sequence", allow_future_leak=True)
    tokens = ids(1, 9)
    changed = tokens.clone()
    changed[0, -1] = 3 + (changed[0, -1] - 2) % 90
    assert float((logits(model, tokens) - logits(model, changed))[:, 0].abs().max()) > 1e-3


@pytest.mark.parametrize("gate", ["encoder", *CARRIED])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoders_of_encoder_decoders(name: str, gate: str) -> None:
    model = merged(name, decoder_gate=gate)
    given = inputs(name, 2, 8)
    want = model(**given).logits
    changed = {**given, "decoder_input_ids": given["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, -1] = 5
    near(model(**changed).logits[:, :-1], want[:, :-1])
    padded = {
        "input_ids": torch.cat([given["input_ids"], torch.zeros(2, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 3] * 2), "decoder_input_ids": given["decoder_input_ids"],
    }  # fmt: skip
    near(model(**padded).logits, want)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart"])
def test_generation_with_a_cache_is_generation_without(name: str, how: dict[str, Any]) -> None:
    for level in CARRIED:
        encoder_decoder = name in ("t5", "bart")
        model = merged(name, **({"decoder_gate": level} if encoder_decoder else {"level": level}))
        tokens = ids(2, 6)
        mask = torch.ones_like(tokens)
        mask[0, :2] = 0
        tokens = tokens * mask
        settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0,
                    "eos_token_id": None, "output_scores": True, "return_dict_in_generate": True, **how}  # fmt: skip
        cached, again = (model.generate(tokens, use_cache=use, **settings) for use in (True, False))
        assert cached.sequences.tolist() == again.sequences.tolist(), level
        near(cached.scores[-1], again.scores[-1])


@pytest.mark.parametrize("level", CARRIED)
def test_step_by_step_is_all_at_once(level: str) -> None:
    """Steps of several tokens, left padding, and a chunk that a step ends in."""
    model = merged("llama", level=level)
    tokens, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with gating(prompt_lens=[2, 4]):
        want = logits(model, tokens, attention_mask=mask, position_ids=positions)
        cache, start, parts = None, 0, []
        for size in (6, 1, 3, 4):
            end = start + size
            out = model(
                input_ids=tokens[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, start = out.past_key_values, end
            parts.append(out.logits)
    near(torch.cat(parts, 1)[mask.bool()], want[mask.bool()])


def test_the_prompt_decides_at_level_prefix() -> None:
    model = merged("llama", level="prefix")
    tokens = ids(1, 8)
    labels = tokens.clone()
    labels[:, :5] = -100
    told = [logits(model, tokens, labels=labels)]
    with gating(prompt_lens=[5]):
        told.append(logits(model, tokens))
    near(*told)
    assert not torch.allclose(told[0], logits(model, tokens), atol=1e-3)  # without, the first token decides
    out = model.generate(tokens[:, :5], max_new_tokens=1, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    near(out.logits[0][0], told[0][0, 4])


def test_assisted_generation_at_level_prefix() -> None:
    model, tokens = merged("llama", level="prefix"), ids(1, 5)
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assisted = model.generate(tokens, assistant_model=dense("llama"), **how)
    assert assisted.tolist() == model.generate(tokens, **how).tolist()


def test_caches_that_cannot_serve_are_refused() -> None:
    model = merged("llama", level="chunk")
    cache = dense("llama")(input_ids=ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(RequestError, match="without the gates' sums"):
        model(input_ids=ids(1, 1), past_key_values=cache)
    with pytest.raises(RequestError, match="assisted generation"):
        model(input_ids=ids(1, 4), use_cache=True).past_key_values.crop(-1)
    with pytest.raises(RequestError, match="must be \\[batch, tokens\\]"):
        model(input_ids=ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(RequestError, match="prefill_chunk_size"):
        model.generate(ids(1, 4), prefill_chunk_size=2)
    with pytest.raises(RuntimeError, match="outside its model"):
        next(iter(banks(model).values()))(torch.zeros(1, 2, 32))


def test_tasks_are_named_and_merged_once() -> None:
    model = merged("bert", level="task", tasks={"cola": "", "sst2": "", "rte": ""})
    tokens = ids(4, 6)
    with pytest.raises(RequestError, match="no task was given; it is one of cola, sst2, rte"):
        logits(model, tokens)
    with pytest.raises(RequestError, match="unknown task 'sst'; it is one of cola"), gating(task="sst"):
        logits(model, tokens)
    with pytest.raises(RequestError, match="3 tasks were given for 4 rows"):
        logits(model, tokens, task_ids=torch.tensor([0, 1, 2]))
    found = banks(model)

    def merges() -> int:
        return sum(bank.calls for bank in found.values())

    with gating(task="sst2"):
        one = logits(model, tokens)
        assert merges() == len(found)  # once for each bank
        near(logits(model, tokens), one)
        assert merges() == len(found)  # cached
        near(model(input_ids=tokens).logits, one)  # with gradients: merged once a call
        assert merges() == 2 * len(found)
    mixed = logits(model, tokens, task_ids=torch.tensor([1, 0, 1, 2]))
    near(mixed[[0, 2]], one[[0, 2]])
    with gating(task=["sst2", "cola", "sst2", "rte"]):
        near(logits(model, tokens), mixed)


def test_a_tasks_cached_matrix_is_made_anew_after_any_change() -> None:
    model = merged("bert", level="task", tasks={"a": "", "b": ""})
    tokens = ids(2, 6)

    def said() -> torch.Tensor:
        with gating(task="a"):
            return logits(model, tokens)

    first = said()
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gating(task="a"):
        model(input_ids=tokens).logits.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(said(), first, atol=1e-3)
    model.load_state_dict(state)
    near(said(), first)
    randomise(model, seed=9)
    assert not torch.allclose(said(), first, atol=1e-3)
    copied = copy.deepcopy(model)
    want = said()
    randomise(model, seed=0)
    with gating(task="a"):
        near(logits(copied, tokens), want)


def test_one_task_needs_no_name() -> None:
    model = convert(dense("bert"), level="task", tasks={"only": ""})
    assert logits(model, ids(2, 5)).shape == (2, 5, 97)
