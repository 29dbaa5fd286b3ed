"""A run: the recipe, its checks, stages, comparison, gates and report."""
