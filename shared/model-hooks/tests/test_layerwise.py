"""A model is watched and changed with one layer's weights in memory, with the results of the whole model in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import HIDDEN, LAYERS, VOCAB, build, ids, vlm
from torch import Tensor, nn

from model_hooks import RequestError, anatomy, drop, fingerprint, load
from model_hooks.layer_stream import LayerStream
from model_hooks.layerwise import map_layers, watch_layerwise
from model_hooks.loading import quiet
from model_hooks.watch import ResidualWatcher, watch

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "phi", "mixtral", "deepseek_v3"]


class Sums(ResidualWatcher):
    """Sum over tokens of the stream before and after every unit; calls `look` each time."""

    def __init__(self, layers: int = LAYERS, look: Callable[[], None] = lambda: None) -> None:
        self.sums = {u: torch.zeros(layers, 2, HIDDEN, dtype=torch.float64) for u in ("attention", "mlp", "block")}
        self.look = look

    def see(self, index: int, unit: Any, before: Tensor, after: Tensor, mask: Tensor) -> None:
        self.sums[unit][index] += torch.stack([before[mask].double().sum(0), after[mask].double().sum(0)])
        self.look()


def stored(model: Any, folder: Path, shard: str = "20KB") -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def left_padded() -> tuple[Tensor, Tensor]:
    sequences, mask = ids(5, 12), torch.ones(5, 12, dtype=torch.long)
    mask[1, :4] = mask[3, :9] = 0
    return sequences, mask


def assert_same_sums(model: Any, layerwise: dict[str, Tensor], layers: int = LAYERS) -> None:
    sequences, mask = left_padded()
    whole = Sums(layers)
    watch(model, sequences, whole, attention_mask=mask, batch_size=2)
    for name, total in whole.sums.items():
        torch.testing.assert_close(layerwise[name], total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("buffered", [False, True])
def test_layer_by_layer_gives_the_sums_of_the_whole_model(name: str, buffered: bool, tmp_path: Path) -> None:
    folder = stored(build(name), tmp_path / "model", "20KB" if buffered else "5GB")
    sequences, mask = left_padded()
    watcher, buffer = Sums(), tmp_path / "buffer" if buffered else None
    parts = watch_layerwise(folder, sequences, watcher, attention_mask=mask, batch_size=2, buffer=buffer)
    assert_same_sums(load(folder, tokenizer=False)[0], watcher.sums)
    assert [b.layout for b in parts.blocks] == [b.layout for b in anatomy(build(name)).blocks]
    if buffer:
        assert list(buffer.iterdir()) == []


def test_tied_and_dropped_and_vision_models_stream_too(tmp_path: Path) -> None:
    tied = build("llama")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    dropped = drop(build("qwen3"), attention=[0, 2], mlp=[1, 2], bias={("mlp", 1): torch.linspace(-1, 1, HIDDEN)})
    for number, (model, layers) in enumerate([(tied, LAYERS), (dropped, LAYERS - 1), (vlm("llava"), LAYERS)]):
        folder = stored(model, tmp_path / str(number))
        watcher, (sequences, mask) = Sums(layers), left_padded()
        watch_layerwise(folder, sequences, watcher, attention_mask=mask, batch_size=2)
        assert_same_sums(load(folder, tokenizer=False)[0], watcher.sums, layers)


def resident_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.device.type != "meta")


def test_one_layer_is_resident_at_a_time(tmp_path: Path) -> None:
    model = build("llama")
    layer, embedding = resident_bytes(model.model.layers[0]), model.get_input_embeddings().weight.nbytes
    norm = model.model.norm.weight.nbytes
    stream = LayerStream(stored(model, tmp_path / "model"))
    assert resident_bytes(stream.model) == embedding + norm
    seen: list[int] = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append(resident_bytes(stream.model)))
    try:
        watch_layerwise(stream, ids(4, 6), Sums(look=lambda: seen.append(resident_bytes(stream.model))), batch_size=2)
    finally:
        hook.remove()
    assert max(seen) == embedding + norm + max(layer, embedding)  # the output head is as large as the embeddings
    assert resident_bytes(stream.model) == embedding + norm
    changed: list[int] = []
    map_layers(tmp_path / "model", tmp_path / "out", lambda _, found: changed.append(resident_bytes(found)))
    assert changed == [layer] * LAYERS


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fingerprint_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = stored(build(name), tmp_path / "model")
    assert LayerStream(folder).fingerprint() == fingerprint(load(folder, tokenizer=False)[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma"])
def test_so_it_is_where_a_vision_tower_is_not_loaded(name: str, tmp_path: Path) -> None:
    folder = stored(copy.deepcopy(vlm(name)).bfloat16(), tmp_path / "model")
    stream = LayerStream(folder)
    resident = resident_bytes(stream.model)
    found = {fingerprint(load(folder, tokenizer=False, dtype=dtype)[0]) for dtype in ("auto", "float32")}
    assert found == {stream.fingerprint()}
    assert resident_bytes(stream.model) == resident
    with torch.no_grad():
        tower = load(folder, tokenizer=False)[0]
        next(p for n, p in tower.named_parameters() if "vision" in n or "visual" in n).flatten()[0] += 1
    assert fingerprint(tower) != stream.fingerprint()


@pytest.mark.parametrize("stored_in", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_is_the_same_in_any_precision_above_its_own(stored_in: torch.dtype, tmp_path: Path) -> None:
    folder = stored(build("llama").to(stored_in), tmp_path / "model")
    assert fingerprint(load(folder, tokenizer=False, dtype="float32")[0]) == fingerprint(
        load(folder, tokenizer=False)[0]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_nothing_writes_the_same_weights(name: str, tmp_path: Path) -> None:
    folder = stored(build(name).bfloat16(), tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"tokens")
    assert map_layers(folder, tmp_path / "out", lambda index, layer: None) == tmp_path / "out"
    (before, _), (after, _) = load(folder, tokenizer=False), load(tmp_path / "out", tokenizer=False)
    old, new = LayerStream(folder), LayerStream(tmp_path / "out")
    assert old.files.keys() == new.files.keys()
    read = old.read(list(old.files))
    assert all(torch.equal(t, read[k]) and t.dtype == read[k].dtype for k, t in new.read(list(new.files)).items())
    with torch.no_grad():
        assert torch.equal(before(input_ids=ids(2, 9)).logits, after(input_ids=ids(2, 9)).logits)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokens"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())


def test_a_change_is_the_change_made_in_memory(tmp_path: Path) -> None:
    def zero(index: int, layer: Any) -> None:
        if index % 2:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj[1] = 0  # one bank in the model, a tensor per expert in the files

    model = build("mixtral")
    map_layers(stored(model, tmp_path / "model"), tmp_path / "out", zero)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            zero(index, layer)
        got = load(tmp_path / "out", tokenizer=False)[0](input_ids=ids(2, 9)).logits
        assert torch.equal(model(input_ids=ids(2, 9)).logits, got)


def reshape(index: int, layer: Any) -> None:
    layer.mlp.down_proj = nn.Linear(2, 2)


def fail(index: int, layer: Any) -> None:
    if index == 2:
        raise OSError("No space left on device")


@pytest.mark.parametrize(("function", "error"), [(reshape, RequestError), (fail, OSError)])
def test_a_change_that_fails_leaves_nothing(function: Any, error: type[Exception], tmp_path: Path) -> None:
    folder = stored(build("llama"), tmp_path / "model")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(error):
        map_layers(folder, tmp_path / "out", function)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_wrong_requests_are_one_clear_line(tmp_path: Path) -> None:
    folder = stored(build("llama"), tmp_path / "model")
    comparing = Sums()
    comparing.whole_batches = True
    with pytest.raises(RequestError, match="compares blocks"):
        watch_layerwise(folder, ids(2, 4), comparing)
    with pytest.raises(RequestError, match=rf"token id {VOCAB} is not"):
        watch_layerwise(folder, torch.full((2, 4), VOCAB), Sums())
    with pytest.raises(RequestError, match="overlaps the input"):
        map_layers(folder, folder / "inside", lambda index, layer: None)
    with pytest.raises(RequestError, match="exists already"):
        map_layers(folder, folder, lambda index, layer: None)
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "model.layers.2.mlp.up_proj.weight"
    del index["weight_map"][lost]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match=r"no weights for model\.layers\.2\.mlp\.up_proj\.weight"):
        watch_layerwise(folder, ids(2, 4), Sums())
    shards[0].unlink()
    with pytest.raises(RequestError, match="the copy is incomplete"):
        watch_layerwise(folder, ids(2, 4), Sums())
