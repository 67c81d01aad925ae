"""What masked adapters cost beside plain LoRA on this machine: time and memory of a step; and latency once merged.

All times are ratios of medians taken in one process, in turn, on the same batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.lora import add_lora
from paper_tables.memory import peak_tensor_bytes
from paper_tables.timing import Timed, interleaved
from ressa.adapters import attach
from ressa.branches import Branches, find_branches
from ressa.encoding import encoder_of
from ressa.layers import SparseLoraLinear, masked_linear
from ressa.merging import merge
from ressa.pruning import Pruning, prune
from ressa.teacher import dense

RANK, ALPHA = 8, 16
KEPT = 64  # tokens of a place in a teacher's cache
TOKENS = 32  # of text in an example


def probe_llava(vision_width: int = 128, text_width: int = 384, layers: int = 2) -> Any:
    """A LLaVA with random weights: speed does not depend on what the weights are. 64 image tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        image_size=64, patch_size=8, hidden_size=vision_width, intermediate_size=2 * vision_width,
        num_hidden_layers=layers, num_attention_heads=4, projection_dim=vision_width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=512, hidden_size=text_width, intermediate_size=2 * text_width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=64)
    return LlavaForConditionalGeneration(config).eval()


class Naive(nn.Module):
    """The masked layer written down as it is: autograd keeps W + c B A of every layer until the backward pass."""

    def __init__(self, base: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.base, self.scale = base, ALPHA / RANK
        self.mask = mask.to(base.weight.device)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, **like) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK, **like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.base.weight + self.scale * (self.b @ self.a)) * self.mask, self.base.bias)


def naive(model: Any, masks: dict[str, Tensor]) -> Any:
    """`model` with naive layers on what the masks name; its connector stays frozen."""
    model.requires_grad_(False)
    for path, mask in masks.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Naive(model.get_submodule(path), mask))
    return model


def example_batch(model: Any, batch_size: int) -> dict[str, Tensor]:
    """Random images and text: BOS, image tokens, text; labels on the last half of the text."""
    config = model.config
    side = config.vision_config.image_size
    images = (side // config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, config.text_config.vocab_size, (batch_size, TOKENS), generator=generator)
    ids = torch.cat([torch.full((batch_size, images), config.image_token_id), words], 1)
    labels = ids.clone()
    labels[:, : images + TOKENS // 2] = -100
    pixels = torch.randn(batch_size, 3, side, side, generator=generator).to(model.dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}
    return {name: value.to(model.device) for name, value in batch.items()}


def step_of(model: Any, batch: dict[str, Tensor], taught: str = "") -> Callable[[], None]:
    """One forward and backward pass; with a teacher also the divergence from it.

    taught: live, its own forward pass in the step, its adapters off; cache, its answers as `ressa teacher-cache` keeps
    them; empty, no teacher.
    """
    from ressa.distill import Objective
    from ressa.teachercache import answers_of, targets_of

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    objective = Objective(kl_weight=0.5 if taught else 0.0)

    def teacher() -> Any:
        with torch.no_grad(), dense(model) if is_masked(model) else model.disable_adapter():
            return model(**inputs, use_cache=False)

    kept = None
    if taught == "cache":
        kept = answers_of(targets_of(teacher().logits, batch["labels"], True), objective.temperature, KEPT)

    def step() -> None:
        said = teacher() if taught == "live" else kept
        loss, _ = objective(model(**inputs, use_cache=False), said, batch["labels"])
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def is_masked(model: Any) -> bool:
    return any(isinstance(module, SparseLoraLinear) for module in model.modules())


def checkpointed(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """The step with activations computed again in its backward pass, for which the model must be in training mode."""

    def again() -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        try:
            step()
        finally:
            model.eval()
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # which stays on otherwise

    return again


def settled(step: Callable[[], None]) -> Timed:
    """A step timed after one of its own kind, as in training: the allocator then holds what it needs."""
    return Timed(lambda _: step(), step)


def resident_bytes(model: Any) -> int:
    """Of parameters, buffers and masks."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [m.mask for m in model.modules() if isinstance(getattr(m, "mask", None), Tensor)]
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())


def students(base: Any, branches: Branches, masks: dict[str, Tensor]) -> dict[str, Any]:
    """A copy of the dense base for each way to train on it; `lora` is PEFT's own, on the same layers."""
    ranks = {"vision": RANK, "language": RANK}

    def masked(backward: str) -> Any:
        model = copy.deepcopy(base)
        return attach(model, masks, rank=ranks, alpha=ALPHA, branches=find_branches(model), backward=backward)

    lora = add_lora(copy.deepcopy(base), list(masks), [], rank=RANK, alpha=ALPHA, seed=0)
    return {"lora": lora, "exact": masked("exact"), "ste": masked("ste"), "naive": naive(copy.deepcopy(base), masks)}


def run(name: str = "", *, batch_size: int = 8, rounds: int = 20, dtype: str = "float32") -> dict[str, Any]:
    """Time and memory of a training step by way of training, and each ratio that has a target beside it."""
    from model_hooks.loading import load_placed
    from paper_tables.machine import describe, machine

    base = load_placed(name, dtype)[0] if name else probe_llava().to(getattr(torch, dtype))
    branches = find_branches(base)
    masks = prune(base, branches, [], Pruning("magnitude", 0.5, keep_dense=True)).masks
    models, batch = students(base, branches, masks), example_batch(base, batch_size)
    steps = {kind: step_of(model, batch) for kind, model in models.items()}
    for taught, what in (("live", "taught"), ("cache", "taught by cache")):
        steps[f"exact, {what}"] = step_of(models["exact"], batch, taught)
    for kind in ("lora", "exact"):
        live = step_of(models[kind], batch, "live")
        steps[f"{kind}, taught, checkpointed"] = checkpointed(models[kind], live)
    timed = interleaved({kind: settled(step) for kind, step in steps.items()}, rounds=rounds, base="lora")
    held = {kind: resident_bytes(models[kind.partition(",")[0]]) for kind in steps}
    peaks = {kind: held[kind] + peak_tensor_bytes(step) for kind, step in steps.items()}
    rows = [
        {"step": kind, "milliseconds": 1e3 * timed[kind].seconds, "time_over_lora": 1 / timed[kind].speedup,
         "memory_over_lora": peaks[kind] / peaks["lora"], "peak_bytes": peaks[kind]}
        for kind in steps
    ]  # fmt: skip
    seconds = {kind: found.seconds for kind, found in timed.items()}
    merged = latency(base, models["exact"], batch, rounds)
    return {
        "machine": describe(machine()), "tokens": batch["input_ids"].numel(), "rounds": rounds, "steps": rows,
        "ratios": ratios(seconds, peaks, {n: layer_alone(n, rounds) for n in (256, 1024)}, merged),
        "seconds_of_cpu_to_prune_zoo_llava": pruning_seconds(),
    }  # fmt: skip


def pruning_seconds() -> float:
    """CPU time of `ressa prune zoo:llava` without imports; below 5 is the target."""
    from ressa import workflow

    began = time.process_time()
    model, processor, branches = workflow.Where("zoo:llava", "float32").load()
    batches = workflow.Calibration(batch_size=16).batches(encoder_of(model.config, processor))
    prune(model, branches, batches, Pruning("wanda", 0.7))
    return time.process_time() - began


def ratios(
    seconds: dict[str, float], peaks: dict[str, int], layers: dict[int, float], merged: float
) -> list[dict[str, Any]]:
    """A row for each ratio that has a target: of times, of peaks of memory, of latency once merged."""
    pairs = (
        ("time: ste / LoRA", seconds, "ste", "lora", "at most 1.0"),
        ("time: exact / LoRA", seconds, "exact", "lora", "at most 1.6"),
        ("time: exact / LoRA, both taught and checkpointed", seconds, "exact, taught, checkpointed",
         "lora, taught, checkpointed", "at most 1.35"),
        ("time: exact / naive", seconds, "exact", "naive", "at most 0.95"),
        ("time: taught by cache / taught", seconds, "exact, taught by cache", "exact, taught", ""),
        ("memory: exact / LoRA", peaks, "exact", "lora", "at most 1.1"),
        ("memory: taught / exact", peaks, "exact, taught", "exact", "at most 1.1"),
    )  # fmt: skip
    rows = [{"ratio": name, "value": of[one] / of[two], "target": target} for name, of, one, two, target in pairs]
    return [
        *rows,
        *(
            {
                "ratio": f"time: exact / naive, one layer, {tokens} tokens",
                "value": ratio,
                "target": "at most 0.95",
            }
            for tokens, ratio in layers.items()
        ),
        {"ratio": "latency: merged / dense", "value": merged, "target": "0.97 to 1.03"},
    ]


def layer_alone(tokens: int, rounds: int, width: int = 1024) -> float:
    """Time of both passes of one square layer over that of the naive one, on one thread: nothing dilutes it."""
    threads = torch.get_num_threads()
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    plain = Naive(base, torch.rand(width, width) > 0.5)
    x = torch.randn(tokens, width, requires_grad=True)

    def passes(forward: Callable[[Tensor], Tensor]) -> Timed:
        def step() -> None:
            forward(x).backward(x.detach())
            for tensor in (x, plain.a, plain.b):
                tensor.grad = None

        return settled(step)

    def exact(x: Tensor) -> Tensor:
        return masked_linear(x, base.weight, plain.a, plain.b, plain.mask, plain.scale, None, "exact")

    torch.set_num_threads(1)
    try:
        timed = interleaved({"naive": passes(plain), "exact": passes(exact)}, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return 1 / timed["exact"].speedup


@torch.no_grad()
def latency(base: Any, student: Any, batch: dict[str, Tensor], rounds: int) -> float:
    """Time of a forward pass of the merged model over that of the dense one; both hold dense matrices."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    merged = merge(student)
    timed = interleaved(
        {"dense": lambda: base(**inputs, use_cache=False), "merged": lambda: merged(**inputs, use_cache=False)},
        rounds=max(rounds, 9), warmup=2,
    )  # fmt: skip
    return 1 / timed["merged"].speedup
