"""Passages: sentences, paragraphs and rows of tables, as padded samples for models that read whole texts.

A csv file without known columns may hold two sentences and a score, as in the STS benchmark.
"""

from __future__ import annotations

import csv
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gblm_compress.errors import DataError, ModelError
from gblm_compress.tasks import text
from gblm_compress.tasks.task import Sample, Samples, Task, with_draws
from gblm_compress.tasks.text import check_ids, padded_ids, vocabulary_of

FEWEST_WORDS = 5  # of a passage; shorter lines are headings, captions and fragments

_FILES = (*text.FILES, ".csv")
_READS = "a .txt, .csv, .jsonl or .parquet file, or a hub dataset"
_TEXTS = (("text", "text_pair"), ("sentence", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
_KNOWN = frozenset(("score", "label", *(name for names in _TEXTS for name in names)))
_NEEDED = "name it 'text' or 'sentence', or two 'sentence1' and 'sentence2'; labels are in 'label', scores in 'score'"
_C4_DOCUMENTS = 20_000
_MARKUP = re.compile(r"\s*(</?doc\b.*|=.*=)\s*")  # markup lines of Wikipedia extracts and WikiText
_OFFSET = ("roberta", "camembert", "mpnet", "longformer", "data2vec-text")  # their positions begin after the padding


@dataclass(frozen=True)
class Row:
    """One text, or two that the model reads together, with a label or a score if there is one."""

    texts: tuple[str, ...]
    label: int | str | None = None  # a class
    score: float | None = None
    where: str = ""  # its name in messages


class PassageTask(Task):
    """A task whose samples are texts of several lengths: tokenized whole, cut if too long, padded at the end."""

    sample = "text"
    reads = _READS
    suffixes = _FILES

    def check_processor(self, processor: Any) -> None:
        super().check_processor(processor)
        if processor.pad_token_id is None:
            raise ModelError(
                "its tokenizer has no pad token, but texts of several lengths need padding; set one (for example "
                "tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer into the folder"
            )

    def rows(self, dataset: str) -> list[Row]:
        """What calibration and training read."""
        return read(dataset, "calibration")

    def samples(self, processor: Any, config: Any, rows: Sequence[Row], length: int, pad: bool) -> Samples:
        return encode(processor, config, rows, length, pad)

    def calibration(self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int) -> Samples:
        chosen = drawn(self.rows(dataset), samples, seed, dataset)
        return with_draws(self.samples(processor, config, chosen, length, pad=True), seed)

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> Samples:
        return encode(processor, config, self.rows(dataset)[: tokens // length], length, pad=False)

    def tokens_of(self, config: Any, length: int) -> int:
        return min(length, positions_of(config))

    def timed(self, config: Any, batch: int, length: int, seed: int) -> Sample:
        import torch

        generator = torch.Generator().manual_seed(seed)
        size = (batch, min(length, positions_of(config)))
        ids = torch.randint(0, vocabulary_of(config), size, generator=generator)
        return _with_types({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config)

    def example(self, config: Any) -> Sample:
        return _with_types(padded_ids(vocabulary_of(config), slice(4, None)), config)


def read(source: str, role: text.Role) -> list[Row]:
    """The rows of a table with pairs, labels or scores; the long enough lines of other data."""
    suffix = Path(source).suffix
    if (source, role) == ("c4", "calibration"):
        documents = islice(text.records(source, role), _C4_DOCUMENTS)
        lines = [line for _, document in documents for line in _lines(document["text"])]
    elif source in text.NAMED or (suffix in text.FILES and suffix not in text.TABLES):
        lines = _lines(text.load_text(source, role))
    else:
        found = table(source, role)
        if any(len(row.texts) > 1 or row.label is not None or row.score is not None for row in found):
            return found
        lines = [line for row in found for line in _lines(row.texts[0])]
    passages = [Row((line,)) for line in dict.fromkeys(lines) if len(line.split()) >= FEWEST_WORDS]
    if not passages:
        raise DataError(f"dataset {source!r} holds no passage of {FEWEST_WORDS} words or more; give a longer text")
    return passages


def drawn(rows: Sequence[Row], count: int, seed: int, source: str) -> list[Row]:
    if len(rows) < count:
        raise DataError(
            f"dataset {source!r} gives {len(rows)} texts, but {count} samples are asked for; give more text or fewer "
            "--samples"
        )
    return random.Random(seed).sample(list(rows), count)


def encode(processor: Any, config: Any, rows: Sequence[Row], length: int, pad: bool) -> list[Sample]:
    """The rows as samples [1, tokens], of at most `length` tokens; `pad` gives all the shape of the longest."""
    if other := next((row for row in rows if len(row.texts) != len(rows[0].texts)), None):
        raise DataError(
            f"{other.where} has {len(other.texts)} texts, but {rows[0].where} has {len(rows[0].texts)}; give all rows "
            "equally many"
        )
    kept = ["input_ids", "attention_mask", *(["token_type_ids"] if _has_types(config) else [])]
    options = {
        "truncation": True,
        "max_length": min(length, processor.model_max_length, positions_of(config)),
        "padding_side": "right",
        "return_tensors": "pt",
        "return_token_type_ids": _has_types(config),
    }
    with text.tokenizing():
        if pad:
            texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
            together = processor(*texts, padding=True, **options)
            samples: list[Sample] = [{name: together[name][i : i + 1] for name in kept} for i in range(len(rows))]
        else:
            alone = [processor(*row.texts, **options) for row in rows]
            samples = [{name: sample[name] for name in kept} for sample in alone]
    for sample in samples:
        check_ids(sample["input_ids"], vocabulary_of(config))
    return samples


def positions_of(config: Any) -> int:
    positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    behind = any(part in config.model_type for part in _OFFSET)
    return positions - (config.pad_token_id + 1 if behind else 0)


def table(source: str, role: text.Role) -> list[Row]:
    """The rows of a csv, jsonl or parquet file or of a hub dataset, without empty ones."""
    text.data_files(source, _READS, _FILES)
    records = _of_csv(source) if Path(source).suffix == ".csv" else text.records(source, role, _KNOWN)
    found = [row for where, columns in records if (row := _row(columns, where)) is not None]
    if not found:
        raise DataError(f"dataset {source!r} holds no text")
    return found


def _of_csv(source: str) -> text.Records:
    head: Sequence[str] | None = None
    with text.reading(source), Path(os.path.expanduser(source)).open(encoding="utf-8-sig", newline="") as file:
        for line in filter(None, lines := csv.reader(file)):
            where = f"dataset {source!r}, line {lines.line_num}"
            if head is None:
                head = [cell.strip().lower() for cell in line]
                if _KNOWN.intersection(head):
                    text.check_columns([name for name in head if name in _KNOWN], where)
                    continue
                if len(line) != 3 or not _is_number(line[2]):
                    raise DataError(f"{where} has no known text column ({_listed(line)}); {_NEEDED}")
                head = ["sentence1", "sentence2", "score"]
            if len(line) != len(head):
                raise DataError(f"{where} has {len(line)} columns, but the first line has {len(head)}")
            yield where, dict(zip(head, line, strict=True))


def _row(columns: Mapping[str, Any], where: str) -> Row | None:
    names = next((names for names in _TEXTS if names[0] in columns), None)
    if names is None:
        raise DataError(f"{where} has no known text column ({_listed(columns)}); {_NEEDED}")
    texts = tuple(value for name in names if (value := columns.get(name)) is not None)
    for value in texts:
        if not isinstance(value, str):
            raise DataError(f"{where}: a text is needed, but {type(value).__name__} was found")
    if not texts or not texts[0].strip():
        return None
    label, score = columns.get("label"), columns.get("score")
    if isinstance(label, float):  # a pair's score in GLUE, or a class in a column with missing ones
        score = label if score is None else score
        label = int(label) if label.is_integer() else None
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, str):
        label = int(label) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", label) else label.strip() or None
    if score is not None and not _is_number(score):
        raise DataError(f"{where}: the score {score!r} is not a number")
    return Row(texts, label, None if score is None else float(score), where)


def _lines(document: str) -> list[str]:
    return [" ".join(line.split()) for line in document.splitlines() if not _MARKUP.fullmatch(line)]


def _listed(columns: Iterable[str]) -> str:
    return f"columns: {', '.join(map(repr, islice(columns, 8))) or 'none'}"


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _has_types(config: Any) -> bool:
    """Whether the model tells the two texts of a sample apart by `token_type_ids`."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def _with_types(sample: dict[str, Any], config: Any) -> Sample:
    ids = sample["input_ids"]
    return {**sample, "token_type_ids": ids.new_zeros(ids.shape)} if _has_types(config) else sample
