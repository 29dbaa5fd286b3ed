"""Windows of tokens, drawn from a text or cut out of it. Importing this module loads no torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import DataError, ModelError, first_line
from gblm_compress.tasks import text

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 100_000
"""How many documents of C4 may be too short in a row before the search for a long one ends."""

CHOICE = 16
"""Times the tokens of all windows that are read of a hub dataset, which may be without end, to draw them from."""


def calibration_windows(
    tokenizer: Any, vocabulary: int, source: str, samples: int, length: int, seed: int
) -> list[Tensor]:
    """Windows as the reference scripts draw them: of documents of one shard for `c4`, of the first documents of a hub
    dataset, else from the whole text.

    Args:
        tokenizer, vocabulary: as for `tokenize`.
        source: SRC, as `text` reads it.
        samples: how many windows.
        length: tokens in each.
        seed: of `random.Random`.

    Returns:
        `samples` tensors [1, length].

    Raises:
        DataError: the source does not exist, cannot be read, or holds less than a window.
        ModelError: as `tokenize`.
    """
    if source == "c4":
        return document_windows(tokenizer, vocabulary, text.c4_documents(), samples, length, seed, source)
    ids = tokenize(tokenizer, vocabulary, text.load_text(source, "calibration", CHOICE * samples * length))
    return random_windows(ids, samples, length, seed, source)


def tokenize(tokenizer: Any, vocabulary: int, text: str) -> Tensor:
    """The text tokenized whole, as the reference does: token ids [tokens], int64.

    Args:
        vocabulary: how many tokens the model has embeddings for.

    Raises:
        ModelError: the tokenizer gives an id that is not among them.
    """
    import torch

    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    check_ids(ids, vocabulary)
    return ids


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises:
    ModelError: an id is not among those that the model has embeddings for.
    """
    if ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, but the model has embeddings for {vocabulary} tokens, 0 to "
            f"{vocabulary - 1}; give the tokenizer that belongs to the model, or resize its embeddings "
            "(`model.resize_token_embeddings(len(tokenizer))`)"
        )


def vocabulary_of(config: Any) -> int:
    """How many tokens a model has embeddings for, by its config as transformers has it.

    Raises:
        ModelError: the config names no vocabulary.
    """
    try:
        return int(config.get_text_config().vocab_size)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"the model's config names no vocabulary ({first_line(error)})") from error


def random_windows(ids: Tensor, samples: int, length: int, seed: int, source: str) -> list[Tensor]:
    """Calibration windows as the reference draws them: `start = randint(0, tokens - length - 1)` for each.

    Args:
        ids: token ids [tokens].
        samples: how many windows.
        length: tokens in each.
        seed: of `random.Random`.
        source: named in the error.

    Returns:
        `samples` tensors [1, length].

    Raises:
        DataError: the text is shorter than one window.
    """
    if len(ids) < length + 1:
        raise DataError(
            f"dataset {source!r} gives {len(ids)} tokens, but one window needs {length + 1}; "
            "give a longer text or a smaller --sequence-length"
        )
    generator = random.Random(seed)
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def document_windows(
    tokenizer: Any,
    vocabulary: int,
    documents: Sequence[Mapping[str, str]],
    samples: int,
    length: int,
    seed: int,
    source: str,
) -> list[Tensor]:
    """Windows within single documents: `randint(0, documents - 1)` until one is longer than `length`, and in that one
    `start = randint(0, tokens - length - 1)`. The reference draws from C4 so.

    Args:
        tokenizer, vocabulary: as for `tokenize`.
        documents: each with a key `text`.
        samples, length, seed, source: as for `random_windows`.

    Returns:
        `samples` tensors [1, length].

    Raises:
        DataError: no document that is long enough is found.
        ModelError: as `tokenize`.
    """
    generator = random.Random(seed)
    windows = []
    for _ in range(samples):
        for _ in range(DRAWS):
            ids = tokenize(tokenizer, vocabulary, documents[generator.randint(0, len(documents) - 1)]["text"])
            if len(ids) > length:
                break
        else:
            raise DataError(
                f"dataset {source!r}: none of {DRAWS:,} documents drawn has more than {length} tokens; give a smaller "
                "--sequence-length"
            )
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length].unsqueeze(0))
    return windows


def consecutive_windows(ids: Tensor, length: int, limit: int | None, source: str) -> Tensor:
    """Evaluation windows: the text cut into non-overlapping windows, an incomplete last one dropped.

    Args:
        ids: token ids [tokens].
        length: tokens in each window.
        limit: at most this many, from the start; None for all.
        source: named in the error.

    Returns:
        [windows, length].

    Raises:
        DataError: the text is shorter than one window.
    """
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"dataset {source!r} gives {len(ids)} tokens, but one window needs {length}; "
            "give a longer text or a smaller --sequence-length"
        )
    return ids[: count * length].reshape(count, length)[:limit]
