"""What exporters run a reopened model on, before they put it in place."""

from typing import Any

from torch import Tensor

from gblm_compress.calibration import text

TOKENS = 64


def real_text(tokenizer: Any, vocabulary: int) -> Tensor:
    """The first tokens of the demo's evaluation text, [1, TOKENS].

    Raises:
        ModelError: the tokenizer gives ids beyond the model's vocabulary.
    """
    return text.tokenize(tokenizer, vocabulary, text.load_text("demo", "evaluation")[:4000])[:TOKENS].unsqueeze(0)
