"""How an instruction becomes the prompt text that a response follows.

`none`: Superfiltering's own: instruction, newline, then input and newline where there is one; nothing is stripped.
`alpaca`, `vicuna`, `wiz` (WizardLM): the texts of those projects (as in Cherry_LLM). `chat`: the tokenizer's own.
Earlier turns of a conversation come before, each with its true answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from model_hooks.errors import RequestError

TEMPLATES = ("none", "alpaca", "vicuna", "wiz", "chat")

ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
)
PAIRED = ", paired with an input that provides further context"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class Example(Protocol):
    """What a template reads of a turn; `system` may be missing."""

    @property
    def instruction(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def history(self) -> tuple[tuple[str, str], ...]: ...


def none(example: Example) -> str:
    system = _system(example)
    return (
        (f"{system}\n" if system else "")
        + "".join(f"{user}\n{assistant}\n" for user, assistant in example.history)
        + f"{example.instruction}\n"
        + (f"{example.input}\n" if example.input else "")
    )


def alpaca(example: Example) -> str:
    turns = "".join(f"### Instruction:\n{u}\n\n### Response:{a}\n\n" for u, a in example.history)
    given = f"### Input:\n{example.input}\n\n" if example.input else ""
    head = _system(example) + "\n\n" if _system(example) else ALPACA.format(paired=PAIRED if given else "")
    return f"{head}{turns}### Instruction:\n{example.instruction}\n\n{given}### Response:"


def vicuna(example: Example) -> str:
    turns = "".join(f"USER: {u} ASSISTANT:{a} " for u, a in example.history)
    given = f"\nInput:\n{example.input}" if example.input else ""
    head = _system(example) + " " if _system(example) else VICUNA
    return f"{head}{turns}USER: {example.instruction}{given} ASSISTANT:"


def wiz(example: Example) -> str:
    system = _system(example)
    turns = "".join(f"{u}\n\n### Response:{a}\n\n" for u, a in example.history)
    given = f"\n{example.input}" if example.input else ""
    return (f"{system}\n\n" if system else "") + f"{turns}{example.instruction}{given}\n\n### Response:"


def chat(tokenizer: Any) -> Callable[[Example], str]:
    """Prompts by the tokenizer's chat template. Raises `RequestError` where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"template chat needs a tokenizer with a chat template, {tokenizer.name_or_path or 'this one'} has none; "
            f"choose {', '.join(TEMPLATES[:-1])}"
        )
    # The scorer lets the tokenizer add its BOS, so a BOS spelled out by the template would come twice.
    ids, bos = tokenizer("")["input_ids"], tokenizer.bos_token
    doubled = bos if ids[:1] == [tokenizer.bos_token_id] and bos else ""

    def prompt(example: Example) -> str:
        system = _system(example)
        messages = [{"role": "system", "content": system}] if system else []
        for user, assistant in example.history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        content = example.instruction + (f"\n{example.input}" if example.input else "")
        messages.append({"role": "user", "content": content})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(doubled)

    return prompt


def template(name: str, tokenizer: Any = None) -> Callable[[Example], str]:
    """The function from an example to its prompt text. Raises `RequestError` for an unknown name."""
    plain = {"none": none, "alpaca": alpaca, "vicuna": vicuna, "wiz": wiz}
    if name in plain:
        return plain[name]
    if name == "chat":
        return chat(tokenizer)
    raise RequestError(f"no template {name!r}; choose one of {', '.join(TEMPLATES)}")


def _system(example: Example) -> str:
    return getattr(example, "system", "") or ""
