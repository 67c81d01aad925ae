"""What masked adapters cost beside plain LoRA on this machine: time and memory of a step; and latency once merged.

All times are ratios of medians taken in one process, in turn, on the same batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.lora import add_lora
from paper_tables.memory import peak_tensor_bytes
from paper_tables.timing import interleaved
from ressa.adapters import attach
from ressa.branches import Branches, find_branches
from ressa.merging import merge
from ressa.pruning import Pruning, prune
from ressa.teacher import dense

RANK, ALPHA = 8, 16
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


def step_of(model: Any, batch: dict[str, Tensor], teacher: bool = False) -> Callable[[], None]:
    """One forward and backward pass; with a teacher, its forward pass and the divergence from it too."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    from ressa.distill import Objective

    objective = Objective(kl_weight=0.5 if teacher else 0.0)

    def step() -> None:
        taught = None
        if teacher:
            with dense(model):
                taught = model(**inputs, use_cache=False)
        loss, _ = objective(model(**inputs, use_cache=False), taught, batch["labels"])
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


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
    """Ratios to LoRA of a training step's time and memory, of exact to naive, and of merged to dense latency."""
    from model_hooks.loading import load_placed
    from paper_tables.machine import describe, machine

    base = load_placed(name, dtype)[0] if name else probe_llava().to(getattr(torch, dtype))
    branches = find_branches(base)
    masks = prune(base, branches, [], Pruning("magnitude", 0.5, keep_dense=True)).masks
    models, batch = students(base, branches, masks), example_batch(base, batch_size)
    steps = {kind: step_of(model, batch) for kind, model in models.items()}
    steps["exact, taught"] = step_of(models["exact"], batch, teacher=True)
    timed = interleaved(steps, rounds=rounds, warmup=2, base="lora")
    held = {kind: resident_bytes(models[kind.partition(",")[0]]) for kind in steps}
    peaks = {kind: held[kind] + peak_tensor_bytes(step) for kind, step in steps.items()}
    rows = [
        {"step": kind, "milliseconds": 1e3 * timed[kind].seconds, "time_over_lora": 1 / timed[kind].speedup,
         "memory_over_lora": peaks[kind] / peaks["lora"], "peak_bytes": peaks[kind]}
        for kind in steps
    ]  # fmt: skip
    return {
        "machine": describe(machine()), "tokens": batch["input_ids"].numel(), "rounds": rounds, "steps": rows,
        "exact_over_naive": timed["exact"].seconds / timed["naive"].seconds,
        "taught_memory_over_exact": peaks["exact, taught"] / peaks["exact"],
        "merged_latency_over_dense": latency(base, models["exact"], batch, rounds),
    }  # fmt: skip


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
