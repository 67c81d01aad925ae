"""One small forward pass, watched from inside: which module read what, wrote what, and who filled the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedArchitectureError

TOKENS = 6


@dataclass(eq=False)
class Call:
    """One call of a direct child. Tensors are kept twice: the object (who handed it on) and its value at that moment,
    because some models add in place."""

    name: str
    module: nn.Module
    input: Tensor
    input_value: Tensor
    output: Tensor
    output_value: Tensor
    returns: int  # 0: a tensor; n: a tuple of n

    @property
    def elementwise(self) -> bool:
        """Norms, dropouts, identities: shape kept and no weight matrix."""
        return self.output.shape == self.input.shape and all(p.dim() < 2 for p in self.module.parameters())


@dataclass
class BlockTrace:
    """What one decoder block (or the decoder itself) did during the pass."""

    calls: list[Call] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)  # children during which the KV cache was written
    x: Tensor | None = None  # [1, T, H] block input, as object
    x_value: Tensor | None = None
    y: Tensor | None = None
    returns: int = 0


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a call's arguments: the first floating-point tensor."""
    candidates = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((c for c in candidates if isinstance(c, Tensor) and c.is_floating_point()), None)


def unpack(output: Any) -> tuple[Tensor | None, int]:
    if isinstance(output, Tensor):
        return output, 0
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], len(output)
    return None, 0


class Recorder:
    """Hooks on the direct children of some modules; `traces[i]` tells what module `i` did."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.traces = [BlockTrace() for _ in modules]
        self.active: list[tuple[int, str]] = []

    def cache_written(self) -> None:
        for index, name in self.active:
            self.traces[index].writers.append(name)

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.callback(
                    module.register_forward_pre_hook(self._block_input(index), with_kwargs=True, prepend=True).remove
                )
                stack.callback(module.register_forward_hook(self._block_output(index)).remove)
                for name, child in module.named_children():
                    before = child.register_forward_pre_hook(self._enter(index, name), with_kwargs=True)
                    after = child.register_forward_hook(self._leave(index, name), with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _block_input(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            trace = self.traces[index]
            trace.x, trace.x_value = x, None if x is None else x.clone()

        return hook

    def _block_output(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y, returns = unpack(output)
            self.traces[index].y, self.traces[index].returns = y, returns

        return hook

    def _enter(self, index: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.active.append((index, name))
            x = first_tensor(args, kwargs)
            module.__dict__["_traced_input"] = None if x is None else (x, x.clone())

        return hook

    def _leave(self, index: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.active.remove((index, name))
            seen = module.__dict__.pop("_traced_input", None)
            y, returns = unpack(output)
            if seen is not None and y is not None:
                self.traces[index].calls.append(Call(name, module, seen[0], seen[1], y, y.clone(), returns))

        return hook


def small_input(model: Any) -> Tensor:
    """A few token ids, [1, TOKENS], on the device where the embeddings run."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None) or embeddings.weight.device
    if torch.device(device).type == "meta":
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no weights (meta device): load it first")
    return (torch.arange(TOKENS, device=device) * 7 + 3).remainder(embeddings.weight.shape[0]).unsqueeze(0)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode that it was in (a frozen tower may be in another)."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def trace(model: Any, modules: list[nn.Module]) -> list[BlockTrace]:
    """Run `TOKENS` tokens through `model` (in eval mode, with a KV cache) and record what each of `modules` did."""
    from transformers import DynamicCache

    ids = small_input(model)
    recorder = Recorder(modules)
    cache: Any = DynamicCache(config=model.config)
    update = cache.update

    def recording_update(*args: Any, **kwargs: Any) -> Any:
        recorder.cache_written()
        return update(*args, **kwargs)

    cache.update = recording_update
    try:
        with eval_mode(model), recorder.recording():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is not supported: a forward pass of text with an ordinary KV cache failed: "
            f"{reason}"
        ) from error
    finally:
        del cache.update  # cache and recorder would hold each other, and all that was recorded, until a collection
    return recorder.traces
