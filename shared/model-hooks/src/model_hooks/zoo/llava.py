"""Trains and writes the zoo's vision-language models, which answer questions about drawn shapes (``zoo/shapes.py``).

    python -m model_hooks.zoo.llava llava                   # to the package's own checkpoints/llava
    python -m model_hooks.zoo.llava llava-wide --out runs/llava-wide

A run takes a few minutes on one thread, so it is trained in one go, measured and written with its card.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from model_hooks.zoo import CHECKPOINTS, shapes
from model_hooks.zoo.recipes import IMAGE_RECIPES, ImageRecipe
from model_hooks.zoo.shapes import Item

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<s>", "</s>", "<image>", "<unk>"
VOCABULARY = (PAD, BOS, EOS, IMAGE, UNKNOWN, *shapes.WORDS)
IDS = {word: i for i, word in enumerate(VOCABULARY)}
PATCH = 8  # pixels
IMAGE_TOKENS = (shapes.SIZE // PATCH) ** 2
CONTEXT = 64
FLOOR = {"all": 0.97, "color": 0.95, "describe": 0.95, "shape": 0.95}  # exact answers, below which nothing is written
ASKED = 1536  # held-out questions of the card
LOG_EVERY = 25  # steps

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# zoo:{name}

{summary}.
It has {parameters:,} parameters: a CLIP vision tower of {vision_layers} layers and hidden size {vision_width}, a
projector, and a Llama of {text_layers} layers and hidden size {text_width}; a word is a token, there are {vocab}.
It answers questions about drawn images of two by two shapes (`model_hooks.zoo.shapes`) and knows nothing else.

| Exact answers to held-out questions | zoo:{name} | chance |
|---|---|---|
{table}

{asked:,} questions, as many of each kind; whole answers under teacher forcing; bfloat16 weights, float32 arithmetic.

## Training

{steps:,} steps of {batch} questions, each about an image of its own, in {seconds:.0f} seconds of one CPU thread.
Torch {torch}, seed {seed}. `training_log.jsonl` holds the log. To train it again:

    python -m model_hooks.zoo.llava {name} --out runs/{name}

Weights: Apache-2.0; the images are drawn by the package.
"""
CHANCES = {"all": "", "color": "1/6", "describe": "1/331,776", "shape": "1/4"}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; there are 24."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(IDS, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def processor() -> Any:
    """Images by Pillow and NumPy alone: no torchvision is needed."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": shapes.SIZE, "width": shapes.SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build(recipe: ImageRecipe) -> LlavaForConditionalGeneration:
    """The untrained model in float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        image_size=shapes.SIZE,
        patch_size=PATCH,
        hidden_size=recipe.vision_width,
        intermediate_size=2 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        projection_dim=recipe.vision_width,
        initializer_range=recipe.spread,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        initializer_range=recipe.spread,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
    )
    torch.manual_seed(recipe.seed)
    return LlavaForConditionalGeneration(config).float()


def encode(items: Sequence[Item]) -> dict[str, Tensor]:
    """A batch: BOS, 16 image tokens, question, answer and EOS, padded to the right; labels on the answer and EOS.

    The processor makes the same tensors, one image at a time; training wants them fast.
    """
    rows, starts = [], []
    for item in items:
        head = [IDS[BOS], *[IDS[IMAGE]] * IMAGE_TOKENS, *(IDS[word] for word in item.question.split())]
        starts.append(len(head))
        rows.append([*head, *(IDS[word] for word in item.answer.split()), IDS[EOS]])
    ids = torch.full((len(rows), max(map(len, rows))), IDS[PAD])
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    pixels = torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {"input_ids": ids, "attention_mask": (ids != IDS[PAD]).long(), "pixel_values": pixels, "labels": labels}


@torch.inference_mode()
def exact_match(model: nn.Module, items: Sequence[Item], batch: int = 256) -> dict[str, float]:
    """Share of whole answers that are right under teacher forcing, which equals greedy decoding: all, and by kind."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        inputs = encode(part)
        labels = inputs.pop("labels")[:, 1:]
        best = model(**inputs).logits[:, :-1].argmax(-1)
        for item, good in zip(part, ((best == labels) | (labels == -100)).all(1).tolist(), strict=True):
            right.setdefault(item.kind, []).append(good)
    whole = [good for answers in right.values() for good in answers]
    return {"all": float(np.mean(whole)), **{kind: float(np.mean(right[kind])) for kind in sorted(right)}}


def rate(recipe: ImageRecipe, step: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to three hundredths."""
    share = max(0.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return min(1.0, (step + 1) / recipe.warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))


def train(recipe: ImageRecipe, log: list[dict[str, float]] | None = None) -> LlavaForConditionalGeneration:
    """The trained model in float32; rows of the training go to ``log``."""
    model = build(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    rng = np.random.default_rng([shapes.SPLITS.index("train"), recipe.seed, 1])
    started = time.process_time()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate(recipe, step)
        loss = model(**encode(shapes.stream(rng, recipe.batch))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log is not None and (step % LOG_EVERY == 0 or step == recipe.steps - 1):
            spent = round(time.process_time() - started, 1)
            log.append({"step": step, "cpu_seconds": spent, "loss": round(loss.item(), 4)})
    return model.eval()


def rounded(model: nn.Module) -> nn.Module:
    """The model with its parameters in bfloat16, and all else as it was."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def measure(folder: Path, asked: int = ASKED) -> dict[str, float]:
    """Exact answers to held-out questions of a checkpoint folder, computed in float32."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = exact_match(model, shapes.items("heldout", asked))
    return {kind: round(value, 4) for kind, value in found.items()}


def card(name: str, recipe: ImageRecipe, parameters: int, measured: dict[str, float], log: list[Any]) -> str:
    """The model card."""
    rows = [f"| {kind} | {measured[kind]:.3f} | {CHANCES[kind]} |" for kind in FLOOR]
    return CARD.format(
        **{key: getattr(recipe, key) for key in ("vision_layers", "vision_width", "text_layers", "text_width")},
        name=name,
        summary=recipe.summary[0].upper() + recipe.summary[1:],
        parameters=parameters,
        vocab=len(VOCABULARY),
        table="\n".join(rows),
        asked=ASKED,
        steps=recipe.steps,
        batch=recipe.batch,
        seconds=log[-1]["cpu_seconds"],
        torch=torch.__version__,
        seed=recipe.seed,
    )


def export(name: str, model: nn.Module, log: list[Any], folder: Path) -> dict[str, float]:
    """Write the checkpoint folder; ``RuntimeError`` for a model that is too large, or that does not know the shapes."""
    recipe = IMAGE_RECIPES[name]
    rounded(model).save_pretrained(folder)  # type: ignore[operator]
    processor().save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    if weights.stat().st_size > recipe.limit_mb * 1e6:
        raise RuntimeError(f"the weights take {weights.stat().st_size / 1e6:.2f} MB; {recipe.limit_mb} are the limit")
    measured = measure(folder)
    weak = [f"{kind} {measured[kind]:.3f}" for kind, least in FLOOR.items() if measured[kind] < least]
    if weak:
        raise RuntimeError(f"{name} is not competent ({', '.join(weak)}); give it more steps")
    parameters = sum(p.numel() for p in model.parameters())
    (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    (folder / "measurements.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(name, recipe, parameters, measured, log), encoding="utf-8")
    return measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_hooks.zoo.llava", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(IMAGE_RECIPES))
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: the package's own)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    log: list[dict[str, float]] = []
    model = train(IMAGE_RECIPES[args.name], log)
    print(export(args.name, model, log, args.out or CHECKPOINTS / args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
