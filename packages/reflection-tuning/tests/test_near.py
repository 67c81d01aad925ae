"""Near duplicates: those above the limit are found, none below it is taken for one."""

from __future__ import annotations

import random
from pathlib import Path

from commands import Command
from hypothesis import given
from hypothesis import strategies as st
from reflection_tuning.cli import app
from reflection_tuning.near import Seen, alike, shingles
from reflection_tuning.versions import Version, columns, original
from teachers import WORDS, lines, some_records

from instruct_data import read

COMMAND = Command(app)


@given(st.integers(0, 10**6))
def test_what_is_found_is_what_comparing_all_finds(seed: int) -> None:
    draw, seen, kept = random.Random(seed), Seen(), list[str]()
    for _ in range(30):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        if kept and draw.random() < 0.5:
            words = draw.choice(kept).split()
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            text = " ".join(words).upper() + "!"
        near = [other for other in kept if alike(shingles(text), shingles(other)) >= 0.8]
        found = seen.like(text, 0.8)
        assert (found is not None) == bool(near)
        if found is None:
            kept.append(text)
        else:
            assert kept[found] == near[0]


def test_words_are_compared_and_nothing_else() -> None:
    assert alike(shingles("Name three rivers of France!"), shingles("name THREE rivers of france")) == 1
    assert alike(shingles("a"), shingles("b")) == 0
    assert shingles("") == shingles("!?")


def test_selected_instructions_that_are_alike_are_left_out(room: Path) -> None:
    rows = []
    for number, record in enumerate(read(some_records(6), name="r")):
        text = f"Explain to a friend why the list of item number {number // 2} is sorted by its values"
        versions = {"ori": original(record), "Q": Version(instruction=text, answer="Because.")}
        if number == 5:
            del versions["Q"]
        rows.append({**record.data, **columns(versions)})
    lines("in.jsonl", rows)
    options = ("select", "in.jsonl", "--policy", "v1", "-o", "out.jsonl", "--overwrite")
    assert COMMAND.said(*options)["selected"] == 6
    found = COMMAND.said(*options, "--near-duplicates", 0.9)
    assert (found["selected"], found["near_duplicates"]) == (4, 2)
    assert [record.id for record in read("out.jsonl")] == ["r0", "r2", "r4", "r5"]
