"""Folders of `datasets`, their splits, hub names without a network, and datasets in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from instruct_data.records import BadRecord, read
from instruct_data.writing import write
from model_hooks.errors import RequestError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [{"id": at, "messages": TURNS} for at in range(600)]


@pytest.fixture
def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def test_what_save_to_disk_wrote_is_read(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "d", num_shards=3)
    records = read(tmp_path / "d")
    assert records.schema.name == "messages"
    assert records.arrow == dataset.features.arrow_schema
    for _ in range(2):
        assert [record.data for record in records] == ROWS
    dataset.select([5, 3]).save_to_disk(tmp_path / "few")
    assert [record.id for record in read(tmp_path / "few")] == ["5", "3"]


def test_a_split_is_taken_or_asked_for(dataset: datasets.Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    datasets.DatasetDict(train=dataset, test=dataset.select(range(2))).save_to_disk(folder)
    assert read(f"{folder}:test").count() == 2
    assert read(folder, split="train").count() == 600
    for source, split, message in (
        (folder, None, "has the splits train, test; name one of them, as in NAME:train"),
        (f"{folder}:dev", None, "'dev' is none of them"),
        (folder, "dev", "'dev' is none of them"),
    ):
        with pytest.raises(RequestError, match=message):
            read(source, split=split)
    datasets.DatasetDict(only=dataset).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one").count() == 600


def test_a_folder_of_data_files_is_streamed_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "hub clone" / "data"
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:3])
    records = read(f"{folder.parent}:train")
    assert [record.data for record in records] == ROWS
    assert (records.arrow is not None, records.name) == (True, f"{folder.parent}:train")
    assert read(folder.parent, split="test").count() == 3


@pytest.mark.parametrize("kind", [datasets.Dataset, datasets.IterableDataset])
def test_a_dataset_in_memory_is_a_source(kind: type, dataset: datasets.Dataset, tmp_path: Path) -> None:
    source = dataset if kind is datasets.Dataset else dataset.to_iterable_dataset(num_shards=2)
    records = read(source, name="mine")
    assert [record.data for record in records] == ROWS
    with pytest.raises(BadRecord, match='mine, record 0, id "0", key "instruction": is missing'):
        list(read(source.map(lambda row: {"output": ""}), "alpaca", name="mine"))


def damaged(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "d")
    (folder / "d" / "data-00000-of-00001.arrow").unlink()
    return folder / "d"


def lone_text(folder: Path) -> Path:
    (folder / "e").mkdir()
    (folder / "e" / "notes.md").write_text("nothing")
    return folder / "e"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lambda _: "owner/name", {}, "owner/name: no such file or folder, and the hub did not give it: .*Offline"),
        (lambda _: "owner/name:train", {}, "owner/name: no such file or folder, and the hub"),
        (lambda folder: folder / "missing.json", {}, "missing.json does not exist; give a .json"),
        (lambda folder: f"{folder}/missing/folder", {}, "does not exist; give a .json"),
        (damaged, {}, "is no whole folder of `datasets`"),
        (damaged, {"subset": "main"}, "has no subsets; leave 'main' out"),
        (lone_text, {}, "a folder that cannot be read"),
    ],
)
def test_a_source_that_cannot_be_had_is_one_clear_line(
    source: Callable[[Path], Any], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(source(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_plain_dataset_has_no_splits(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "d")
    with pytest.raises(RequestError, match="has no splits; leave 'train' out"):
        read(tmp_path / "d", split="train")


def test_a_name_of_the_hub_is_streamed_with_its_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, subset: str | None, streaming: bool) -> Any:
        asked.append((path, subset, streaming))
        source = datasets.Dataset.from_list(json.loads(json.dumps(ROWS))).to_iterable_dataset()
        return datasets.IterableDatasetDict(train=source, test=source.take(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name:test", subset="main").count() == 4
    assert asked == [("owner/name", "main", True)]
