"""Turns a training run into a checkpoint folder with its log, its measurements and a model card written from them.

To write the package's own ``checkpoints/llama``:

    python -m model_hooks.zoo.export runs/llama
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_hooks.zoo import CHECKPOINTS, corpus, evaluate, lookups, needle, questions, synthetic, tokenizer
from model_hooks.zoo.recipes import RECIPES
from model_hooks.zoo.stream import ANSWER_WEIGHT
from model_hooks.zoo.tasks import CHANCE, SIZE, TASKS
from model_hooks.zoo.train import build

LOG_LINES = 300
LENGTHS = (256, 512, 1024, 2048)  # of lookups and needles, in tokens
ASKED = 100  # of each length; needles at depths 0.00, 0.01 ... 0.99
COMPETENT = 0.4  # of the questions of each of its tasks: what every model answers at least

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# zoo:{name}

{summary}.
It has {parameters:,} parameters, {layers} layers, hidden size {hidden}, a byte-level BPE of {vocab:,} tokens and a
context of {context:,} tokens. It is small enough to ship inside a package and trained well enough that changing it
shows; it is no use for anything else.

| Measure | zoo:{name} | baseline |
|---|---|---|
{table}

Held-out text: {documents} documents of modules that were in no training batch, in windows of {context:,} tokens. The
unigram's frequencies are the calibration text's. Tasks: {size} questions of four choices, answered by likelihood.
{exact}
## Training

{tokens:,} tokens in {minutes:.0f} minutes on {device}, bfloat16 matrix products over float32 weights.
Torch {torch}, seed {seed}. Text: the standard library of Python {corpus} and its language reference, split by
module; {corpus_tokens:,} tokens an epoch. {recall:.0%} of the windows are synthetic key-value recall.
{mix}`training_log.jsonl` holds the thinned log. To train it again:

    python -m model_hooks.zoo.train {name} --minutes {minutes:.0f} --out runs/{name}
    python -m model_hooks.zoo.export runs/{name}

Weights: Apache-2.0. The text they were trained on: PSF License Version 2 (`data/LICENSE-PSF.txt` in the package).
"""

EXACT = """\
Lookups (a table of pairs `key: value`, one key asked for again) and needles (one pair in held-out text): {asked} of
each length, right if the most likely next token is the value; chance is that of guessing one of the {values} values.
"""
MIX = """\
{lookup:.0%} are tables in which a repeated key asks for its value, {needle:.0%} text with such pairs hidden in it; an
answer counts as much as {weight:.0f} tokens of text. The untrained weights are those of `starts.py`'s `{start}`: a part
of each layer's heads starts as half of an induction circuit, and all weights are trained.
"""


def load_run(run: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model of a run, rounded to bfloat16, and the run's state."""
    state = torch.load(run / "state.pt", weights_only=True, map_location="cpu")
    model = build(RECIPES[state["name"]])
    model.load_state_dict(state["model"])
    for parameter in model.parameters():  # not .to(): that would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # for the balance loss in training alone
    return model.eval(), state


def check_same(model: nn.Module, folder: Path) -> None:
    """Raise unless the folder loads, without a missing key, to a model with the same logits."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    if hasattr(loaded.config, "num_local_experts"):
        loaded.set_experts_implementation(model.config._experts_implementation)  # type: ignore[union-attr]
    ids = torch.randint(0, loaded.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        saved, found = model(input_ids=ids).logits.float(), loaded.eval()(input_ids=ids).logits.float()
    difference = (saved - found).abs().max().item()
    if wrong or difference != 0.0:
        raise RuntimeError(f"{folder} does not load to what was saved: {wrong}, logits differ by {difference}")


def measure(folder: Path, *, retrieves: bool = False) -> dict[str, float]:
    """Bits per byte of the held-out text and accuracy on the tasks, computed in float32.

    For a model trained to retrieve (``retrieves``), lookups too: the task, and exact matches of them and of needles by
    length.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bpe, context = AutoTokenizer.from_pretrained(folder), model.config.max_position_embeddings
    heldout = corpus.text("heldout")
    measured = {
        "heldout_bits_per_byte": evaluate.bits_per_byte(model, bpe, heldout, context),
        "unigram_bits_per_byte": evaluate.unigram_bits_per_byte(bpe, corpus.text("calibration"), heldout),
    }
    for task in (task for task in TASKS if retrieves or task != "zoo_lookup"):
        measured[task] = evaluate.accuracy(model, bpe, questions(task))
    for length in (n for n in LENGTHS if n <= context) if retrieves else ():
        measured[f"lookup_{length}"] = evaluate.exact_match(model, bpe, lookups(length, ASKED))
        hidden = [needle(length, depth / ASKED, seed=depth) for depth in range(ASKED)]
        measured[f"needle_{length}"] = evaluate.exact_match(model, bpe, hidden)
    return {key: round(value, 4) for key, value in measured.items()}


def thin(log: Path) -> list[str]:
    """At most 300 rows of a training log, evenly spaced, the last one kept."""
    rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
    every = -(-len(rows) // LOG_LINES)
    return rows[len(rows) - 1 :: -every][::-1]


def card(name: str, state: dict[str, Any], measured: dict[str, float], config: Any) -> str:
    """The model card."""
    recipe = RECIPES[name]
    bits, unigram = measured["heldout_bits_per_byte"], measured["unigram_bits_per_byte"]
    rows = [f"| held-out bits per byte (lower is better) | {bits:.3f} | {unigram:.3f} (unigram) |"]
    rows += [
        f"| {task} accuracy | {measured[task]:.3f} | {CHANCE:.2f} (chance) |" for task in TASKS if task in measured
    ]
    values, exact, mix = len(synthetic.words()[1]), "", ""
    if recipe.lookup_share:
        for kind in ("lookup", "needle"):
            found = [(n, measured[f"{kind}_{n}"]) for n in LENGTHS if n <= config.max_position_embeddings]
            rows += [f"| {kind} exact match at {n:,} tokens | {x:.2f} | {1 / values:.3f} (chance) |" for n, x in found]
        exact = EXACT.format(asked=ASKED, values=values)
        shares = {"lookup": recipe.lookup_share, "needle": recipe.needle_share}
        mix = MIX.format(**shares, weight=ANSWER_WEIGHT, start=recipe.start)
    progress, facts = state["progress"], state["facts"]
    return CARD.format(
        **facts | {"minutes": progress["seconds"] / 60},
        name=name,
        summary=recipe.summary[0].upper() + recipe.summary[1:],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        table="\n".join(rows),
        documents=len(corpus.text("heldout")),
        size=SIZE,
        tokens=progress["tokens"],
        recall=recipe.recall_share,
        exact=exact,
        mix=mix,
    )


def export(run: Path, folder: Path | None) -> Path:
    """Write the checkpoint folder of a run, check that it loads, measure it, and write its card."""
    model, state = load_run(run)
    name = state["name"]
    folder = folder or CHECKPOINTS / name
    model.save_pretrained(folder)  # type: ignore[operator]
    bpe = tokenizer.load()
    bpe.model_max_length = RECIPES[name].context
    bpe.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    if size > RECIPES[name].limit_mb:
        raise RuntimeError(f"the weights take {size:.1f} MB; zoo:{name} may take {RECIPES[name].limit_mb} MB")
    check_same(model, folder)
    (folder / "training_log.jsonl").write_text("".join(thin(run / "log.jsonl")), encoding="utf-8")
    measured = measure(folder, retrieves=RECIPES[name].lookup_share > 0)
    (folder / "measurements.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(name, state, measured, model.config), encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_hooks.zoo.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: the package's own)")
    args = parser.parse_args(argv)
    print((export(args.run, args.out) / "README.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
