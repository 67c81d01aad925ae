"""`python -m lean_kernels.bench OP [--shapes small|h200] [--dtype D] [--json FILE] [--check FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from .harness import Bench, BusyMachine, line, slower, write

NOT_OPERATIONS = {"__init__", "__main__", "harness"}


def operations() -> list[str]:
    """The operations that have a benchmark: the other files of this folder."""
    return sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - NOT_OPERATIONS)


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    build = argparse.ArgumentParser(prog="python -m lean_kernels.bench", description="Measure one operation.")
    build.add_argument("op", choices=operations())
    build.add_argument("--shapes", choices=["small", "h200"], default="h200" if gpu else "small")
    build.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16" if gpu else "float32")
    build.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    build.add_argument("--backend", choices=["auto", "torch", "triton"], default="auto")
    build.add_argument("--rounds", type=int, default=9, help="runs of each candidate on a CPU")
    build.add_argument("--json", type=Path, help="append the rows to this file, one object a line")
    build.add_argument("--check", type=Path, help="fail where a row is over 10 %% slower than the one stored here")
    build.add_argument("--force", action="store_true", help="measure although the machine is busy")
    return build


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 slower than stored or too busy to measure, 2 wrong request."""
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda needs a CUDA device; there is none here, use --device cpu")
    if options.rounds < 1:
        parser().error(f"--rounds is {options.rounds}; it must be 1 or more")
    if options.check and not options.check.is_file():
        parser().error(f"--check {options.check}: there is no such file")
    bench = Bench(
        shapes=options.shapes, dtype=getattr(torch, options.dtype), device=options.device,
        backend=options.backend, rounds=options.rounds, force=options.force,
    )  # fmt: skip
    found = bench.ceilings
    print(f"ceilings: copy {found.copy / 1e9:.1f} GB/s, matmul {found.matmul / 1e12:.3f} TFLOP/s", flush=True)
    try:
        with torch.no_grad():
            getattr(import_module(f".{options.op}", __package__), f"bench_{options.op}")(bench)
    except BusyMachine as busy:
        print(busy, file=sys.stderr)
        return 1
    for row in bench.rows:
        print(line(row))
    lost = slower(bench.rows, options.check) if options.check else []
    if options.json:
        write(bench.rows, options.json)
    for text in lost:
        print(f"slower: {text}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
