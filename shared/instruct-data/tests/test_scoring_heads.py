"""What many prompts begin with is forwarded once, and changes no loss; where it would, it is not used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scoring_reference import model, some_pairs, tokenizer

from instruct_data.scoring import Pair, Segment, score
from instruct_data.scoring.heads import LEAST, Heads

pytestmark = pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")
BEGIN = "Below is what somebody asked of an assistant, and the answer that it gave:\n"
NAMES = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM", "MistralForCausalLM", "PhiForCausalLM",
    "MambaForCausalLM",
]  # fmt: skip
PAIRS = [Pair(p.key, BEGIN + p.prompt, p.response) for p in some_pairs(24)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1, 512])
def test_losses_are_those_of_whole_forwards(name: str, budget: int) -> None:
    own, words = model(name), tokenizer("bos")
    plain = score(own, words, PAIRS, budget=budget).table()
    shared = score(own, words, PAIRS, budget=budget, heads=[BEGIN, "another beginning that none of the prompts has"])
    for column in ("loss_cond_sum", "loss_direct_sum"):
        a, b = (t[column].to_numpy(zero_copy_only=False).astype(float) for t in (plain, shared.table()))
        np.testing.assert_allclose(a, b, atol=5e-3, rtol=1e-5)
    facts = shared.facts
    spared = facts["tokens"] - facts["forwarded_tokens"]
    assert (spared > 0) == (name != "MambaForCausalLM")  # its cache is a state, not keys and values
    if spared:
        scored = sum(row["n_cond"] > 0 for row in shared)
        length = len(words(BEGIN)["input_ids"]) - 1
        assert spared <= (scored - 1) * length
        assert spared > 0.5 * scored * length


def test_a_run_that_goes_on_takes_the_heads_along(tmp_path: Path) -> None:
    own, words = model("LlamaForCausalLM"), tokenizer("bos")
    first = score(own, words, PAIRS[:10], folder=tmp_path, heads=[BEGIN])
    assert first.facts["journalled"] == 0
    again = score(own, words, PAIRS, folder=tmp_path, heads=[BEGIN])
    assert again.facts["journalled"] == first.facts["segments"]
    done = score(own, words, PAIRS, folder=tmp_path, heads=[BEGIN])
    assert (done.facts["forwarded"], done.facts["forwarded_tokens"]) == (0, 0)
    assert json.dumps(done.facts["settings"]) == json.dumps(again.facts["settings"])


def test_a_segment_has_the_longest_head_that_holds_none_of_its_targets() -> None:
    short, long = list(range(LEAST)), list(range(LEAST + 4))
    heads = Heads([short, long, long, [1, 2]])
    assert [len(head) for head in heads.ids] == [LEAST + 4, LEAST]
    ids = [*long, 90, 91]
    for first, length in ((LEAST + 5, LEAST + 4), (LEAST + 4, LEAST), (LEAST + 1, LEAST), (LEAST, 0), (1, 0)):
        number = heads.number_of(Segment(ids, first))
        assert (len(heads.ids[number]) if number >= 0 else 0) == length
    assert heads.number_of(Segment([5, *ids], LEAST + 6)) == -1
    assert heads.forwarded == 0
