"""IFD from sums: the paper's formulas, and None wherever there is no number."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.ifd import ifd
from instruct_data.templates import TEMPLATES, template
from model_hooks import RequestError
from model_hooks.zoo import tokenizer as zoo_tokenizer

sums = st.none() | st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf])


@given(cond=st.floats(0.01, 500), n=st.integers(1, 50), direct=st.floats(0.01, 500), m=st.integers(1, 50))
def test_the_two_ratios_are_the_papers(cond: float, n: int, direct: float, m: int) -> None:
    scored = ifd(cond, n, direct, m)
    assert scored.ifd_loss == pytest.approx((cond / n) / (direct / m))
    assert scored.ppl_A_condition == pytest.approx(math.exp(cond / n))
    assert scored.ppl_A_direct == pytest.approx(math.exp(direct / m))
    assert scored.ifd_ppl == pytest.approx(math.exp(cond / n - direct / m))


@given(cond=sums, n=st.integers(0, 3), direct=sums, m=st.integers(0, 3))
def test_what_is_undefined_is_none_and_json_stays_strict(cond: float, n: int, direct: float, m: int) -> None:
    scored = ifd(cond, n, direct, m)
    json.dumps(asdict(scored), allow_nan=False)
    if cond is None or direct is None or n == 0 or m == 0 or not math.isfinite(cond) or not math.isfinite(direct):
        assert scored.ifd_ppl is None
        assert scored.ifd_loss is None


def test_a_loss_of_zero_has_no_ratio_of_losses() -> None:
    assert ifd(3.0, 3, 0.0, 3).ifd_loss is None
    assert ifd(3.0, 3, 0.0, 3).ifd_ppl == pytest.approx(math.e)
    assert ifd(5000.0, 1, 0.0, 3).ifd_ppl is None  # no float holds it


@dataclass
class Turn:
    instruction: str
    input: str = ""
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""


TOLD = (("u1", "a1"), ("u2", "a2"))


@pytest.mark.parametrize(
    ("name", "turn", "expected"),
    [
        ("none", Turn(" do \n"), " do \n\n"),
        ("none", Turn("do", " "), "do\n \n"),
        ("none", Turn("do", "it", TOLD, "sys"), "sys\nu1\na1\nu2\na2\ndo\nit\n"),
        (
            "alpaca",
            Turn("do"),
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\ndo\n\n### Response:",
        ),
        (
            "alpaca",
            Turn("do", "it"),
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
            "\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:",
        ),
        ("alpaca", Turn("do", "", (("u", "a"),), "sys"),
         "sys\n\n### Instruction:\nu\n\n### Response:a\n\n### Instruction:\ndo\n\n### Response:"),
        ("vicuna", Turn("do", "it", (("u", "a"),), "sys"), "sys USER: u ASSISTANT:a USER: do\nInput:\nit ASSISTANT:"),
        ("chat", Turn("do", "it", (("u", "a"),), "sys"),
         "<|system|>\nsys<|endoftext|>\n<|user|>\nu<|endoftext|>\n<|assistant|>\na<|endoftext|>\n"
         "<|user|>\ndo\nit<|endoftext|>\n<|assistant|>\n"),
    ],
)  # fmt: skip
def test_prompts(name: str, turn: Turn, expected: str) -> None:
    assert template(name, zoo_tokenizer.load())(turn) == expected


def test_vicuna_without_a_system_text_has_its_own() -> None:
    assert template("vicuna")(Turn("do")).startswith("A chat between a curious user and")


def test_a_bos_of_the_chat_template_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = zoo_tokenizer.load()
    tokenizer.chat_template = "{{ '<|endoftext|>' }}" + tokenizer.chat_template
    assert template("chat", tokenizer)(Turn("do")).startswith("<|endoftext|><|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    ids = tokenizer(template("chat", tokenizer)(Turn("do")))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id


def test_unknown_templates_and_missing_chat_templates_are_named() -> None:
    with pytest.raises(RequestError, match=f"no template 'llama'; choose one of {', '.join(TEMPLATES)}"):
        template("llama")
    tokenizer = zoo_tokenizer.load()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="needs a tokenizer with a chat template"):
        template("chat", tokenizer)
