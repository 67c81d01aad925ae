"""The zoo ships what it says: competent models, a tokenizer that loses nothing, splits that share nothing."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_hooks import zoo
from model_hooks.zoo import corpus, evaluate, export, tasks
from model_hooks.zoo.muon import orthogonalise
from model_hooks.zoo.recipes import IMAGE_RECIPES, RECIPES
from model_hooks.zoo.stream import WINDOW, Stream

SAMPLE = 40  # questions of a task
OF_ALL = tuple(task for task in tasks.TASKS if task != "zoo_lookup")  # which zoo:llama is not trained for
ALL_MB = 24


@cache
def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo.resolve(name), dtype=torch.float32).eval()


@cache
def bpe(name: str = "zoo:llama") -> Any:
    return AutoTokenizer.from_pretrained(zoo.resolve(name))


@cache
def bits(name: str) -> float:
    return evaluate.bits_per_byte(load(name), bpe(name), sample_of_heldout())


def sample_of_heldout() -> list[tuple[str, str]]:
    return [(name, text[2000:6000]) for name, text in zoo.text("heldout") if len(text) > 12_000]


def test_names_resolve_to_plain_folders() -> None:
    assert zoo.names() == sorted(f"zoo:{name}" for name in {**RECIPES, **IMAGE_RECIPES})
    for name in zoo.names():
        assert (zoo.resolve(name) / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["zoo:lama", "llama", "zoo:", "zoo:../llama"])
def test_an_unknown_name_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown zoo model .*; the zoo has zoo:gpt2, zoo:llama") as caught:
        zoo.resolve(name)
    assert "\n" not in str(caught.value)


def test_importing_the_zoo_imports_nothing_heavy() -> None:
    # a bare parent package: what is left is what the zoo itself imports
    code = (
        "import sys, types; p = types.ModuleType('model_hooks')\n"
        "p.__path__ = [sys.argv[1]]; sys.modules[p.__name__] = p\n"
        "before = set(sys.modules); import model_hooks.zoo.corpus, model_hooks.zoo.tasks\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    parent = str(zoo.tasks_dir().parents[1])
    out = subprocess.run([sys.executable, "-c", code, parent], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "tokenizers", "datasets", "numpy"} & set(ast.literal_eval(out))


def test_the_splits_share_no_module() -> None:
    names = {split: {corpus.group(name) for name, _ in zoo.text(split)} for split in corpus.SPLITS}
    assert len(names["train"]) > 100
    assert not names["train"] & (names["calibration"] | names["heldout"])
    assert not names["calibration"] & names["heldout"]
    assert names["heldout"] <= corpus.HELDOUT
    assert names["calibration"] <= corpus.CALIBRATION


def test_no_training_document_repeats_heldout_functions() -> None:
    train = "\n".join(text for _, text in zoo.text("train"))
    bodies = [code for _, code in zoo.pairs("heldout") if len(code) > 400]
    assert len(bodies) > 50
    assert sum(code in train for code in bodies) == 0


@pytest.mark.parametrize("module", ["test.test_heapq", "heapq", "test.test_csv", "test.test_statistics"])
def test_a_module_and_its_tests_are_in_one_split(module: str) -> None:
    assert corpus.split_of(module) == "heldout"


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_shipped_text_and_pairs(split: str) -> None:
    documents = zoo.text(split)
    assert 200_000 < sum(len(text) for _, text in documents) < 1_000_000
    pairs = zoo.pairs(split)
    assert len(pairs) > 150
    for doc, code in pairs[::20]:
        function = ast.parse(code).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert len(doc) >= 20


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, calibration, heldout"):
        zoo.text("test")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    assert bpe().decode(bpe()(text)["input_ids"]) == text


def test_the_tokenizer_knows_its_special_tokens() -> None:
    ids = bpe()("<|endoftext|><|pad|><|user|><|assistant|><|system|><|image|>")["input_ids"]
    assert ids == [0, 1, 2, 3, 4, 5]
    assert (bpe().bos_token_id, bpe().eos_token_id, bpe().pad_token_id, len(bpe())) == (0, 0, 1, 2048)


def test_the_chat_template_marks_turns_and_the_assistant() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f(): pass"}]
    text = bpe().apply_chat_template(chat, tokenize=False)
    assert text == "<|user|>\nhi<|endoftext|>\n<|assistant|>\ndef f(): pass<|endoftext|>\n"
    assert bpe().apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).endswith("<|assistant|>\n")
    out = bpe().apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert bpe().decode(marked) == "def f(): pass<|endoftext|>"


@pytest.mark.parametrize("name", [f"zoo:{name}" for name in sorted(RECIPES)])
def test_a_checkpoint_loads_whole_and_within_its_size(name: str) -> None:
    folder = zoo.resolve(name)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_size < RECIPES[name.removeprefix("zoo:")].limit_mb * 1e6
    assert len((folder / "training_log.jsonl").read_text().splitlines()) <= 300


def test_all_that_is_shipped_stays_small() -> None:
    folder = zoo.tasks_dir().parent
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(sizes) < ALL_MB * 1e6


def test_no_shipped_file_names_a_machine_or_an_index() -> None:
    for path in zoo.tasks_dir().parent.rglob("*"):
        if path.suffix in {".py", ".json", ".jsonl", ".md", ".yaml", ".jinja"} and path.parent.name != "tokenizer":
            text = path.read_text(encoding="utf-8")
            for address in ("/root" + "/", "/home" + "/", "/work" + "/", "pypi" + "."):
                assert address not in text, f"{path.name} holds {address}"


def test_llama_is_far_better_than_the_unigram_and_gpt2() -> None:
    unigram = evaluate.unigram_bits_per_byte(bpe(), zoo.text("calibration"), sample_of_heldout())
    assert bits("zoo:gpt2") < 0.8 * unigram
    assert bits("zoo:llama") < 0.6 * unigram
    assert bits("zoo:llama") < 0.8 * bits("zoo:gpt2")


@pytest.mark.slow
def test_the_card_states_what_is_measured() -> None:
    measured = json.loads((zoo.resolve("zoo:llama") / "measurements.json").read_text())
    card = (zoo.resolve("zoo:llama") / "README.md").read_text()
    assert f"| {measured['heldout_bits_per_byte']:.3f} |" in card
    found = evaluate.bits_per_byte(load("zoo:llama"), bpe(), zoo.text("heldout"))
    assert found == pytest.approx(measured["heldout_bits_per_byte"], rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_every_model_is_competent_at_every_task_of_its_card(name: str) -> None:
    """Over 200 questions 0.40 is five standard errors above chance."""
    folder = zoo.resolve(f"zoo:{name}")
    measured, card = json.loads((folder / "measurements.json").read_text()), (folder / "README.md").read_text()
    asked = [task for task in tasks.TASKS if task in measured]
    assert set(OF_ALL) <= set(asked)
    assert all(f"| {task} accuracy | {measured[task]:.3f} | 0.25 (chance) |" in card for task in asked)
    assert min(measured[task] for task in asked) >= export.COMPETENT
    assert measured["heldout_bits_per_byte"] < 0.6 * measured["unigram_bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), itertools.product(("zoo:llama", "zoo:gpt2"), OF_ALL))
def test_it_beats_chance_as_the_card_says(name: str, task: str) -> None:
    """By three standard errors over all questions; some of them are asked again."""
    stated = json.loads((zoo.resolve(name) / "measurements.json").read_text())[task]
    assert stated > tasks.CHANCE + 3 * (tasks.CHANCE * (1 - tasks.CHANCE) / tasks.SIZE) ** 0.5
    found = evaluate.accuracy(load(name), bpe(name), zoo.questions(task)[:SAMPLE])
    assert abs(found - stated) <= 3 * (stated * (1 - stated) / SAMPLE) ** 0.5


@pytest.mark.parametrize("task", tasks.TASKS)
def test_questions_are_fair_and_always_the_same(task: str) -> None:
    questions = zoo.questions(task)
    tasks.questions.cache_clear()
    assert zoo.questions(task) == questions
    assert zoo.questions(task, seed=1) != questions
    assert len(questions) == tasks.SIZE
    assert max(Counter(q.answer for q in questions).values()) < 0.4 * tasks.SIZE
    shortest = [q.answer == min(range(4), key=lambda i: len(q.choices[i])) for q in questions]
    assert sum(shortest) < 0.4 * tasks.SIZE
    for q in questions:
        assert len(set(q.choices)) == 4
        assert q.context == q.context.rstrip()
        context = bpe()(q.context)["input_ids"]
        assert all(bpe()(q.context + c)["input_ids"][: len(context)] == context for c in q.choices)


@pytest.mark.parametrize("task", ["zoo_recall", "zoo_lookup"])
def test_recall_can_only_be_answered_from_the_context(task: str) -> None:
    questions = zoo.questions(task)
    lengths = sorted(len(bpe()(q.context)["input_ids"]) for q in questions)
    assert lengths[-1] <= tasks.RECALL_TOKENS
    assert lengths[2] > 0.85 * tasks.RECALL_TOKENS  # one in a hundred may be cut short by a long line
    for q in questions:
        assert all(f":{c}\n" in q.context for c in q.choices)
        key = q.context.rpartition("\n")[2]
        assert f"\n{q.context}".count(f"\n{key}{q.choices[q.answer]}\n") == 1


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="zoo_next_line, zoo_recall, zoo_bracket, zoo_name, zoo_lookup"):
        zoo.questions("recall")


def test_lm_eval_finds_the_tasks_and_agrees() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(zoo.tasks_dir()), include_defaults=False)
    assert set(manager.all_tasks) == set(tasks.TASKS)
    model = HFLM(pretrained=load("zoo:gpt2"), tokenizer=bpe("zoo:gpt2"), device="cpu", batch_size=8)
    out = lm_eval.simple_evaluate(
        model=model, tasks=["zoo_name", "zoo_lookup"], task_manager=manager, limit=16, bootstrap_iters=0
    )
    for task in ("zoo_name", "zoo_lookup"):
        ours = evaluate.accuracy(load("zoo:gpt2"), bpe("zoo:gpt2"), zoo.questions(task)[:16])
        assert out["results"][task]["acc,none"] == pytest.approx(ours)


def test_the_task_folder_is_printed_for_the_command_line() -> None:
    out = subprocess.run([sys.executable, "-m", "model_hooks.zoo.tasks"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(zoo.tasks_dir())


def make_stream(share: float) -> Stream:
    documents = [list(range(6 + i, 1500 + i)) for i in range(40)]
    return Stream(documents, lambda text: list(text.encode()), 0, share, seed=3)


def test_batches_resume_where_they_stopped_at_any_length() -> None:
    whole, part = make_stream(0.3), make_stream(0.3)
    whole.batch(5, 512)
    part.cursor = 5
    assert (whole.batch(4, 256) == part.batch(4, 256)).all()
    assert part.batch(2, 1024).shape == (2, WINDOW)


def test_an_epoch_shows_every_window_once() -> None:
    stream = make_stream(0.0)
    first = {stream.batch(1, 1024).tobytes() for _ in range(stream.windows)}
    assert len(first) == stream.windows


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_muon_orthogonalises(shape: tuple[int, int, int]) -> None:
    out = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(out)
    assert out.shape == shape
    assert (singular > 0.3).all()
    assert (singular < 1.4).all()
