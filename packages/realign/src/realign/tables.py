"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

Every parameter:

    data                        generated (realign.problems: steps, problems, heldout), or problems of a file or the hub
                                (subset, split, heldout_split), with question and answer or in any schema
    answers                     what the student learns from: original, half, realigned, or worked (generated ones only)
    teacher                     the model that rewrites; for generated problems a checkpoint, which is first fine-tuned
                                on teacher_problems others for teacher_epochs
    backend                     local (in this process), server (`transformers serve`) or endpoint (base_url), whose
                                replies are kept in the user's cache
    student, epochs, batch, accumulation, learning_rate, length, dtype, gradient_checkpointing
                                the student, and its training
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

if TYPE_CHECKING:
    from .problems import Problem

Cell = Mapping[str, Any]
ANSWERS = ("original", "half", "realigned", "worked")
TASK = "math_puzzles"
# What the teacher, which is small, sees of a request: question and answer, and not the texts around them.
CHAT = """{% for m in messages %}{% if m.role == 'user' -%}
{{ (m.content.split('[question starts]\n') | last).split('\n[question ends]') | first }}
{{ (m.content.split('[response starts]\n') | last).split('\n[response ends]') | first }}
{% elif m.role == 'assistant' %}{{ m.content }}
{% endif %}{% endfor %}"""


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    answers = cell["answers"]
    if answers not in ANSWERS:
        raise TableError(f"unknown answers {answers!r}{nearest(answers, ANSWERS)}")
    train, heldout, others = data_of(cell, context)
    rows, rewritten = [dict(row) for row in train], 0.0
    if answers == "worked":
        rows = [{**row, "output": row["worked"]} for row in rows]
    elif answers != "original":
        new = context.once(("realigned", key_of(cell)), lambda: realigned(cell, context, train, others))
        rewritten = 100 * sum(row["realign_status"] == "rewrite" for row in new) / len(new)
        chosen = range(0, len(rows), 2 if answers == "half" else 1)
        for at in chosen:
            rows[at]["output"] = new[at]["output"]
        rewritten *= len(chosen) / len(rows)
    return {"exact_match": student(cell, rows, heldout), "rewritten": rewritten, "records": len(rows)}


def key_of(cell: Cell) -> tuple[Any, ...]:
    """What the rewritten answers depend on."""
    return tuple(sorted((k, str(v)) for k, v in cell.items() if k not in ("answers", "row")))


def data_of(cell: Cell, context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Alpaca records: to learn from, held out, and those that the teacher learns from."""
    if cell["data"] != "generated":

        def split_of(name: str) -> list[dict[str, Any]]:
            return context.once(("data", cell["data"], name), lambda: read_problems(cell, name))

        return split_of(cell["split"]), split_of(cell["heldout_split"]), []
    from .problems import apart, problems

    seed, steps = cell["seed"], cell["steps"]
    train = problems(cell["problems"], steps, f"train/{seed}")
    heldout = apart(cell["heldout"], steps, f"heldout/{seed}", train)
    others = apart(cell["teacher_problems"], steps, f"teacher/{seed}", [*train, *heldout])
    return rows_of(train), rows_of(heldout), rows_of(others)


def rows_of(found: list[Problem]) -> list[dict[str, Any]]:
    return [{"instruction": p.question, "output": p.terse, "worked": p.worked, "category": TASK} for p in found]


def read_problems(cell: Cell, split: str) -> list[dict[str, Any]]:
    """Problems of a file or the hub as alpaca records."""
    from instruct_data.formats import open_source

    found = []
    for row in open_source(cell["data"], None, split, cell.get("subset"), "strict").rows():
        data = row.data if isinstance(row.data, Mapping) else {}
        question, answer = data.get("question", data.get("instruction")), data.get("answer", data.get("output"))
        if row.fault is not None or not isinstance(question, str) or not isinstance(answer, str):
            raise TableError(f"{row.where}: {row.fault or 'a problem needs question and answer'}")
        found.append({"instruction": question, "output": answer, "category": TASK})
    return found


def realigned(cell: Cell, context: Context, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> Any:
    """The records as `realign run` rewrites them with the row's teacher."""
    from instruct_data.llm.serve import journal_of
    from instruct_data.llm.service import Service
    from instruct_data.records import read

    from .filters import PRESETS
    from .rewriting import Recipe
    from .taxonomy import load_taxonomy
    from .workflow import rewrite_records

    small = cell["data"] == "generated"
    taxonomy = load_taxonomy(configs() / "word-problems.yaml" if small else None)
    with tempfile.TemporaryDirectory() as name, served(cell, Path(name), others) as (model, options):
        recipe = Recipe(
            model, temperature=0.0 if small else 0.3, max_tokens=cell.get("answer_tokens", 80 if small else 2048),
            candidates=1 if small else 2, filters=PRESETS["gsm8k"],
        )  # fmt: skip
        output = Path(name) / "realigned.jsonl"
        service = Service(journal_of(cell, Path(name)), "realign", **options)
        rewrite_records(read(rows, "alpaca", name="problems"), output, recipe, service, taxonomy)
        return [record.data for record in read(str(output), "alpaca")]


def configs() -> Path:
    tables = tables_folder(__file__)
    return tables.with_name(tables.name.replace("tables", "configs"))


@contextmanager
def served(cell: Cell, room: Path, others: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The teacher's name in requests, and the options of the `Service` where it answers."""
    from instruct_data.llm.serve import answering

    name = cell["teacher"] if cell["backend"] == "endpoint" else str(teacher(cell, room, others))
    with answering(cell["backend"], name, cell.get("base_url", "")) as options:
        yield name, options


def teacher(cell: Cell, room: Path, others: list[dict[str, Any]]) -> Path:
    """A checkpoint fine-tuned to rewrite, on problems that no student learns from and no test asks."""
    from instruct_data.llm.serve import chat_copy
    from instruct_data.writing import write
    from paper_tables.training import config_of

    from .prompts import rewriting
    from .taxonomy import load_taxonomy
    from .train import TrainConfig, train

    form = load_taxonomy(configs() / "word-problems.yaml")[TASK].format
    base = chat_copy(cell["teacher"], CHAT, room / "base")
    rows = []
    for row in others:
        messages = rewriting(row["instruction"], row["output"], form, structured=False)
        reply = f"Reasoning: steps\nRevised response: {row['worked']}"
        rows.append({"messages": [*messages, {"role": "assistant", "content": reply}]})
    write(room / "teacher.jsonl", rows)
    train(config_of(cell, TrainConfig, str(base), room / "teacher.jsonl", room / "teacher",
                    template="chat", epochs=cell["teacher_epochs"]))  # fmt: skip
    return room / "teacher"


def student(cell: Cell, rows: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> dict[str, float]:
    """Exact match, percent, of the student of these records."""
    from instruct_data.records import read
    from instruct_data.writing import write
    from model_hooks.loading import load_placed
    from paper_tables.training import config_of

    from .eval import exact_match
    from .train import TrainConfig, train

    template = "none" if cell["data"] == "generated" else "alpaca"
    with tempfile.TemporaryDirectory() as name:
        data, folder = Path(name) / "records.jsonl", Path(name) / "student"
        write(data, [{"instruction": row["instruction"], "output": row["output"]} for row in rows])
        train(config_of(cell, TrainConfig, cell["student"], data, folder, template=template))
        model, tokenizer = load_placed(str(folder), cell.get("dtype", "float32"))
        tokens = 64 if cell["data"] == "generated" else 512
        found = exact_match(model, tokenizer, read(heldout, "alpaca", name="held-out problems"),
                            template=template, max_new_tokens=tokens, batch_size=50)  # fmt: skip
    return dict(found["exact_match"])


PAPER = Paper(
    "realign",
    tables_folder(__file__),
    run,
    title="Reformatted Alignment",
    code=("instruct_data", "model_hooks", "lean_kernels"),
)
