"""The recipes that ship with gblm-compress; `gblm_compress.recipe` finds them by name."""
