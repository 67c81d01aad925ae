"""Compiles kernels for an H100 with no GPU at hand, and prints a JSON object for each: `test_compiles` runs this.

The launchers are called with CPU tensors; each launch is caught and its arguments say what to compile. Run it without
TRITON_INTERPRET, which makes other objects of the kernels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from lean_kernels.ref.sparse24 import pack
from lean_kernels.ref.sparse_lora import pack_mask
from lean_kernels.triton import cosine, meo, mod, sparse24, sparse_lora

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8",
}  # fmt: skip


def compile_launch(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # triton makes a constant of every 1
            signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    built = compile(ASTSource(kernel, signature, constants), target=H100, options=chosen)
    module = kernel.fn.__module__.rpartition(".")[2]
    found = {"module": module, "kernel": kernel.fn.__name__, "shared": built.metadata.shared, "ptx": "ptx" in built.asm}
    print(json.dumps(found), flush=True)


def compile_configurations(tuner: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    for configuration in tuner.configs:
        compile_launch(tuner.fn, *args, grid=grid, **options, **configuration.all_kwargs())


def launch_all(dtype: torch.dtype) -> None:
    """Every launcher, with the optional arguments and without, in the sizes that models have."""
    x, y = torch.zeros(2, 9, 512, dtype=dtype), torch.zeros(2, 4, 512, dtype=dtype)
    idx, gate, counts = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.ones(2, dtype=torch.int64)
    mask = torch.ones(9, dtype=torch.bool)
    cosine.cosine_stream(x[0], x[1], mask)
    cosine.cosine_adjacent(x, mask)
    cosine.cosine_adjacent(torch.zeros(3, 1, 8192, dtype=dtype), None)
    cosine.cosine_gram(torch.zeros(81, 1, 64, dtype=dtype), torch.ones(1, dtype=torch.bool))
    mod.token_gather(x, idx, counts, None, 0.0)
    mod.token_gather(x, idx.int(), None, x[0, 0], 1e-6)
    mod.token_scatter_add_(x, y, idx, gate, counts)
    mod.token_scatter_add(x, y, idx, gate, counts)
    mod.token_scatter(y, idx, None, 9)
    mod.token_scatter_add_backward(x, y, idx, gate, counts)
    w, experts, gates = torch.zeros(4, 512, 256, dtype=dtype), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    grad = torch.zeros(2, 100, 256, dtype=dtype)
    meo.merged_matmul(torch.zeros(2, 1, 512, dtype=dtype), w, experts, gates, torch.zeros(2, 256, dtype=dtype))
    meo.merged_matmul(grad, w.mT, experts, gates, None)
    meo.merge_experts(w, experts, gates)
    meo.merged_matmul_backward(torch.zeros(2, 100, 512, dtype=dtype), w, experts, gates, grad, True, True)
    for rank in (8, 128):
        a, b = torch.zeros(rank, 512, dtype=dtype), torch.zeros(256, rank, dtype=dtype)
        bits = pack_mask(torch.ones(256, 512, dtype=torch.bool))
        rows, dense, down = (torch.zeros(*size, dtype=dtype) for size in ((200, 512), (256, 512), (200, 256)))
        sparse_lora.sparse_lora_matmul(rows, dense, a, b, bits, 0.5, dense[:, 0])
        sparse_lora.sparse_lora_backward(down, rows, dense, a, b, bits, 0.5, True, True)
    sparse24.matmul_24(rows[:16], *pack(dense), dense[:, 0])


if __name__ == "__main__":
    import sys

    JITFunction.run = compile_launch  # type: ignore[method-assign]
    Autotuner.run = compile_configurations
    launch_all(getattr(torch, sys.argv[1]))
