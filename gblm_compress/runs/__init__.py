"""What a user asks for as one run: the recipe, its checks, stages, comparison, gates and report."""
