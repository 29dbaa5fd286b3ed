"""The mathematics of pruning.

Saliencies, patterns, allocations, fits, quantisers, and the registries that list them. Tensors in, tensors out; no
model, no I/O. Importing a module with a registry loads no torch: settings are built from them.
"""
