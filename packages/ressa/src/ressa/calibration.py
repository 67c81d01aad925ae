"""What linear layers read while calibration data runs through the model, one block at a time.

The model's own forward runs for every block, so masks, positions and images are always its own. Blocks before it are
not computed again, but for the last one, pruned by now: they hand on what they gave. Memory: one block's statistics,
and one block's outputs for all batches, on the CPU.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from model_hooks.trace import eval_mode

Batch = dict[str, Tensor]
# keys and values of a decoder's cross-attention: they read what its encoder gave
CROSS = re.compile(r"(EncDecAttention|encoder_attn|cross_attn)\.(k|v|k_proj|v_proj)$")


class Stop(Exception):
    """Raised behind the block at work: the rest of the model need not run."""


class Statistics:
    """Sums over the inputs x of one linear layer, padding left out.

    Args:
        full: x x^T [width, width] in float32, instead of x^2 [width] in float64.
        equal: Image and text tokens count the same in sum, however many there are: their sums are kept apart.
    """

    def __init__(self, full: bool, equal: bool) -> None:
        self.full, self.equal = full, equal
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, kind: str, x: Tensor) -> None:
        """x: [tokens, width], all image or all text."""
        if not len(x):
            return
        key = kind if self.equal else "all"
        new = x.float().T @ x.float() if self.full else x.double().square().sum(0)
        self.sums[key] = self.sums[key].add_(new) if key in self.sums else new
        self.tokens[key] = self.tokens.get(key, 0) + len(x)

    def second_moment(self) -> Tensor:
        """Mean square of each input [width], or mean x x^T [width, width]."""
        means = [self.sums[key] / n for key, n in self.tokens.items()]
        return torch.stack(means).mean(0) if len(means) > 1 else means[0]


class Tokens:
    """Which rows of a layer's input are padding, images or text, for the batch at work."""

    def __init__(self, model: Any, image_token_id: int | None) -> None:
        self.image_token_id = image_token_id
        self.decoder = _decoder_beside_encoder(model)
        self.encoded: tuple[Tensor, Tensor | None] | None = None  # real tokens [B, T], and those that are images
        self.decoded: tuple[Tensor, Tensor | None] | None = None

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if mask is None and ids is not None:
            mask = torch.ones_like(ids)
        image = None if ids is None or self.image_token_id is None else ids == self.image_token_id
        self.encoded = None if mask is None else (mask.bool(), image)
        decoder_mask = batch.get("decoder_attention_mask")
        self.decoded = None if decoder_mask is None else (decoder_mask.bool(), None)

    def split(self, x: Tensor, branch: str, path: str) -> Iterator[tuple[str, Tensor]]:
        """("image" or "text", [tokens, width]) of an input [..., width]; the vision tower sees images alone."""
        rows = x.reshape(-1, x.shape[-1])
        if branch == "vision":
            yield "image", rows
            return
        decodes = self.decoder is not None and path.startswith(f"{self.decoder}.")
        marks = self.decoded if decodes and not CROSS.search(path) else self.encoded
        if marks is None or not self._fits(marks, x):
            yield "text", rows
            return
        mask, image = (None if part is None else part.to(x.device).reshape(-1) for part in marks)
        assert mask is not None
        if image is None:
            yield "text", rows[mask]
            return
        yield "image", rows[mask & image]
        yield "text", rows[mask & ~image]

    @staticmethod
    def _fits(marks: tuple[Tensor, Tensor | None] | None, x: Tensor) -> bool:
        return marks is not None and x.dim() == 3 and x.shape[:2] == marks[0].shape


def _decoder_beside_encoder(model: Any) -> str | None:
    """The path of the decoder, where the text model has an encoder too."""
    if not hasattr(model, "get_decoder"):
        return None
    text = model.get_decoder()
    while (inner := text.get_decoder() if hasattr(text, "get_decoder") else text) is not text:
        text = inner
    path = next((name for name, module in model.named_modules() if module is text), "")
    parent = model.get_submodule(path.rpartition(".")[0])
    return path if path and isinstance(getattr(parent, "encoder", None), nn.Module) else None


def count_tokens(batches: Sequence[Mapping[str, Tensor]], image_token_id: int | None) -> dict[str, int]:
    """Tokens of the text model's input: image, text, padding. Raises `RequestError` for no data or only padding."""
    found = {"image": 0, "text": 0, "padding": 0}
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
        image = (ids == image_token_id) & mask if image_token_id is not None else torch.zeros_like(mask)
        found["image"] += int(image.sum())
        found["text"] += int((mask & ~image).sum())
        found["padding"] += int((~mask).sum())
    if not found["image"] and not found["text"]:
        raise RequestError("there is no calibration data; give --calibration with at least one example")
    return found


class Runner:
    """Runs all batches up to one block and no further.

    Args:
        model: As it is now, on its device.
        batches: Model inputs; tensors on any device.
        equal: Image and text tokens weigh the same in the statistics.
    """

    def __init__(
        self, model: Any, batches: Sequence[Batch], image_token_id: int | None, *, equal: bool = False
    ) -> None:
        self.model, self.batches, self.equal = model, list(batches), equal
        self.tokens = Tokens(model, image_token_id)
        self.done: list[str] = []  # of the stack at work, in order
        self.outputs: list[Any] = []  # of the last of them, by batch
        self.pending: str | None = None  # the block after them: it runs once more, as it is by then
        accepted = inspect.signature(model.forward).parameters
        variadic = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self.extra = {"use_cache": False} if "use_cache" in accepted or variadic else {}

    def collect(self, block: str, branch: str, layers: Mapping[str, nn.Linear], full: bool) -> dict[str, Statistics]:
        """Statistics of the inputs of `layers`; of those that no batch reaches, none."""
        found: dict[str, Statistics] = {}

        def see(path: str, x: Tensor) -> None:
            if not bool(torch.isfinite(x).all()):
                raise RequestError(f"{path} reads NaN or infinite activations; load the model in another --dtype")
            own = found.setdefault(path, Statistics(full, self.equal))
            for kind, rows in self.tokens.split(x.detach(), branch, path):
                own.add(kind, rows)

        with _watching(layers, see):
            outputs = self._run(block)
        if self.pending and len(outputs) == len(self.batches):
            self.done.append(self.pending)
            self.outputs = outputs
        self.pending = block
        return {path: own for path, own in found.items() if own.tokens}

    def begin(self) -> None:
        """Another stack of blocks comes next."""
        self.done, self.outputs, self.pending = [], [], None

    def _run(self, block: str) -> list[Any]:
        """All batches, up to the end of `block`; what the block before it gives for each, on the CPU."""
        kept: list[Any] = []

        def stop(*_call: Any) -> None:
            raise Stop

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            kept.append(_to(output, "cpu"))

        handles = [self.model.get_submodule(block).register_forward_hook(stop)]
        if self.pending:
            handles.append(self.model.get_submodule(self.pending).register_forward_hook(keep))
        try:
            with torch.no_grad(), eval_mode(self.model), self._skipping() as set_batch:
                for number, batch in enumerate(self.batches):
                    set_batch(number)
                    self.tokens.begin(batch)
                    with suppress(Stop):
                        self.model(**_to(batch, self._device()), **self.extra)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def unused(self, blocks: Sequence[str]) -> list[str]:
        """The last of a tower's blocks that nothing reads: LLaVA takes images from a block before the last."""
        found: list[str] = []
        if not self.batches:
            return found
        plain = self._logits(None)
        for block in reversed(blocks):
            if not torch.equal(self._logits(block), plain):
                break
            found.append(block)
        return found

    def _logits(self, disturbed: str | None) -> Tensor:
        """Of the first batch; with the output of one block reversed."""
        module = self.model.get_submodule(disturbed) if disturbed else nn.Identity()
        # before the hooks by which transformers collects hidden states
        handle = module.register_forward_hook(lambda _module, _args, output: _negated(output), prepend=True)
        try:
            with torch.no_grad(), eval_mode(self.model):
                logits: Tensor = self.model(**_to(self.batches[0], self._device()), **self.extra).logits
        finally:
            handle.remove()
        return logits

    @contextmanager
    def _skipping(self) -> Iterator[Callable[[int], None]]:
        """The blocks that are done give the last one's outputs instead of running."""
        now = [0]
        modules = [self.model.get_submodule(path) for path in self.done]
        device = self._device()

        def give(*_args: Any, **_kwargs: Any) -> Any:
            return _to(self.outputs[now[0]], device)

        own = [vars(module).get("forward") for module in modules]  # accelerate's, where the model is spread out
        for module in modules:
            module.forward = give
        try:
            yield lambda number: now.__setitem__(0, number)
        finally:
            for module, before in zip(modules, own, strict=True):
                del module.forward
                if before is not None:
                    module.forward = before

    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


@contextmanager
def _watching(layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: see(path, args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_model(
    runner: Runner, layers: Mapping[str, nn.Linear], branch_of: Callable[[str], str]
) -> dict[str, Statistics]:
    """Mean squares of the inputs of all `layers` at once, the model run to its end."""
    found: dict[str, Statistics] = {}

    def see(path: str, x: Tensor) -> None:
        own = found.setdefault(path, Statistics(False, runner.equal))
        for kind, rows in runner.tokens.split(x.detach(), branch_of(path), path):
            own.add(kind, rows)

    with _watching(layers, see), torch.no_grad(), eval_mode(runner.model):
        for batch in runner.batches:
            runner.tokens.begin(batch)
            runner.model(**_to(batch, runner._device()), **runner.extra)
    return {path: own for path, own in found.items() if own.tokens}


def _negated(output: Any) -> Any:
    if isinstance(output, Tensor):
        return -output
    return (_negated(output[0]), *output[1:])


def _to(value: Any, device: Any) -> Any:
    """Tensors inside tuples, lists and dicts (model outputs too) on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) and type(value) is not dict:
        return type(value)(**{k: _to(v, device) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    return value
