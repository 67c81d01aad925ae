"""The processor of a vision-language model: what makes text and images into its inputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .errors import RequestError
from .loading import quiet, resolve


def load_processor(source: str | Path) -> Any:
    """The processor of a checkpoint folder, hub id or zoo:NAME. Raises `RequestError` where it has none for images."""
    where = resolve(source)
    from transformers import AutoProcessor

    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(where)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{source}: its processor does not load ({reason}); copy the base model's files") from None
    if getattr(processor, "image_processor", None) is None:
        raise RequestError(f"{source} has no processor for images; give a vision-language model")
    return processor


def processor_for(model: Any, tokenizer: Any) -> Any:
    """What is saved beside `model`: where it takes images, the processor that it came with, with `tokenizer` in it.

    Warns where such a model came with none that loads; then, and for any other model, it is `tokenizer` itself.
    """
    from transformers import AutoModelForImageTextToText

    takes_images = type(model.config) in AutoModelForImageTextToText._model_mapping
    if not takes_images or not model.name_or_path or hasattr(tokenizer, "image_processor"):
        return tokenizer
    try:
        processor = load_processor(model.name_or_path)
    except RequestError as error:
        warnings.warn(f"no processor is saved beside the model: {error}", stacklevel=3)
        return tokenizer
    processor.tokenizer = tokenizer
    return processor
