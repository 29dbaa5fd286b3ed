"""The mathematics of pruning: tensors in, tensors out; no model, no I/O.

Importing a module with a registry loads no torch: settings are built from them.
"""
