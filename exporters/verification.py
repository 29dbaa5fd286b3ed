"""What exporters run a reopened model on, before they put it in place."""

from typing import Any

from gblm_compress.tasks import task_of
from gblm_compress.tasks.task import Sample

TOKENS = 64


def real_sample(model: Any, tokenizer: Any) -> Sample:
    """A sample of the demo's text, of `TOKENS` tokens.

    Raises:
        ModelError: the tokenizer gives ids beyond the model's vocabulary.
    """
    return task_of(type(model)).calibration(tokenizer, model.config, "demo", samples=1, length=TOKENS, seed=0)[0]
