"""Files and folders are whole or absent, broken checkpoints are one clear line, fingerprints notice every change."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, parent
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from model_hooks import Card, RequestError, drop, fingerprint, load, save
from model_hooks.files import atomic_file, atomic_folder, atomic_write, refuse_existing
from model_hooks.identity import tensor_digest
from model_hooks.loading import load_tokenizer, resolve

# ---- atomic_write, atomic_folder


def no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sub" / "a.json"
    atomic_write(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(OSError, match="No space left"):
            atomic_write(file, "new")
    assert file.read_text() == "old"
    atomic_write(file, b"new\xff")
    assert file.read_bytes() == b"new\xff"
    assert os.listdir(file.parent) == ["a.json"]


def test_a_disk_that_is_full_for_real_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit of 10,000 bytes a file, set in a process of its own, is what a full disk is to a writer."""
    code = (
        "import resource, signal, sys, types; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        # a bare parent package, so that torch is not imported
        "p = types.ModuleType('model_hooks'); p.__path__ = [sys.argv[1]]; sys.modules['model_hooks'] = p\n"
        "from model_hooks.files import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); atomic_write(sys.argv[2], 'x' * 20_000)"
    )
    file = tmp_path / "a"
    atomic_write(file, "old")
    package = str(Path(sys.modules["model_hooks"].__file__ or "").parent)
    done = subprocess.run([sys.executable, "-c", code, package, str(file)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("place", [atomic_folder, atomic_file])
def test_a_disk_that_safetensors_finds_full_is_an_error_of_that_file(place: Any, tmp_path: Path) -> None:
    """Its own error is no OSError, by which a full disk is known."""
    limits, signalled = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught, place(tmp_path / "out") as part:
            save_file({"x": torch.zeros(1000)}, part / "x.safetensors" if part.is_dir() else part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signalled)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="tokenizer"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("no tokenizer: No such file or directory (os error 2)")


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("x")
        assert not target.exists()
        assert part.parent == target.parent  # so that the rename stays in one file system
    assert (target / "sub" / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for overwrite, expected in ((False, []), (True, ["folder"])):
        if overwrite:
            target.mkdir()
            (target / "old").touch()
        with pytest.raises(error), atomic_folder(target, overwrite=overwrite) as part:  # noqa: PT012
            (part / "file").write_text("half")
            raise error
        assert os.listdir(tmp_path) == expected
    assert os.listdir(target) == ["old"]


def test_overwriting_replaces_and_leaves_no_old_file_behind(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_folder(target, overwrite=True) as part:
            (part / name).touch()
    assert os.listdir(target) == ["second"]
    with pytest.raises(RequestError, match="exists already and was left as it is; give another name or --overwrite"):
        refuse_existing(target, overwrite=False)
    refuse_existing(target, overwrite=True)
    refuse_existing(tmp_path / "new", overwrite=False)


def test_killed_between_the_two_renames_of_an_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder comes back with the next run, which then does its own work as if nothing had been."""
    target = tmp_path / "folder[1]"
    target.mkdir()
    (target / "old").touch()
    target.rename(tmp_path / ".folder[1].old")  # as the kill leaves it: the old one aside, the new one not in place
    (tmp_path / ".folder[1].part-x").mkdir()
    (tmp_path / ".folder[1].part-x" / "new").touch()
    with pytest.raises(RequestError, match="exists already"), atomic_folder(target):
        pass
    assert os.listdir(target) == ["old"]
    with atomic_folder(target, overwrite=True) as part:
        (part / "new").touch()
    assert os.listdir(tmp_path) == ["folder[1]"]
    assert os.listdir(target) == ["new"]


@pytest.mark.parametrize("output", ["model", "model/out", ".", "link", "link/out"])
def test_an_output_may_not_touch_the_input(output: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with (
        pytest.raises(RequestError, match="overlaps the input"),
        atomic_folder(tmp_path / output, overwrite=True, source=tmp_path / "model"),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]


# ---- checkpoints that are broken


@cache
def saved(folder: Path) -> dict[str, bytes]:
    save(
        drop(build("llama"), attention=[1]),
        folder / "good",
        card=Card("base", "one attention dropped"),
        max_shard_size="30KB",
    )
    return {f.name: f.read_bytes() for f in (folder / "good").iterdir()}


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def truncate(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def pickle_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def stock_type(folder: Path) -> None:
    """As a tool would that renames the model type: the dropped attention is then missing."""
    edit_config(model_type="llama", dtype="float32")(folder)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model-0000\d-of-0000\d.safetensors is truncated: \d+ bytes, its header says \d+; copy"),
    "empty_file": (lambda f: shard(f).write_bytes(b""), "is not a safetensors file"),
    "garbage": (lambda f: shard(f).write_bytes(b"\x00" * 64), "is not a safetensors file|is truncated"),
    "html": (lambda f: shard(f).write_text("<!doctype html>" * 20), "is not a safetensors file"),
    "missing_shard": (lambda f: shard(f).unlink(), r"lacks model-0000\d-of-0000\d.safetensors, which its index names"),
    "broken_index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is not an index of weights"),
    "wider": (edit_config(intermediate_size=64), "config and weights do not match"),
    "deeper": (edit_config(num_hidden_layers=5), "do not match.*in the config but not in the weights"),
    "shallower": (edit_config(num_hidden_layers=3), "do not match.*in the weights but not in the config"),
    "stock_type": (stock_type, "do not match: 5 tensors in the config but not in the weights, first model.layers.1"),
    "pickled": (pickle_only, r"holds pickled weights \(pytorch_model.bin\); only safetensors are read"),
    "no_weights": (no_weights, r"holds no \*.safetensors"),
    "no_config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken_config": (lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
    "unknown_type": (edit_config(model_type="nothing_known"), "nothing_known"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_line(case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    break_it, message = BROKEN[case]
    files = saved(tmp_path_factory.getbasetemp())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    load(tmp_path, tokenizer=False)  # it was good
    break_it(tmp_path)
    with pytest.raises(RequestError, match=message) as caught:
        load(tmp_path, tokenizer=False)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zoo:lama", "unknown zoo model 'zoo:lama'; the zoo has zoo:gpt2, zoo:llama"),
        ("./no/such/folder", "no folder ./no/such/folder; a model is a hub id"),
        ("someone/nothing-of-that-name", "not found on the hub, or the hub cannot be reached"),
        (__file__, "is a file; a model is"),
    ],
)
def test_a_source_that_is_no_model_is_one_line(source: str, message: str) -> None:
    for read in (load, load_tokenizer):
        with pytest.raises(RequestError, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tokenizer_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    saved(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.getbasetemp() / "good"
    for read in (load, load_tokenizer):
        with pytest.raises(RequestError, match=r"it holds no tokenizer; copy .* or load with tokenizer=False"):
            read(folder)
    assert load(folder, tokenizer=False)[1] is None


def test_the_zoo_resolves_to_folders() -> None:
    assert (Path(resolve("zoo:llama")) / "config.json").is_file()
    assert resolve("someone/model") == "someone/model"


# ---- fingerprints


def test_the_fingerprint_is_of_weights_and_structure() -> None:
    model = build("llama")
    first = fingerprint(model)
    assert first == fingerprint(parent("llama"))
    assert len(first) == 16
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == first
    others = {fingerprint(drop(build("llama"), attention=[i])) for i in range(4)}
    others.add(fingerprint(build("llama").to(torch.bfloat16)))
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    others.add(fingerprint(model))
    assert len(others | {first}) == 7


@given(st.integers(0, 99_999), st.integers(0, 15), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_one_flipped_bit_anywhere_changes_it(place: int, bit: int, dtype: torch.dtype) -> None:
    """Beyond the sample of values there is the sum over all of them."""
    tensor = torch.zeros(100_000, dtype=dtype)
    before = tensor_digest(tensor)
    tensor.view(torch.int16)[place] ^= torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)
    assert tensor_digest(tensor) != before


def test_a_checkpoint_is_the_same_in_a_wider_precision() -> None:
    stored = build("llama").to(torch.bfloat16)
    assert fingerprint(copy.deepcopy(stored).to(torch.float32)) == fingerprint(stored)
    assert fingerprint(build("llama")) != fingerprint(stored)  # what rounding changed is another model


def test_shapes_and_dtypes_count_and_every_kind_of_tensor_is_taken() -> None:
    w = torch.arange(6, dtype=torch.int64)
    tensors = (
        w, w.view(2, 3), w.to(torch.int8), w.bool(), torch.tensor(1.0), torch.empty(0), torch.empty(6, device="meta"),
        w.to(torch.float8_e4m3fn),
    )  # fmt: skip
    assert len({tensor_digest(t) for t in tensors}) == len(tensors)
    assert tensor_digest(w.view(2, 3).t()) != tensor_digest(w.view(3, 2))
