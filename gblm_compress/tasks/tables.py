"""Rows of texts with what is said of them, a label or a score: from csv, jsonl and parquet files and hub datasets.

Columns are known by their names: `text` or `sentence`, alone or with `text_pair`; `sentence1` and `sentence2`;
`premise` and `hypothesis`; `score`, `label`. A csv file without such a head line may have two sentences and a score, as
the STS benchmark has them. Importing this module loads no torch.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gblm_compress.errors import DataError
from gblm_compress.storage.paths import kind_of, local
from gblm_compress.tasks import text

CSV = ".csv"
READS = "a .txt, .csv, .jsonl or .parquet file, or a hub dataset"
_TEXTS = (("text", "text_pair"), ("sentence", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
_KNOWN = frozenset(("score", "label", *(name for names in _TEXTS for name in names)))
_NEEDED = (
    "name one 'text' or 'sentence', or two 'sentence1' and 'sentence2', and those of labels 'label', of scores 'score'"
)


@dataclass(frozen=True)
class Row:
    """One text or two, and what is said of them.

    Attributes:
        texts: as the model reads them, together.
        label: a class, by its number or name; None where nothing is said.
        score: a number, where there is one.
        where: what to call the row in messages.
    """

    texts: tuple[str, ...]
    label: int | str | None = None
    score: float | None = None
    where: str = ""


def data_files(source: str) -> list[Path]:
    """As `text.data_files`; .csv files are read, too.

    Raises:
        DataError: as `text.data_files`.
    """
    path = local(source)
    if path.suffix != CSV:
        return text.data_files(source, READS)
    if (kind := kind_of(path)) != "file":
        raise DataError(f"dataset {source!r}: no such file" if kind is None else f"dataset {source!r} is no file")
    return [path]


def rows(source: str, role: text.Role) -> list[Row]:
    """The rows of a csv, jsonl or parquet file or of a hub dataset, those without a text left out.

    Raises:
        DataError: the source cannot be read, or has not the columns.
    """
    data_files(source)
    path, where = local(source), f"dataset {source!r}"
    if path.suffix == CSV:
        objects: Iterable[tuple[str, Mapping[str, Any]]] = _csv(path, where)
    elif path.suffix == ".jsonl":
        objects = text.json_objects(path, source)
    elif path.suffix == ".parquet":
        objects = ((where, row) for row in text.parquet_rows(path, source, _KNOWN))
    else:
        objects = ((where, row) for row in text.hub_rows(source, role))
    found = [row for place, columns in objects if (row := _row(columns, place)) is not None]
    if not found:
        raise DataError(f"{where} holds no text")
    return found


def _csv(path: Path, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    head: Sequence[str] | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in (lines := csv.reader(file)):
                place = f"{where}, line {lines.line_num}"
                if not line:
                    continue
                if head is None:
                    head = [cell.strip().lower() for cell in line]
                    if _KNOWN.intersection(head):
                        continue
                    if len(line) != 3 or not _is_number(line[2]):
                        raise DataError(f"{place} names no known column, but {_listed(line)}; {_NEEDED}")
                    head = ["sentence1", "sentence2", "score"]
                if len(line) != len(head):
                    raise DataError(f"{place} has {len(line)} columns, the first line {len(head)}")
                yield place, dict(zip(head, line, strict=True))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{where} cannot be read as csv ({error})") from error


def _row(columns: Mapping[str, Any], where: str) -> Row | None:
    """Raises:
    DataError: no column is a text, or one is of another type.
    """
    names = next((names for names in _TEXTS if names[0] in columns), None)
    if names is None:
        raise DataError(f"{where} has no column of texts, but {_listed(columns)}; {_NEEDED}")
    texts = tuple(value for name in names if (value := columns.get(name)) is not None)
    for value in texts:
        if not isinstance(value, str):
            raise DataError(f"{where}: a text is needed, and {type(value).__name__} was found")
    if not texts or not texts[0].strip():
        return None
    label, score = columns.get("label"), columns.get("score")
    if isinstance(label, float):  # the score of a pair, as GLUE calls it, or a class where others are missing
        score = label if score is None else score
        label = int(label) if label.is_integer() else None
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, str):
        label = int(label) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", label) else label.strip() or None
    if score is not None and not _is_number(score):
        raise DataError(f"{where}: the score {score!r} is no number")
    return Row(texts, label, None if score is None else float(score), where)


def _listed(columns: Iterable[str]) -> str:
    """The first columns, for a message."""
    return ", ".join(map(repr, islice(columns, 8))) or "none"


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
