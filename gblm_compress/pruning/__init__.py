"""Pruning a model: the walk over its blocks, and the work that an interrupted run keeps."""
