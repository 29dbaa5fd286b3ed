"""Pruning a model.

The walk over its blocks, one block, the fits of the survivors, and what an interrupted run keeps.
"""
