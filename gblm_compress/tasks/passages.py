"""Passages: real sentences and paragraphs as padded samples of a model that reads texts whole.

Importing this module loads no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gblm_compress.errors import DataError, ModelError
from gblm_compress.storage.paths import local
from gblm_compress.tasks import tables, text
from gblm_compress.tasks.tables import Row
from gblm_compress.tasks.task import Sample, Task
from gblm_compress.tasks.windows import check_ids, vocabulary_of

FEWEST_WORDS = 5
"""Words in a passage of a plain text; shorter lines are headings, captions and rests."""

_C4_DOCUMENTS = 20_000
_MARKUP = re.compile(r"\s*(</?doc\b.*|=.*=)\s*")  # lines of Wikipedia extracts and of WikiText that are no text
_OFFSET = ("roberta", "camembert", "mpnet", "longformer", "data2vec-text")
"""Models whose positions begin behind that of padding."""


class PassageTask(Task):
    """A task whose samples are texts of several lengths: tokenized whole, cut if they are too long, padded behind."""

    sample = "text"
    reads = tables.READS

    def check_processor(self, processor: Any) -> None:
        super().check_processor(processor)
        if processor.pad_token_id is None:
            raise ModelError(
                "its tokenizer has no pad token, and texts of several lengths are padded; set one (for example "
                "tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer into the folder"
            )

    def data_files(self, dataset: str) -> list[Path]:
        return tables.data_files(dataset)

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        import torch

        length = min(length, positions_of(config))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary_of(config), (batch, length), generator=generator)
        return self._with_types({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config)

    def example(self, config: Any) -> Sample:
        """A mask of ones alone would let the tracer drop `attention_mask` from the graph."""
        import torch

        ids = torch.arange(12).reshape(2, 6) % vocabulary_of(config)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        return self._with_types({"input_ids": ids, "attention_mask": mask}, config)

    def _with_types(self, sample: Sample, config: Any) -> Sample:
        import torch

        types = {"token_type_ids": torch.zeros_like(sample["input_ids"])} if has_types(config) else {}
        return {**sample, **types}


def read(source: str, role: text.Role) -> list[Row]:
    """The passages of a text, or the rows of a table.

    Documents without labels, scores and pairs are cut into their lines, of which those that are no sentence are left
    out.

    Raises:
        DataError: the source cannot be read, or holds no passage.
    """
    suffix = local(source).suffix
    if source == "demo":
        lines = text.demo_paragraphs(role)
    elif source == "c4" and role == "calibration":
        lines = [line for document in islice(text.c4_documents(), _C4_DOCUMENTS) for line in _lines(document["text"])]
    elif source in ("wikitext2", "c4") or (suffix in text.FILES and suffix not in (".jsonl", ".parquet")):
        lines = _lines(text.load_text(source, role))
    else:
        found = tables.rows(source, role)
        if any(len(row.texts) > 1 or row.label is not None or row.score is not None for row in found):
            return found
        lines = [line for row in found for line in _lines(row.texts[0])]
    passages = [Row((line,)) for line in dict.fromkeys(lines) if len(line.split()) >= FEWEST_WORDS]
    if not passages:
        raise DataError(f"dataset {source!r} holds no passage of {FEWEST_WORDS} words or more; give a longer text")
    return passages


def drawn(rows: Sequence[Row], count: int, seed: int, source: str) -> list[Row]:
    """`count` different rows at random.

    Raises:
        DataError: there are fewer.
    """
    if len(rows) < count:
        raise DataError(
            f"dataset {source!r} gives {len(rows)} texts, but {count} samples are asked for; give more text or fewer "
            "--samples"
        )
    return random.Random(seed).sample(list(rows), count)


def encode(processor: Any, config: Any, rows: Sequence[Row], length: int, pad: bool) -> list[Sample]:
    """The rows as samples [1, tokens].

    Args:
        length: tokens in each at most; never more than the model and its tokenizer take.
        pad: whether all get the shape of the longest.

    Raises:
        DataError: some have one text and others two.
        ModelError: the tokenizer gives ids beyond the model's vocabulary.
    """
    if other := next((row for row in rows if len(row.texts) != len(rows[0].texts)), None):
        raise DataError(
            f"{other.where} has {len(other.texts)} texts, and {rows[0].where} has {len(rows[0].texts)}; give all rows "
            "as many"
        )
    longest = min(length, processor.model_max_length, positions_of(config))
    kept = ["input_ids", "attention_mask", *(["token_type_ids"] if has_types(config) else [])]
    texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    options = {
        "truncation": True,
        "max_length": longest,
        "padding_side": "right",
        "return_tensors": "pt",
        "return_token_type_ids": has_types(config),
    }
    if pad:
        together = processor(*texts, padding=True, **options)
        samples: list[Sample] = [{name: together[name][i : i + 1] for name in kept} for i in range(len(rows))]
    else:
        alone = [processor(*row.texts, **options) for row in rows]
        samples = [{name: sample[name] for name in kept} for sample in alone]
    for sample in samples:
        check_ids(sample["input_ids"], vocabulary_of(config))
    return samples


def has_types(config: Any) -> bool:
    """Whether the model tells the two texts of a sample by `token_type_ids`."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def positions_of(config: Any) -> int:
    """How many tokens the model takes at most."""
    positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    behind = any(part in config.model_type for part in _OFFSET)
    return positions - (config.pad_token_id + 1 if behind else 0)


def _lines(document: str) -> list[str]:
    return [" ".join(line.split()) for line in document.splitlines() if not _MARKUP.fullmatch(line)]
