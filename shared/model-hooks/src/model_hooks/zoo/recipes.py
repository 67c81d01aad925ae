"""What each zoo model is and how it is trained. A new model is one more entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_hooks.zoo.tokenizer import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXT, RECALL_CONTEXT = 1024, 2048
END_ID, PAD_ID = 0, 1


@dataclass(frozen=True)
class Recipe:
    """A model's configuration and its training.

    ``stages`` are (share of the time at which it starts, sequence length in tokens); a step holds ``windows`` x
    ``context`` tokens at every length. Learning rates warm up over ``warmup`` steps, stay, and fall linearly to zero
    over the last ``decay`` share of the time. ``limit_mb`` bounds the bf16 weights file. The shares are those of the
    windows that are not plain text: ``recall_share`` of synthetic code (the loss is on all of it), ``lookup_share`` of
    tables in which every repeated key asks for its value, and ``needle_share`` of text with such lines hidden in it; in
    the latter two an answer counts ``ANSWER_WEIGHT`` tokens of text and what cannot be known counts nothing.
    ``start`` names how the untrained weights are set (``starts.py``).
    """

    config: Callable[[], PretrainedConfig]
    summary: str
    minutes: float
    limit_mb: float
    stages: tuple[tuple[float, int], ...] = ((0.0, 256), (0.3, 512), (0.8, 1024))
    windows: int = 6
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.1
    warmup: int = 60
    decay: float = 0.25
    recall_share: float = 0.1
    lookup_share: float = 0.0
    needle_share: float = 0.0
    start: str = "zero"
    context: int = CONTEXT
    seed: int = 0


def llama() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def gpt2() -> PretrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def recall() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=RECALL_CONTEXT,
        # the slowest half of the planes turns by less than one radian over the whole context, so that a key is
        # recognised at any distance; at the usual 10,000 that is a fifth of them
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def mixtral() -> PretrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        sliding_window=None,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


RECIPES: dict[str, Recipe] = {
    "llama": Recipe(
        config=llama,
        summary="a dense Llama with grouped queries: 20 layers, so that dropping layers means something",
        minutes=82,
        limit_mb=8,
    ),
    "gpt2": Recipe(
        config=gpt2,
        summary="a small GPT-2, trained shortly: the weak model of weak-to-strong filtering",
        minutes=6,
        muon_lr=0.01,
        adam_lr=0.002,
        limit_mb=2,
        stages=((0.0, 256), (0.6, 1024)),
        lookup_share=0.05,
        needle_share=0.15,
        start="induction_gpt2",
    ),
    "mixtral": Recipe(
        config=mixtral,
        summary="a mixture of experts: 6 layers of 8 experts, two of which see each token",
        minutes=75,
        limit_mb=7,
        recall_share=0.1,
        lookup_share=0.05,
        needle_share=0.1,
        start="induction",
    ),
    "recall": Recipe(
        config=recall,
        summary="a shallow Llama with heads of 64 that retrieves: it finds a value by its key anywhere in its context",
        minutes=27,
        limit_mb=6,
        stages=((0.0, 128), (0.05, 256), (0.2, 512), (0.4, 1024), (0.65, 2048)),
        windows=2,
        muon_lr=0.01,
        adam_lr=0.002,
        recall_share=0.05,
        lookup_share=0.25,
        needle_share=0.3,
        start="induction",
        context=RECALL_CONTEXT,
    ),
}


@dataclass(frozen=True)
class ImageRecipe:
    """A vision-language model of ``llava.py`` and its training on drawn shapes with AdamW.

    Widths are hidden sizes; an MLP is twice as wide. ``spread`` is the standard deviation of weights at the start: so
    narrow a model learns no shapes with the usual 0.02. ``batch`` is in questions, ``limit_mb`` of the weights.
    """

    summary: str
    vision_width: int
    text_width: int
    vision_layers: int = 2
    text_layers: int = 2
    heads: int = 4
    spread: float = 0.1
    steps: int = 1300
    batch: int = 64
    lr: float = 4e-3
    warmup: int = 100
    seed: int = 0
    limit_mb: float = 1.0


IMAGE_RECIPES: dict[str, ImageRecipe] = {
    "llava": ImageRecipe("a LLaVA so narrow that pruning hurts it", vision_width=16, text_width=40),
    "llava-wide": ImageRecipe(
        "a LLaVA with room to spare", vision_width=64, text_width=96, text_layers=3, lr=2e-3, steps=1000
    ),
}
