"""Trains a zoo model, on two CPU cores or a GPU, stopping by the clock.

    python -m model_hooks.zoo.train llama --minutes 75 --out runs/llama --stdlib /usr/lib/python3.13

The run keeps ``OUT/state.pt`` (written every few minutes; the same command goes on from it) and ``OUT/log.jsonl``.
With glibc, ``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000`` in the environment saves page
faults; ``OMP_WAIT_POLICY=passive`` is kind to others on the machine.
``python -m model_hooks.zoo.export`` turns it into a checkpoint folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.zoo import corpus, tokenizer
from model_hooks.zoo.muon import Muon
from model_hooks.zoo.recipes import RECIPES, Recipe
from model_hooks.zoo.starts import STARTS
from model_hooks.zoo.stream import Stream

SAVE_EVERY = 300.0  # seconds


@dataclass
class Progress:
    """How far a run is: ``seconds`` is time spent training, over all its parts."""

    step: int = 0
    tokens: int = 0
    cursor: int = 0
    seconds: float = 0.0


def build(recipe: Recipe) -> nn.Module:
    """The untrained model in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(recipe.seed)
    model: nn.Module = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # type: ignore[operator]  # on a CPU twice as fast as grouped_mm
    STARTS[recipe.start](model)
    return model


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, experts' too, AdamW for embeddings, routers, norms and biases."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        inner = p.ndim in (2, 3) and not any(part in name for part in ("embed", "wte", "wpe", "lm_head", "mlp.gate."))
        (matrices if inner else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay), adam]


def rate(recipe: Recipe, step: int, share: float) -> float:
    """Factor on the learning rates: warm-up by steps, then constant, then a linear fall by elapsed time."""
    return min(1.0, (step + 1) / recipe.warmup) * min(1.0, max(0.0, 1.0 - share) / recipe.decay)


def length_at(recipe: Recipe, share: float) -> int:
    return [length for start, length in recipe.stages if share >= start][-1]


def balance_loss(model: nn.Module, result: Any) -> Tensor | float:
    """What a mixture of experts adds to its loss so that all experts are used; nothing for a dense model."""
    aux = getattr(result, "aux_loss", None)
    return 0.0 if aux is None else model.config.router_aux_loss_coef * aux  # type: ignore[union-attr]


def loss_of(model: nn.Module, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean next-token loss in nats of rows [batch, length], tokens counted equally or by weights of the same shape.

    Matrix products are in bfloat16, parameters in float32. A mixture of experts' balance loss is added.
    """
    with torch.autocast(rows.device.type, torch.bfloat16):
        result = model(input_ids=rows, use_cache=False)
    logits, balance = result.logits, balance_loss(model, result)
    predicted, found = logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()
    if weights is None:
        return F.cross_entropy(predicted, found) + balance
    nats = F.cross_entropy(predicted, found, reduction="none")
    counts = weights[:, 1:].flatten()
    return (nats * counts).sum() / counts.sum().clamp(min=1.0) + balance


def make_stream(recipe: Recipe, stdlib: Path) -> Stream:
    """The training text of ``stdlib`` as a stream of batches."""
    bpe = tokenizer.load()
    texts = [text for _, text in corpus.text("train", stdlib)]
    encoded = bpe.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def encode(text: str) -> list[int]:
        ids: list[int] = bpe.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    assert bpe.eos_token_id == 0
    return Stream(
        [e.ids for e in encoded],
        encode,
        0,
        recipe.recall_share,
        recipe.seed,
        lookup_share=recipe.lookup_share,
        needle_share=recipe.needle_share,
        window=recipe.context,
    )


class Run:
    """A training run in a folder: model, optimizers, batches and progress, saved and resumed together."""

    def __init__(
        self, name: str, folder: Path, minutes: float, stdlib: Path, *, compiled: bool, device: str = "cpu"
    ) -> None:
        self.name, self.folder, self.budget, self.stdlib, self.device = name, folder, minutes * 60, stdlib, device
        self.recipe = RECIPES[name]
        self.model = build(self.recipe).to(device)
        self.optimizers = optimizers(self.model, self.recipe)
        self.stream = make_stream(self.recipe, stdlib)
        self.progress = Progress()
        self.loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self.resume()

    def save(self) -> None:
        state = {
            "name": self.name,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
            "facts": self.facts(),
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self.stream.cursor = self.progress.cursor

    def facts(self) -> dict[str, Any]:
        """What the model card states about the run."""
        return {
            "seed": self.recipe.seed,
            "minutes": round(self.budget / 60, 1),
            "device": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{torch.get_num_threads()} CPU thread(s)",
            "corpus": corpus.python_version(self.stdlib),
            "corpus_tokens": sum(map(len, self.stream.documents)),
            "torch": str(torch.__version__),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def step(self, share: float) -> tuple[float, int]:
        """One update; returns the loss in nats a token and the sequence length used."""
        length = length_at(self.recipe, share)
        batch = self.stream.weighted_batch(self.recipe.windows, length)
        rows, weights = (torch.from_numpy(part).to(self.device) for part in batch)
        factor = rate(self.recipe, self.progress.step, share)
        for optimizer, base in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        loss = self.loss(self.model, rows, weights)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += rows.numel()
        self.progress.cursor = self.stream.cursor
        return loss.item(), length

    def train(self) -> None:
        """Train until the budget is spent. Time counts from the first step, compilation included."""
        before, started, saved = self.progress.seconds, time.monotonic(), time.monotonic()
        self.model.train()
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            while (share := self.progress.seconds / self.budget) < 1.0:
                tick = time.monotonic()
                loss, length = self.step(share)
                now = time.monotonic()
                self.progress.seconds = before + now - started
                if not math.isfinite(loss):
                    raise RuntimeError(f"loss {loss} at step {self.progress.step}; state.pt holds an earlier one")
                row = {
                    "step": self.progress.step,
                    "minutes": round(self.progress.seconds / 60, 3),
                    "tokens": self.progress.tokens,
                    "loss": round(loss, 4),
                    "length": length,
                    "rate": round(rate(self.recipe, self.progress.step, share), 4),
                    "tokens_per_second": round(self.recipe.windows * self.recipe.context / (now - tick)),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                if now - saved > SAVE_EVERY:
                    self.save()
                    saved = now
        self.save()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_hooks.zoo.train", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--minutes", type=float, help="wall-clock budget (default: the recipe's)")
    parser.add_argument("--out", type=Path, required=True, help="run folder; a run found there goes on")
    parser.add_argument("--stdlib", type=Path, default=corpus.default_stdlib(), help="standard library to train on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly (about half as fast)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    minutes = args.minutes or RECIPES[args.name].minutes
    Run(args.name, args.out, minutes, args.stdlib, compiled=not args.no_compile, device=args.device).train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
