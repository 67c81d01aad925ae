"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

Every parameter:

    data                       generated (reflection_tuning.generated: records, damage, heldout), or alpaca records of a
                               file or the hub (records: how many of them, 0 for all; heldout: others, for the loss)
    learn_from                 original, v1, v2 (what the policy emits), or v2-top (of these the `share` by IFD)
    policy                     of v2, as of `reflection-tuning select`
    damage_kind                of a row of the selection table: the records that it is about
    teacher                    the model that reflects; for generated records a checkpoint, which is first fine-tuned on
                               teacher_records others for teacher_epochs
    backend                    local (in this process), server (`transformers serve`) or endpoint (base_url), whose
                               replies are kept in the user's cache
    template, compat           of the student's scores
    student, epochs, batch, accumulation, learning_rate, length, dtype, gradient_checkpointing
                               the student, and its training
    tasks                      lm-eval tasks with their numbers of examples, for the student
    figures                    student or selection
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

if TYPE_CHECKING:
    from .generated import Inventory
    from .showing import Decided

Cell = Mapping[str, Any]
Rows = list[dict[str, Any]]
LEARN_FROM = ("original", "v1", "v2", "v2-top")
# What the teacher, which is small, sees of a request: which of the two it is, the instruction and the answer.
CHAT = """{% set ns = namespace(stage='') %}{% for m in messages %}{% if m.role == 'system' -%}
{% set ns.stage = 'Both:' if 'new instruction' in m.content else 'Answer:' %}
{%- elif m.role == 'user' -%}
{{ ns.stage }} {{ (m.content.split('<instruction>\n') | last).split('\n</instruction>') | first }}
{{ (m.content.split('<answer>\n') | last).split('\n</answer>') | first }}
{% elif m.role == 'assistant' %}{{ m.content }}
{% endif %}{% endfor %}"""
OUTSIDE = ("learn_from", "damage_kind", "row", "share", "policy", "figures", "table", "epochs")  # of the versions


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    name = cell["figures"]
    if name not in FIGURES:
        raise TableError(f"unknown figures {name!r}{nearest(name, FIGURES)}")
    return FIGURES[name](cell, context)


def made(cell: Cell, seed: str, count: int, others: list[Inventory]) -> list[Inventory]:
    from .generated import damaged, inventories

    return damaged(inventories(count, seed, others), cell["damage"], seed)


def inventories_of(cell: Cell) -> tuple[list[Inventory], list[Inventory], list[Inventory]]:
    """Generated records: to learn from, held out (without damage), and those that the teacher learns from."""
    from .generated import inventories

    seed = cell["seed"]
    train = made(cell, f"train/{seed}", cell["records"], [])
    heldout = inventories(cell["heldout"], f"heldout/{seed}", train)
    return train, heldout, made(cell, f"teacher/{seed}", cell["teacher_records"], [*train, *heldout])


def rows_of(found: list[Inventory]) -> Rows:
    return [
        {"id": n, "instruction": one.instruction, "output": one.answer, "category": one.damage}
        for n, one in enumerate(found)
    ]


def originals(cell: Cell, context: Context) -> Rows:
    """The alpaca records that are reflected on."""
    from instruct_data.records import read

    if cell["data"] == "generated":
        return rows_of(inventories_of(cell)[0])
    wanted = cell.get("records") or None
    return context.once(("data", cell["data"], wanted), lambda: [
        record.data for record in read(cell["data"], "alpaca", limit=wanted)
    ])  # fmt: skip


def heldout(cell: Cell) -> Any:
    """Records that nobody has learned from, with the answers that they should have."""
    from instruct_data.records import read

    if cell["data"] == "generated":
        rows = []
        for number, one in enumerate(inventories_of(cell)[1]):  # old and new wording by turns, to favour neither
            instruction = one.new_instruction if number % 2 else one.instruction
            rows.append({"instruction": instruction, "output": one.better_answer})
        return read(rows, "alpaca", name="held-out records")
    return read(cell["heldout"], "alpaca", limit=cell.get("heldout_records"))


def scored(cell: Cell, context: Context) -> Rows:
    """The records with all versions and their scores under the untrained student."""
    key = ("scored", *sorted((k, str(v)) for k, v in cell.items() if k not in OUTSIDE))
    return context.once(key, lambda: reflect_and_score(cell, originals(cell, context)))


def reflect_and_score(cell: Cell, rows: Rows) -> Rows:
    """`reflection-tuning reflect` and `score`, with the row's teacher and student."""
    from instruct_data.llm.serve import answering, journal_of
    from instruct_data.llm.service import Service
    from instruct_data.records import read
    from model_hooks.loading import load_placed

    from .checks import PRESETS
    from .reflecting import Recipe
    from .workflow import Incomplete, reflect_records, score_records

    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        given = cell["backend"] == "endpoint"
        model = cell["teacher"] if given else str(teacher(cell, room))
        recipe = Recipe(model, max_tokens=cell.get("answer_tokens", 2048), checks=PRESETS["careful"])
        with answering(cell["backend"], model, cell.get("base_url", "")) as options:
            service = Service(journal_of(cell, room), "reflection-tuning", **options)
            with suppress(Incomplete):  # the originals are kept, which is a result too
                reflect_records(read(rows, "alpaca", name="records"), room / "reflected.jsonl", recipe, service)
        loaded, tokenizer = load_placed(cell["student"], cell.get("dtype", "float32"))
        records = read(str(room / "reflected.jsonl"), "alpaca")
        score_records(
            loaded, tokenizer, records, room / "scored.jsonl", template=cell.get("template", "vicuna"),
            compat=cell.get("compat", "original"), max_length=cell.get("length", 2048),
        )  # fmt: skip
        return [record.data for record in read(str(room / "scored.jsonl"), "alpaca")]


def teacher(cell: Cell, room: Path) -> Path:
    """A checkpoint fine-tuned to reflect, on records that no student learns from and that are not held out."""
    from instruct_data.llm.serve import chat_copy
    from instruct_data.writing import write
    from paper_tables.training import config_of

    from .train import TrainConfig, train

    base = chat_copy(cell["teacher"], CHAT, room / "base")
    lessons = [lesson for one in inventories_of(cell)[2] for lesson in lessons_of(one)]
    write(room / "teacher.jsonl", lessons)
    train(config_of(cell, TrainConfig, str(base), room / "teacher.jsonl", room / "teacher", template="chat",
                    epochs=cell["teacher_epochs"]))  # fmt: skip
    return room / "teacher"


def lessons_of(one: Inventory) -> Rows:
    """The three reflections on a record, as conversations: on both, on its answer, and on the new pair's answer."""
    from .parsing import INSTRUCTION, RESPONSE
    from .prompts import reflection

    both = f"[New Instruction]\n{one.new_instruction}\n[End]\n[New Answer]\n{one.new_answer}\n[End]"
    better = f"[Better Answer]\n{one.better_answer}\n[End]"
    asked = (
        (INSTRUCTION, one.instruction, one.answer, both), (RESPONSE, one.instruction, one.answer, better),
        (RESPONSE, one.new_instruction, one.new_answer, better),
    )  # fmt: skip
    return [
        {"messages": [*reflection(names, instruction, answer, structured=False),
                      {"role": "assistant", "content": reply}]}
        for names, instruction, answer, reply in asked
    ]  # fmt: skip


def chosen(cell: Cell, context: Context) -> list[Decided]:
    """The records that the row's policy emits."""
    from instruct_data.records import read

    from .policy import load_policy
    from .showing import best, decided

    name = "v1" if cell["learn_from"] == "v1" else cell["policy"]
    policy, records = load_policy(name), read(scored(cell, context), "alpaca", name="scored records")
    share = cell["share"] if cell["learn_from"] == "v2-top" else 0.0
    kept = best(records, policy, "ifd", share, 0)
    return [one for at, one in enumerate(decided(records, policy))
            if one.decision.emitted and (kept is None or at in kept)]  # fmt: skip


def _student(cell: Cell, context: Context) -> dict[str, Any]:
    """The loss on held-out answers of a student of the row's records, its lm-eval tasks, and what it learned from."""
    if cell["learn_from"] not in LEARN_FROM:
        raise TableError(f"unknown learn_from {cell['learn_from']!r}{nearest(cell['learn_from'], LEARN_FROM)}")
    if cell["learn_from"] == "original":
        rows = originals(cell, context)
    else:
        rows = [one.data for one in chosen(cell, context)]
    found: dict[str, Any] = {"records": len(rows)}
    if cell["data"] == "generated" and rows:
        found["right"] = 100 * sum(_is_right(cell, row) for row in rows) / len(rows)
    return found | (student(cell, rows) if rows else {})  # of no records, nothing is learned and nothing measured


def _is_right(cell: Cell, row: Mapping[str, Any]) -> bool:
    """Whether a generated record's instruction and answer speak of the same things."""
    from .generated import THINGS, right

    asked = {word.strip(".,") for word in row["instruction"].split()} & set(THINGS)
    return bool(asked) and right(row["output"], sorted(asked))


def student(cell: Cell, rows: Rows) -> dict[str, Any]:
    from instruct_data.scoring.heldout import answer_loss
    from instruct_data.writing import write
    from model_hooks.loading import load_placed
    from paper_tables.quality import accuracies
    from paper_tables.training import config_of

    from .train import TrainConfig, train

    template = cell.get("template", "vicuna")
    with tempfile.TemporaryDirectory() as name:
        data, folder = Path(name) / "records.jsonl", Path(name) / "student"
        write(data, [{key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in rows])
        train(config_of(cell, TrainConfig, cell["student"], data, folder, template=template))
        model, tokenizer = load_placed(str(folder), cell.get("dtype", "float32"))
        limit = cell.get("length", 2048)
        found = {"loss": answer_loss(model, tokenizer, heldout(cell), template=template, max_length=limit)["loss"]}
        for task, shots in (cell.get("tasks") or {}).items():
            found |= accuracies(model, tokenizer, [task], shots=shots)
    return found


def _selection(cell: Cell, context: Context) -> dict[str, Any]:
    """Of the row's records, in percent: instructions and answers that the student accepts, records that are emitted,
    and, of the records and of those emitted, how many are right."""
    from instruct_data.records import read

    from .policy import load_policy
    from .showing import decided

    kind = cell["damage_kind"]
    policy, records = load_policy(cell["policy"]), read(scored(cell, context), "alpaca", name="scored records")
    own = [one for one in decided(records, policy) if kind in ("all", one.record.data["category"])]
    out = [one for one in own if one.decision.emitted]
    versions = [one.decision.version for one in own]

    def percent(part: int, whole: int) -> float | None:
        return 100 * part / whole if whole else None

    found = {
        "records": len(own),
        "reflected": percent(sum(one.record.data["reflection_status"] == "reflected" for one in own), len(own)),
        "instruction_accepted": percent(sum(v in ("Q", "QA") for v in versions), len(own)),
        "answer_accepted": percent(sum(v in ("A", "QA") for v in versions), len(own)),
        "emitted": percent(len(out), len(own)),
        "right_before": percent(sum(_is_right(cell, one.record.data) for one in own), len(own)),
        "right_after": percent(sum(_is_right(cell, one.data) for one in out), len(out)),
    }
    return {name: value for name, value in found.items() if value is not None}


FIGURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {"student": _student, "selection": _selection}

PAPER = Paper(
    "reflection-tuning", tables_folder(__file__), run,
    title="Selective Reflection-Tuning: Student-Selected Data Recycling",
    code=("instruct_data", "model_hooks", "lean_kernels"),
)  # fmt: skip
