"""Kernels that exploit the zeros: `cpu` calls the compiled `bitmask.c`."""
