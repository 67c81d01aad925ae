"""One layer in memory at a time, whatever the depth; and a killed run that goes on to the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from moe_compress.slimming import Slimming
from moe_compress.streaming import slim
from moemodels import build
from processes import run, started
from safetensors import safe_open

from model_hooks import RequestError
from paper_tables.memory import peak_tensor_bytes

WORKSPACE = 650_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "gptq"])
def test_memory_is_that_of_one_layer_at_any_depth(method: str, sequences: torch.Tensor, tmp_path: Path) -> None:
    """Tensors alive at once: at most 1.5 times a layer and the workspace, the same when the depth doubles. Widths stand
    to each other as in Mixtral-8x7B, so moments and weights do, too."""
    peaks, layer = {}, 0
    for depth in (1, 2):
        shape = {"num_hidden_layers": depth, "hidden_size": 64, "intermediate_size": 224, "vocab_size": 64}
        model = build("mixtral", **shape).bfloat16()
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        model.save_pretrained(tmp_path / f"m{depth}")
        how = Slimming(method, group=32, min_tokens=1)
        ids = sequences[:2] % 64

        def work(depth: int = depth, ids: torch.Tensor = ids, how: Slimming = how) -> None:
            slim(tmp_path / f"m{depth}", tmp_path / f"s{depth}", ids, how, workspace=WORKSPACE, batch_size=1)

        peaks[depth] = peak_tensor_bytes(work)
    assert peaks[2] <= 1.5 * layer + WORKSPACE, peaks[2] / layer
    assert peaks[2] == pytest.approx(peaks[1], rel=0.1)
    assert 16 * layer > 5 * peaks[2]  # what a model of 16 layers takes that is loaded whole


RUN = """
import sys, time, torch
import moe_compress.streaming as s
from moe_compress.slimming import Slimming
write = s._Work.write
def slow(self, *args):
    write(self, *args)
    time.sleep(float(sys.argv[4]))
s._Work.write = slow
ids = torch.randint(16, 2048, (4, 32), generator=torch.Generator().manual_seed(3))
s.slim(sys.argv[1], sys.argv[2], ids, Slimming(sys.argv[3], group=32, min_tokens=4))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """kill -9 after the first layers; the same request then makes the files that an uninterrupted run makes."""

    arguments = [str(folder), str(tmp_path / "resumed"), "gptq", "60"]
    first = tmp_path / "resumed.slimming/00000-000.safetensors"
    with started("-c", RUN, *arguments, log=tmp_path / "log") as killed:
        killed.wait_for(tmp_path / "resumed.slimming/manifest.json")
    assert first.is_file()
    assert not (tmp_path / "resumed").exists()
    written = first.stat().st_mtime_ns
    ids = torch.randint(16, 2048, (4, 32), generator=torch.Generator().manual_seed(3))
    with pytest.raises(RequestError, match="unfinished run with other settings"):
        slim(folder, tmp_path / "resumed", ids, Slimming("gptq", group=16, min_tokens=4))
    assert first.stat().st_mtime_ns == written
    for out in ("resumed", "whole"):
        slim(folder, tmp_path / out, ids, Slimming("gptq", group=32, min_tokens=4))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes(), file.name
    assert not (tmp_path / "resumed.slimming").exists()


def test_a_run_that_stopped_between_two_layers_goes_on_with_the_next(
    folder: Path, sequences: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_compress import streaming

    how, slimmed = Slimming("sparsegpt", group=32, min_tokens=4), []
    once = streaming.slim_block

    def stop_at_three(
        how: Slimming, model: object, block: object, layer: object, index: int, *args: object, **k: float
    ):  # type: ignore[no-untyped-def]
        slimmed.append(index)
        if slimmed == [0, 1, 2]:
            raise KeyboardInterrupt
        return once(how, model, block, layer, index, *args, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming, "slim_block", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        slim(folder, tmp_path / "s", sequences, how)
    slim(folder, tmp_path / "s", sequences, how)
    assert slimmed == [0, 1, 2, 2, 3]
    slim(folder, tmp_path / "whole", sequences, how)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "s" / file.name).read_bytes(), file.name


RESIDENT = """
import sys, threading, time, torch
import llmcompressor.modifiers.pruning.wanda.wanda_sparsify, transformers.models.mixtral.modeling_mixtral
from pathlib import Path
from moe_compress.slimming import Slimming
from moe_compress.streaming import slim
def now():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
before = peak = now()
def look():
    global peak
    while True:
        peak = max(peak, now())
        time.sleep(0.002)
threading.Thread(target=look, daemon=True).start()
how = Slimming("wanda", pattern="2:4", min_tokens=1, group=128)
slim(sys.argv[1], sys.argv[2], torch.randint(0, 64, (2, 16)), how, workspace=2e7, batch_size=1)
print("peak", peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of a process's memory")
def test_a_checkpoint_is_slimmed_in_a_quarter_of_its_size(tmp_path: Path) -> None:
    """By all the memory that the process takes beyond its imports, heap and allocator's holes among it."""
    model = build("mixtral", num_hidden_layers=28, hidden_size=384, intermediate_size=768, vocab_size=64)
    size = model.to(torch.bfloat16).num_parameters() * 2
    model.save_pretrained(tmp_path / "m", max_shard_size="10MB")
    del model
    said = run("-c", RESIDENT, tmp_path / "m", tmp_path / "s", log=tmp_path / "log")
    assert int(said.rpartition("peak ")[2]) < size / 4
    with safe_open(min((tmp_path / "s").glob("*.safetensors")), "pt") as opened:
        pruned = [opened.get_tensor(key) for key in opened.keys() if ".experts." in key]  # noqa: SIM118
    assert pruned
    assert all(bool(((w.view(-1, 4) != 0).sum(-1) <= 2).all()) for w in pruned)
