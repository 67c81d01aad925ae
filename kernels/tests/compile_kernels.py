"""Compiles kernels for an H100 with no GPU at hand, and prints a JSON object for each: `test_compiles` runs this.

The launchers are called with CPU tensors; each launch is caught and its arguments say what to compile. Run it without
TRITON_INTERPRET, which makes other objects of the kernels. Arguments: a dtype, and `variants` (every optional argument)
or `largest` (the greatest tiles; with tuning, every configuration that is not pruned).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from lean_kernels.ref.sparse24 import pack
from lean_kernels.ref.sparse_lora import pack_mask
from lean_kernels.triton import cosine, linear_ce, loki, meo, mod, sparse24, sparse_lora

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8",
}  # fmt: skip


def compile_launch(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, aligned = {}, {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # triton makes a constant of every 1
            signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        # as triton's launcher does: aligned loads are what is copied to shared memory ahead of time
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if signature[parameter.name] != "constexpr" and isinstance(number, int) and number % 16 == 0:
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
    chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    built = compile(ASTSource(kernel, signature, constants, aligned), target=H100, options=chosen)
    module = kernel.fn.__module__.rpartition(".")[2]
    found = {"module": module, "kernel": kernel.fn.__name__, "shared": built.metadata.shared, **chosen}
    found["grid"] = grid(options) if callable(grid) else grid
    sizes = {name: options[name] for name in ("BM", "BN", "BK") if name in options}
    print(json.dumps({**found, **sizes, "spilled": spilled(built.asm["cubin"])}), flush=True)


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's stack: what registers do not hold lies in memory."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file], check=True, capture_output=True, text=True
        )
    return int(re.findall(r"STACK:(\d+)", usage.stdout)[0])


def compile_configurations(tuner: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    tuner.nargs = dict(zip(tuner.arg_names, args))
    for configuration in tuner.prune_configs(options):
        compile_launch(tuner.fn, *args, grid=grid, **options, **configuration.all_kwargs())


def launch_variants(dtype: torch.dtype) -> None:
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
    launch_linear_ce(dtype, sizes=((200, 512, 3000), (1, 1, 1)))
    launch_loki(dtype)


def launch_linear_ce(dtype: torch.dtype, sizes: tuple[tuple[int, int, int], ...]) -> None:
    """With all results or one; sizes are T, H, V."""
    for rows, width, vocabulary in sizes:
        h, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
        for all_of_it, bias in ((False, None), (True, weight[:, 0].contiguous())):
            asked = dict.fromkeys(("entropy", "rank", "argmax"), all_of_it)
            linear_ce.linear_ce(
                h, weight, torch.zeros(rows).long(), bias, ignore_index=-100, vocab_start=int(rows == 1),
                softcap=30.0 if all_of_it else None, logit_scale=0.5, **asked,
            )  # fmt: skip


def launch_loki(dtype: torch.dtype) -> None:
    """Sets in one program and in many, shared and of each head, with every optional argument and with none."""
    for tokens, group, width in ((4096, 4, 128), (32768, 8, 256), (20000, 1, 80)):
        q, cache = torch.zeros(2, 2 * group, 2, width, dtype=dtype), torch.zeros(2, 2, tokens, width, dtype=dtype)
        rows = torch.full((2,), tokens, dtype=torch.int32)
        table = torch.zeros(2, tokens // 32, dtype=torch.int32)
        pages = torch.zeros(5, 2, 32, width, dtype=dtype)
        rule: dict[str, Any] = {"d": 32, "scale": 0.1, "return_lse": True}
        bare: dict[str, Any] = {
            "sink": 0,
            "recent": 0,
            "start": None,
            "mask": None,
            "softcap": None,
            "block_table": None,
        }
        for select, reduce, block in (("group", "softmax_mean", 1), ("group", "max", 32), ("head", "max", 1)):
            kind = {"select": select, "reduce": reduce, "block": block}
            loki.loki_decode(q, cache, cache, rows, topk=tokens // 4, **kind, **bare, **rule)
            more = {"sink": 2, "recent": 9, "start": rows, "softcap": 30.0, "block_table": table}
            loki.loki_decode(q, pages, pages, rows, topk=rows, **kind, **more, mask=None, **rule)
            if group != 4:
                continue
            more["mask"] = torch.ones(2, 1, 2, tokens, dtype=torch.bool)
            loki.loki_decode(q, cache, cache, rows, topk=rows, **kind, **{**more, "block_table": None}, **rule)
            one = {**bare, "sink": 1, "recent": 1}  # a size of 1 becomes a constant
            loki.loki_decode(q[:1, :1, :1], cache[:1, :1], cache[:1, :1], rows[:1], topk=1, **kind, **one, **rule)
            loki.loki_decode(q[:1, :1, :1], cache[:1, :1, :1], cache[:1, :1, :1], rows, topk=1, **kind, **bare, **rule)


def launch_largest(dtype: torch.dtype) -> None:
    """Every kernel that multiplies, with the greatest tiles and, of what costs registers, everything."""
    streams = torch.zeros(128, 2, 4096, dtype=dtype)
    cosine.cosine_stream(streams[0], streams[1], None)
    cosine.cosine_gram(streams, None)
    x, w = torch.zeros(2, 200, 512, dtype=dtype), torch.zeros(8, 512, 256, dtype=dtype)
    for length, experts in ((16, 2), (16, meo.MAX_FUSED), (64, 2), (96, 2)):
        idx, gates = torch.zeros(2, experts, dtype=torch.int64), torch.zeros(2, experts)
        meo.merged_matmul(x[:, :length], w, idx, gates, x[:, 0, :256])
    meo.merged_matmul_backward(x, w, idx, gates, x[:, :, :256], True, True)
    many, idx, gates = (t[:1, :2].expand(70000, *t[:1, :2].shape[1:]) for t in (x, idx, gates))
    meo.merged_matmul(many[:, :1], w, idx, gates, None)
    meo.merged_matmul_backward(many, w, idx, gates, many[:, :, :256], False, True)
    meo.merge_experts(w[:, :1, :1], idx, gates)
    a, b, bits = w[0, :128], w[1, :256, :128], pack_mask(torch.ones(256, 256, dtype=torch.bool))
    rows, dense = x[0, :, :256], w[0, :256]
    for length in (16, 64, 200):
        sparse_lora.sparse_lora_matmul(rows[:length], dense, a, b, bits, 0.5, dense[0])
        sparse_lora.sparse_lora_backward(rows[:length], rows[:length], dense, a, b, bits, 0.5, True, True)
    for length in (16, sparse24.SMALL):
        sparse24.matmul_24(rows[:length], *pack(dense), dense[0])
    launch_linear_ce(dtype, sizes=((200, 512, 3000),))
    for group, width in ((4, 128), (8, 256), (32, 128)):
        q, cache = torch.zeros(2, 2 * group, 1, width, dtype=dtype), torch.zeros(2, 2, 20000, width, dtype=dtype)
        lens = torch.full((2,), 20000, dtype=torch.int32)
        loki.loki_decode(
            q, cache, cache, lens, d=width, topk=9999, scale=0.1, select="group", reduce="softmax_mean", sink=2,
            recent=9, block=1, block_table=None, start=lens, softcap=30.0, return_lse=True, mask=None,
        )  # fmt: skip


if __name__ == "__main__":
    JITFunction.run = compile_launch  # type: ignore[method-assign]
    Autotuner.run = compile_configurations
    {"variants": launch_variants, "largest": launch_largest}[sys.argv[2]](getattr(torch, sys.argv[1]))
