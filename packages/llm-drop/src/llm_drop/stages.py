"""One short pre-training run, looked at while it goes: what the table `stages` measures where no hub is at hand.

The paper looks at the published checkpoints of one large run. A machine without them trains a small Llama, by the zoo's
own recipe, on the text of Python's standard library, and keeps a copy of it after so many steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

WINDOWS, LENGTH = 2, 256  # a step sees 2 x 1,024 tokens as rows of 256


def _config(layers: int) -> Any:
    from model_hooks.zoo.recipes import llama

    config = llama()
    config.num_hidden_layers = layers
    config.layer_types = None
    return config


def pretrain(
    steps: Sequence[int],
    *,
    layers: int,
    every: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Any]:
    """Train from scratch; returns step -> the model as it was then (float32, eval mode).

    The text is one in `every` of the training modules. Learning rates warm up and then stay, so that an early stage is
    the early part of a longer run. `progress` gets 1 a step. `ValueError` for steps that do not ascend from 1.
    """
    import torch

    from model_hooks.zoo import corpus, tokenizer
    from model_hooks.zoo.recipes import RECIPES
    from model_hooks.zoo.stream import Stream
    from model_hooks.zoo.train import build, loss_of, optimizers

    if not steps or min(steps) < 1 or sorted(set(steps)) != list(steps):
        raise ValueError(f"stages {list(steps)}: give ascending numbers of steps from 1")
    recipe = replace(RECIPES["llama"], config=partial(_config, layers), seed=seed)
    encode = tokenizer.load().backend_tokenizer.encode
    texts = [text for _, text in corpus.text("train", corpus.default_stdlib())][::every]
    documents = [encode(text, add_special_tokens=False).ids for text in texts]
    stream = Stream(documents, lambda text: encode(text, add_special_tokens=False).ids, 0, 0.0, seed)
    model, found = build(recipe).train(), {}
    rates = (recipe.muon_lr, recipe.adam_lr)
    trainers = optimizers(model, recipe)
    for step in range(1, steps[-1] + 1):
        rows = torch.from_numpy(stream.batch(WINDOWS, LENGTH))
        loss_of(model, rows).backward()
        for trainer, top in zip(trainers, rates):
            for group in trainer.param_groups:
                group["lr"] = top * min(1.0, step / recipe.warmup)
            trainer.step()
            trainer.zero_grad(set_to_none=True)
        if step in steps:
            found[step] = copy.deepcopy(model).eval()
        if progress:
            progress(1)
    return found
