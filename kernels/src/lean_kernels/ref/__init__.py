"""The operations in plain torch, for any float dtype, float64 too: the CPU path and the oracle of the kernels."""
