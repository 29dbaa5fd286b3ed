"""Pruning a model: the walk over its blocks, and what an interrupted run keeps."""
