"""This machine: its versions and hardware, memory, and what was measured about its kernels."""
