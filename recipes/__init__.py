"""The recipes that ship with gblm-compress; `gblm_compress.runs.recipe` finds them by name."""
