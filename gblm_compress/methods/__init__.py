"""The mathematics of pruning: tensors in, tensors out. Importing a registry loads no torch, as settings need it."""
