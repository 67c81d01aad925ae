"""Tasks and formats: the paper's counts, and whatever a user's file may have wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from realign.instructions import generate, templates
from realign.taxonomy import load_taxonomy

from paper_tables.errors import TableError

PASSED_THROUGH = {
    "story_generation", "poem_generation", "advice_giving", "code_simplification", "paraphrasing", "table_extraction",
    "title_generation", "text_summarization", "note_summarization", "roleplay",
}  # fmt: skip
RETRIEVED = {"recommendations", "how_to_generation", "open_qa", "fact_verification", "explain_answer"}


def test_46_tasks_10_groups_36_formats_35_rewritten_5_retrieved() -> None:
    taxonomy = load_taxonomy()
    tasks = taxonomy.tasks.values()
    assert (len(tasks), len(taxonomy.groups)) == (46, 10)
    assert list(Counter(task.group for task in tasks).values()) == [6, 4, 8, 4, 3, 3, 6, 5, 5, 2]
    assert sum(bool(task.format) for task in tasks) == 36
    assert {task.name for task in tasks if not task.format} == PASSED_THROUGH
    assert {task.name for task in tasks if not task.rewrite} == PASSED_THROUGH | {"default"}
    assert {task.name for task in tasks if task.retrieve} == RETRIEVED
    assert all(task.description for task in tasks)
    assert taxonomy.default == "default"


@pytest.mark.parametrize(
    "said", ["open_qa", "Open QA", ' "open-qa". ', "OPEN_QA", "**open_qa**", "'open_qa'", "`open qa`"]
)
def test_a_name_is_known_however_it_is_written(said: str) -> None:
    assert load_taxonomy().find(said) == "open_qa"
    assert load_taxonomy().find(f"I think {said}") is None


def test_templates_are_of_the_tasks() -> None:
    assert set(templates()[1]) == set(load_taxonomy().tasks)
    texts, tasks = generate(5, seed=3)
    assert Counter(tasks) == dict.fromkeys(load_taxonomy().tasks, 5)
    assert not [text for text in texts if "{" in text.replace("{\n", "").replace("{ ", "") and "}" not in text]
    assert (texts, tasks) == generate(5, seed=3)


MINE = "default: a\ngroups:\n  one:\n    a: {description: x}\n    b: {format: list, retrieve: true, checks: [length]}\n"


def test_a_taxonomy_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    taxonomy = load_taxonomy(file)
    assert (taxonomy["b"].rewrite, taxonomy["b"].retrieve, taxonomy["b"].checks) == (True, True, ("length",))
    assert not taxonomy["a"].rewrite


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("default: a", "default: c", "default is 'c'"), ("default: a\n", "", "default is None"),
        ("groups:", "grups:", "unknown key 'grups'"), ("{description: x}", "{rewrite: true}", "has no format"),
        ("{description: x}", "{descripton: x}", "unknown key 'descripton'"),
        ("retrieve: true", "retrieve: maybe", "retrieve is 'maybe'"), ("[length]", "[size]", "unknown check 'size'"),
        ("    a:", "    A B:", "a task's name"), ("{description: x}", "text", "must be a mapping"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(TableError, match=message) as error:
        load_taxonomy(file)
    assert "mine.yaml:" in str(error.value)
