"""Tiny random vision-language models of the families, with inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

IMAGE = 90  # the image token's id
TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
FIRST = torch.Generator()


def _ids(images: int, rows: int = 2) -> Tensor:
    """[rows, T]: start, image tokens, six words."""
    words = torch.randint(3, 80, (rows, 6), generator=FIRST)
    return torch.cat([torch.ones(rows, 1, dtype=torch.long), torch.full((rows, images), IMAGE), words], 1)


def _batch(images: int, pixels: tuple[int, ...], **others: Tensor) -> dict[str, Tensor]:
    ids = _ids(images)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(pixels, generator=FIRST), **others}  # fmt: skip


def llava() -> tuple[Any, dict[str, Tensor]]:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER), text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), _batch(4, (2, 3, 8, 8))


def llava_onevision() -> tuple[Any, dict[str, Tensor]]:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, vision_use_head=False), text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE, image_grid_pinpoints=[[8, 8]], vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )  # fmt: skip
    # one base view and one tile of 2 x 2 patches, with a new-line vector after each row of the tile
    return tf.LlavaOnevisionForConditionalGeneration(config), _batch(
        10, (2, 2, 3, 8, 8), image_sizes=torch.tensor([[8, 8], [8, 8]])
    )


def paligemma() -> tuple[Any, dict[str, Tensor]]:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, projection_dim=32, vision_use_head=False).to_dict(),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8).to_dict(), image_token_index=IMAGE, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    batch = _batch(4, (2, 3, 8, 8))
    return tf.PaliGemmaForConditionalGeneration(config), batch | {
        "token_type_ids": torch.zeros_like(batch["input_ids"])
    }


def idefics3() -> tuple[Any, dict[str, Tensor]]:
    config = tf.Idefics3Config(
        vision_config={**TOWER, "image_size": 16},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return tf.Idefics3ForConditionalGeneration(config), _batch(4, (2, 1, 3, 16, 16))


def smolvlm() -> tuple[Any, dict[str, Tensor]]:
    config = tf.SmolVLMConfig(
        vision_config={**TOWER, "image_size": 16},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config), _batch(4, (2, 1, 3, 16, 16))


def _qwen(**text: Any) -> dict[str, Any]:
    return {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
            "text_config": {**TEXT, "rope_parameters": ROPE, **text}}  # fmt: skip


def _patches(side: int = 2) -> dict[str, Tensor]:
    """Two images of side x side merged patches."""
    return {
        "pixel_values": torch.randn(2 * 4 * side**2, 3 * 2 * 4 * 4, generator=FIRST),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * 2),
    }


def _qwen_batch() -> dict[str, Tensor]:
    ids = _ids(4)
    kinds = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **_patches()}


def qwen2_vl() -> tuple[Any, dict[str, Tensor]]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, **_qwen())), _qwen_batch()


def qwen25_vl() -> tuple[Any, dict[str, Tensor]]:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
              "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(vision_config=vision, **_qwen())), _qwen_batch()


def qwen3_vl() -> tuple[Any, dict[str, Tensor]]:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
              "intermediate_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = tf.Qwen3VLConfig(vision_config=vision, **_qwen(head_dim=8))
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_batch()


def _qformer() -> dict[str, Any]:
    return {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_hidden_size": 16, "cross_attention_frequency": 1}  # fmt: skip


def blip2() -> tuple[Any, dict[str, Tensor]]:
    text = tf.OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**TOWER).to_dict(), qformer_config=_qformer(), text_config=text.to_dict(),
        num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config), _batch(4, (2, 3, 8, 8))


def instructblip() -> tuple[Any, dict[str, Tensor]]:
    text = tf.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    config = tf.InstructBlipConfig(
        vision_config=tf.InstructBlipVisionConfig(**TOWER).to_dict(), qformer_config=_qformer(),
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    batch = _batch(4, (2, 3, 8, 8))
    ids = torch.randint(3, 80, (2, 5), generator=FIRST)
    return tf.InstructBlipForConditionalGeneration(config), batch | {
        "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids), "decoder_input_ids": ids + 1,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "blip2": blip2, "instructblip": instructblip, "llava": llava, "llava_onevision": llava_onevision,
    "paligemma": paligemma, "idefics3": idefics3, "smolvlm": smolvlm, "qwen2_vl": qwen2_vl, "qwen25_vl": qwen25_vl,
    "qwen3_vl": qwen3_vl,
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[Any, list[dict[str, Tensor]]]:
    """(model in eval mode with weights of a size that matters, its batches)."""
    torch.manual_seed(seed)
    FIRST.manual_seed(seed)
    model, batch = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    return model.eval(), [batch]
