"""Benchmarks of the operations: `python -m lean_kernels.bench OP`."""
