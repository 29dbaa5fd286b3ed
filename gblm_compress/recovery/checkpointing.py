"""Gradient checkpointing: blocks keep their inputs alone, and run again for their gradients (arXiv 1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from gblm_compress.models.architecture import find_blocks


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Run the blocks of a model so for the duration of a `with`.

    transformers' own `gradient_checkpointing_enable` works in training mode alone, in which dropout would be on.
    """
    _, blocks = find_blocks(model)
    try:
        for block in blocks:
            # Nothing is drawn at random in eval mode.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
