"""The mathematics of pruning.

Saliencies, patterns, allocations, refinements, updates. Tensors in, tensors out; no model, no I/O.
"""
