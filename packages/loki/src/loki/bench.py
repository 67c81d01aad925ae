"""What sparse decoding buys on this machine: attention alone, whole decoding steps, cache bytes, and calibration.

Times are ratios of medians taken in turn in one process. The base is always the quickest dense form in torch that was
found: scaled_dot_product_attention in two layouts, matmul and softmax, and on a CPU our own loop over heads. What our
kernel takes when it reads everything is shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from model_hooks.kv import kv_bytes
from paper_tables.timing import Timed, interleaved

from .basis import Basis, shape_of
from .calibration import calibrate
from .sessions import session

HEADS, KV_HEADS, WIDTH = 32, 8, 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 4  # tokens decoded in one timing


def run(
    contexts: Sequence[int], shares: Sequence[float], *, layers: int = 4, rounds: int = 9, dtype: str = "float32"
) -> dict[str, Any]:
    """All of it for caches of `contexts` tokens of which `shares` are read."""
    from paper_tables.machine import describe, machine

    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not accepted; give {', '.join(DTYPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = probe_model(layers, max(contexts) + 64).to(device, DTYPES[dtype])
    basis = random_basis(model)
    return {
        "machine": describe(machine()), "dtype": dtype, "heads": f"{HEADS} / {KV_HEADS} of {WIDTH}",
        "attention": [attention(s, k, DTYPES[dtype], device, rounds) for s in contexts for k in shares],
        "decoding": [row for s in contexts for row in decoding(model, basis, s, shares, rounds)],
        "cache": cache_bytes(model, basis), "calibration": calibration(rounds),
    }  # fmt: skip


def probe_model(layers: int, context: int) -> Any:
    """A Llama with random weights and the attention shape of an 8B model; its MLPs and vocabulary are small."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH, max_position_embeddings=context,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_basis(model: Any) -> Basis:
    """Orthogonal directions by lot: time does not depend on which they are."""
    layers, heads, width = shape_of(model)
    square = torch.randn(layers, heads, width, width, generator=torch.Generator().manual_seed(0))
    values = torch.linspace(2, 1, width).expand(layers, heads, width).contiguous()
    return Basis(
        torch.linalg.qr(square).Q.contiguous(), values, torch.zeros(layers, heads, width), tuple(range(layers))
    )


def attention(
    tokens: int, share: float, dtype: torch.dtype, device: str, rounds: int, heads: Sequence[int] | None = None
) -> dict[str, Any]:
    """Attention alone for one new token: `loki_decode`, d = width / 4, beside the dense forms.

    `heads` are query and KV heads, `HEADS` and `KV_HEADS` unless given.

    Before each, untimed, memory as of a model's weights is read, so that no processor's cache still holds the keys.
    """
    from lean_kernels import loki_decode
    from lean_kernels.bench.harness import reader
    from lean_kernels.bench.loki import dense_forms

    lot = torch.Generator(device=device).manual_seed(0)

    def random(count: int, n: int) -> Tensor:
        return torch.randn(1, count, n, WIDTH, generator=lot, device=device).to(dtype)

    query_heads, kv_heads = heads or (HEADS, KV_HEADS)
    q, k, v = random(query_heads, 1), random(kv_heads, tokens), random(kv_heads, tokens)
    lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    rule = {"d": WIDTH // 4, "scale": WIDTH**-0.5}
    read = {"loki": max(1, int(share * tokens)), "all": tokens}
    calls: dict[str, Callable[[], Any]] = {
        name: partial(loki_decode, q, k, v, lens, topk=topk, **rule) for name, topk in read.items()
    }
    calls |= dense_forms(q, k, v, lens)
    flush = reader(device)
    with torch.no_grad():
        variants = {name: after(flush, call) for name, call in calls.items()}
        timed = interleaved(variants, rounds=rounds, base="loki")
    best = min((name for name in calls if name not in ("loki", "all")), key=lambda name: timed[name].seconds)
    return {
        "tokens": tokens, "read": share, "ms": 1e3 * timed["loki"].seconds, "best_dense": best,
        "dense_ms": 1e3 * timed[best].seconds, "speedup": timed[best].seconds / timed["loki"].seconds,
        "over_reading_all": timed["all"].seconds / timed["loki"].seconds,
    }  # fmt: skip


def after(setup: Callable[[], Any], call: Callable[[], Any]) -> Timed:
    """`call`, timed after an untimed `setup`."""
    return Timed(lambda _: call(), setup)


def decoding(model: Any, basis: Basis, tokens: int, shares: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    """Whole decoding steps after `tokens` cached tokens: transformers' sdpa, Loki's cache read whole, `auto`, shares.

    The caches hold random numbers in place of a prompt's keys, whose time is not what is measured.
    """
    timed = {"sdpa": _steps(model, tokens, None)}
    settings: dict[str, dict[str, Any]] = {"loki, all": {"method": "full"}, "loki, auto": {}}
    settings |= {f"loki, {share:g}": {"k": share, "min_length": 0} for share in shares}
    for name, changes in settings.items():
        timed[name] = _steps(model, tokens, partial(session, model, basis, **changes))
    found = interleaved(timed, rounds=rounds, warmup=1)
    return [
        {"tokens": tokens, "attention": name, "ms_a_token": 1e3 * t.seconds / STEPS, "over_sdpa": t.speedup}
        for name, t in found.items()
    ]


def _steps(model: Any, tokens: int, enabled: Callable[[], Any] | None) -> Timed:
    """`STEPS` steps of greedy decoding within `enabled()`; its cache is made anew, untimed, for each round."""
    context: list[Any] = []

    def setup() -> Any:
        if enabled is not None:
            context.append(enabled())
            context[-1].__enter__()
        return filled_cache(model, tokens)

    @torch.no_grad()
    def steps(cache: Any) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        for _ in range(STEPS):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        if enabled is not None:
            context.pop().__exit__(None, None, None)

    return Timed(steps, setup)


def filled_cache(model: Any, tokens: int) -> Any:
    """The cache that the model would make as it is now, with `tokens` random tokens in every layer."""
    from transformers import DynamicCache

    from .cache import LokiCache

    cache = LokiCache(model) if "_loki_runtime" in model.__dict__ else DynamicCache(config=model.config)
    layers, heads, width = shape_of(model)
    lot = torch.Generator(device=model.device).manual_seed(0)
    for layer in range(layers):
        k, v = torch.randn(2, 1, heads, tokens, width, generator=lot, device=model.device).to(model.dtype)
        cache.update(k, v, layer)
    return cache


@torch.no_grad()
def cache_bytes(model: Any, basis: Basis, tokens: int = 512) -> dict[str, float]:
    """Bytes of keys and values of `tokens` tokens over those of transformers' cache, room for more tokens left out."""
    plain = kv_bytes(filled_cache(model, tokens))
    with session(model, basis):
        turned = kv_bytes(filled_cache(model, tokens))
    return {"bytes_over_dense": turned / plain}


def calibration(rounds: int) -> dict[str, float]:
    """Time of calibration over plain forwards of the same text, and its peak memory beyond theirs, in MB."""
    from paper_tables.memory import peak_tensor_bytes
    from paper_tables.probe import probe_model, token_ids

    model = probe_model(4, 256)
    ids = token_ids(model, 8, 256)

    @torch.no_grad()
    def forwards() -> None:
        for batch in ids.split(4):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)

    timed = interleaved({"plain": forwards, "calibrate": lambda: calibrate(model, ids)}, rounds=rounds, warmup=1)
    peaks = [peak_tensor_bytes(lambda n=n: calibrate(model, ids[:n])) for n in (4, 8)]  # type: ignore[misc]
    return {
        "time_over_forwards": 1 / timed["calibrate"].speedup, "peak_twice_the_text": peaks[1] / peaks[0],
        "extra_mb": (peaks[1] - peak_tensor_bytes(forwards)) / 1e6,
    }  # fmt: skip
