"""Triton kernels only. Imported when first used, never by `import lean_kernels`."""
