"""What is saved loads as the same model in a fresh process, without us where it can, loudly not where it cannot."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import build, ids, vlm
from processes import run, started
from safetensors import safe_open

from model_hooks import Card, RequestError, anatomy, checkpoint, drop, load, save
from model_hooks.lean import FUSE
from model_hooks.processors import load_processor
from model_hooks.zoo import shapes

CARD = Card(
    "someone/base", "attention of blocks 0 and 2 dropped", "arXiv 2406.15786", {"loss": 1.25, "KV bytes": 0.5}, {"n": 2}
)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=ids(2, 9), use_cache=False).logits


def half(name: str) -> Any:
    """Without two attentions and a feed-forward, and with a constant."""
    bias = {("attention", 2): torch.linspace(-1, 1, 32), ("mlp", 1): torch.linspace(1, 0, 32)}
    return drop(build(name), attention=[0, 2], mlp=[1], bias=bias)


def tensors(folder: Path) -> dict[str, int]:
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            sizes |= {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    return sizes


FRESH = """
import json, sys, torch
import model_hooks
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, folder + ".logits")
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    """All layouts, bfloat16, constants, and Mixtral, whose checkpoints are laid out otherwise than its modules."""
    names = ["llama", "mixtral", "qwen3_moe", "gemma2", "olmo2", "phi", "gpt2", "opt", "falcon", "deepseek_v3"]
    models = {tmp_path / name: half(name) for name in names}
    save(half("llama").to(torch.bfloat16), tmp_path / "cast", card=CARD)  # rotary frequencies cast too, and not saved
    models[tmp_path / "bf16"] = load(tmp_path / "cast", tokenizer=False)[0]
    models[tmp_path / "blocks"] = drop(build("gemma3"), attention=[0, 1], mlp=[1])
    for folder, model in models.items():
        save(model, folder, card=CARD)
    torch.save(ids(2, 9), tmp_path / "ids.pt")
    run("-c", FRESH, tmp_path / "ids.pt", *models, log=tmp_path / "log")
    for folder, model in models.items():
        assert torch.equal(torch.load(f"{folder}.logits"), logits(model)), folder.name


WITHOUT_US = """
import sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
ids, blocks, half = torch.load(sys.argv[1]), sys.argv[2], sys.argv[3]
model, info = AutoModelForCausalLM.from_pretrained(blocks, output_loading_info=True)
assert not any(info.values()), info
torch.save(model(input_ids=ids, use_cache=False).logits.detach(), blocks + ".logits")
for loader in (AutoModelForCausalLM, LlamaForCausalLM, AutoConfig, transformers.LlamaModel, transformers.LlamaConfig):
    try:
        loader.from_pretrained(half)
    except Exception as error:
        print("refused:", type(error).__name__, str(error).replace(chr(10), " "))
    else:
        raise SystemExit(f"{loader.__name__} loaded it")
assert "model_hooks" not in sys.modules
"""


@pytest.mark.slow
def test_without_us_whole_blocks_load_and_halves_fail_loudly(tmp_path: Path) -> None:
    blocks = drop(build("llama"), attention=[1, 2], mlp=[1, 2])
    save(blocks, tmp_path / "blocks", card=CARD)
    save(half("llama"), tmp_path / "half", card=CARD)
    torch.save(ids(2, 9), tmp_path / "ids.pt")
    said = run("-c", WITHOUT_US, tmp_path / "ids.pt", tmp_path / "blocks", tmp_path / "half", log=tmp_path / "log")
    assert torch.equal(torch.load(tmp_path / "blocks.logits"), logits(blocks))
    auto, stock, *_ = (line for line in said.splitlines() if line.startswith("refused: "))
    assert "lean_llama" in auto
    assert FUSE[1] in stock


def test_the_stock_class_refuses_a_half_dropped_checkpoint_here_too(tmp_path: Path) -> None:
    """transformers alone would warn of the type and draw the missing attention at random."""
    save(half("llama"), tmp_path / "half", card=CARD)
    with pytest.raises(Exception, match="import model_hooks and load with AutoModelForCausalLM"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "half")
    assert (type(config).__name__, config.dtype) == ("LeanLlamaConfig", half("llama").dtype)
    assert "dtype" not in config.lean
    assert transformers.AutoConfig.for_model("lean_llama").model_type == "lean_llama"


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "phi", "mixtral"])
def test_the_file_is_smaller_by_exactly_the_dropped_tensors(name: str, tmp_path: Path) -> None:
    full, plan = build(name), {"attention": [0, 2], "mlp": [1, 2]}
    save(full, tmp_path / "full", card=CARD)
    save(drop(build(name), **plan), tmp_path / "less", card=CARD)
    gone = 0
    for kind, indices in plan.items():
        for i in indices:
            block = anatomy(full).blocks[i]
            sublayer = getattr(block, kind)
            gone += sum(
                p.nbytes
                for m in (sublayer.name, *sublayer.own_norms)
                for p in block.module.get_submodule(m).parameters()
            )
    shared = [
        p
        for n in anatomy(full).blocks[2].attention.shared
        for p in anatomy(full).blocks[2].module.get_submodule(n).parameters()
    ]
    gone += sum(p.nbytes for p in shared)  # of block 2, which goes altogether
    before, after = tensors(tmp_path / "full"), tensors(tmp_path / "less")
    assert sum(before.values()) - sum(after.values()) == gone > 0


def test_shards_and_tied_weights(tmp_path: Path) -> None:
    model = drop(build("llama", tie_word_embeddings=True), attention=[1])
    save(model, tmp_path / "m", card=CARD, max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    again, _ = load(tmp_path / "m", tokenizer=False)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_an_image_text_model(name: str, tmp_path: Path) -> None:
    model = drop(copy.deepcopy(vlm(name)), attention=[1])
    save(model, tmp_path / "m", card=CARD)
    again, _ = load(tmp_path / "m", tokenizer=False)
    assert type(again).__name__ == f"Lean{type(vlm(name)).__name__}"
    assert torch.equal(logits(again), logits(model))


def test_the_processor_goes_with_an_image_text_model(tmp_path: Path) -> None:
    model, tokenizer = load("zoo:llava")
    tokenizer.add_tokens(["another"])
    save(drop(model, attention=[1]), tmp_path / "m", tokenizer, card=CARD)
    text = (tmp_path / "m" / "README.md").read_text()
    assert 'AutoModelForImageTextToText.from_pretrained("this folder")' in text

    processor, source = transformers.AutoProcessor.from_pretrained(tmp_path / "m"), load_processor("zoo:llava")
    item = shapes.items("heldout", 1)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    got, want = (
        p(images=item.image, text=p.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
        for p in (processor, source)
    )
    assert got.keys() == want.keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert len(processor.tokenizer) == len(source.tokenizer) + 1  # the tokenizer that was given


def test_an_image_text_model_without_a_processor_is_saved_with_a_warning(tmp_path: Path) -> None:
    model, tokenizer = load("zoo:llava")
    model.name_or_path = str(tmp_path / "gone")
    with pytest.warns(UserWarning, match="no processor is saved beside the model: no folder"):
        save(model, tmp_path / "m", tokenizer, card=CARD)
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert not (tmp_path / "m" / "processor_config.json").exists()


def test_dropping_goes_on_after_a_reload(tmp_path: Path) -> None:
    save(drop(build("llama"), attention=[0], mlp=[0, 1]), tmp_path / "first", card=CARD)
    again, _ = load(tmp_path / "first", tokenizer=False)
    drop(again, attention=[2])
    save(again, tmp_path / "second", card=CARD, source=tmp_path / "first")
    once = drop(build("llama"), attention=[0, 2], mlp=[0, 1])
    last, _ = load(tmp_path / "second", tokenizer=False)
    assert last.config.lean == once.config.lean
    assert torch.equal(logits(last), logits(once))
    with pytest.raises(RequestError, match=r"attention \[0\] already dropped"):
        drop(last, attention=[0])


def test_the_model_card(tmp_path: Path) -> None:
    folder = save(half("llama"), tmp_path / "m", card=CARD)
    text = (folder / "README.md").read_text()
    for part in (
        'base_model: "someone/base"',
        "attention of blocks 0 and 2 dropped. Method: arXiv 2406.15786.",
        "| loss | 1.25 |",
        "| n | 2 |",
        "import model_hooks",
        f"{half('llama').num_parameters():,} parameters, torch.float32",
    ):
        assert part in text
    stock = save(drop(build("llama"), attention=[1], mlp=[1]), tmp_path / "stock", card=CARD)
    assert "import model_hooks" not in (stock / "README.md").read_text()


def test_push_to_hub_uploads_what_save_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> None:
        sent.update({f.name: f.read_bytes() for f in Path(working_dir).iterdir()})

    def create_repo(repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    hub = transformers.utils.hub
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_repo=create_repo), raising=False)  # 5.17
    monkeypatch.setattr(hub, "create_repo", create_repo, raising=False)  # before
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None)
    )
    half("llama").push_to_hub("someone/less")
    config = json.loads(sent["config.json"])
    assert config["model_type"] == "lean_llama"
    assert config["architectures"] == ["LeanLlamaForCausalLM"]
    assert config["lean"]["dropped_attention"] == [0, 2]
    assert "model.safetensors" in sent


def test_lora_on_a_dropped_model_trains_merges_and_saves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(half("llama"), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        model(input_ids=ids(2, 9), labels=ids(2, 9)).loss.backward()
        optimizer.step()
    trained = logits(model.eval())
    assert not torch.allclose(before, trained, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
    save(merged, tmp_path / "merged", card=CARD)
    again, _ = load(tmp_path / "merged", tokenizer=False)
    assert torch.equal(logits(again), logits(merged))
    adapted = peft.PeftModel.from_pretrained(half("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted), trained)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
def test_accelerate_places_a_dropped_model(device_map: str, tmp_path: Path) -> None:
    model = half("llama")
    save(model, tmp_path / "m", card=CARD)
    where: Any = device_map
    options: dict[str, Any] = {}
    if device_map == "disk":
        where = dict.fromkeys(
            ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"
        )
        where |= {f"model.layers.{i}": "disk" for i in (1, 2, 3)}
        options["offload_folder"] = tmp_path / "offload"
    again, _ = load(tmp_path / "m", tokenizer=False, device_map=where, **options)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])
def test_dropping_from_a_dispatched_model(name: str, tmp_path: Path) -> None:
    """Weights on the disk and accelerate's hooks around every module, as in a model too large for its devices."""
    from accelerate import dispatch_model

    model = build(name)
    decoder = anatomy(model).decoder_name
    where = {n: "cpu" for n, _ in model.named_children() if n != decoder}
    where |= {f"{decoder}.{n}": "cpu" for n, _ in model.get_submodule(decoder).named_children() if n != "layers"}
    where |= {f"{decoder}.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    spread_out = dispatch_model(model, where, offload_dir=tmp_path)
    bias = {("attention", 2): torch.linspace(-1, 1, 32), ("mlp", 1): torch.linspace(1, 0, 32)}
    drop(spread_out, attention=[0, 2], mlp=[1], bias=bias)
    assert torch.equal(logits(spread_out), logits(half(name)))


KILLED = """
import sys, time, pathlib, torch
from transformers import LlamaConfig, LlamaForCausalLM
from model_hooks import Card, checkpoint, save
def wait(model, part):
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(600)
checkpoint._check_structure = wait
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4))
save(model, sys.argv[1], card=Card("base", "nothing"))
"""


@pytest.mark.slow
def test_killed_while_saving_leaves_no_folder_and_a_rerun_works(tmp_path: Path) -> None:
    target, marker = tmp_path / "out" / "model[1]", tmp_path / "marker"
    with started("-c", KILLED, target, marker, log=tmp_path / "log") as saving:
        saving.wait_for(marker)
    assert not target.exists()
    (left,) = target.parent.iterdir()
    assert (left / "model.safetensors").exists()  # it was in the middle of it
    save(half("llama"), target, card=CARD)
    assert [f.name for f in target.parent.iterdir()] == [target.name]
    assert torch.equal(logits(load(target, tokenizer=False)[0]), logits(half("llama")))


@pytest.mark.parametrize("where", ["weights", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_halfway(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        full()

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(transformers.PreTrainedModel, "save_pretrained", full_halfway)
        else:
            patch.setattr(f"model_hooks.files.os.{where if where == 'fsync' else 'replace'}", full)
        with pytest.raises(OSError, match="No space left"):
            save(half("llama"), tmp_path / "m", card=CARD)
    assert list(tmp_path.iterdir()) == []
    save(half("llama"), tmp_path / "m", card=CARD)


def test_a_checkpoint_that_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half("llama")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda *a, **k: (build("llama"), None))
        with pytest.raises(RuntimeError, match="reads back with other logits"):
            save(model, tmp_path / "m", card=CARD)
    model.config.num_hidden_layers = 3
    with pytest.raises(RuntimeError, match="config does not describe the model"):
        save(model, tmp_path / "m", card=CARD, verify=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_and_the_input_are_left_alone(tmp_path: Path) -> None:
    model, source = build("llama"), tmp_path / "source"
    save(model, source, card=CARD)
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    for target, options, message in (
        (source, {}, "exists already and was left as it is"),
        (source, {"overwrite": True, "source": source}, "overlaps the input"),
        (source / "inside", {"source": source}, "overlaps the input"),
        (tmp_path, {"overwrite": True, "source": source}, "overlaps the input"),
    ):
        with pytest.raises(RequestError, match=message):
            save(half("llama"), target, card=CARD, **options)
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    save(half("llama"), source, card=CARD, overwrite=True)
    assert torch.equal(logits(load(source, tokenizer=False)[0]), logits(half("llama")))
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_a_newer_lean_section_is_refused(tmp_path: Path) -> None:
    save(half("llama"), tmp_path / "m", card=CARD)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["lean"]["version"] = 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="lean section has version 2, this model_hooks reads 1"):
        load(tmp_path / "m", tokenizer=False)
