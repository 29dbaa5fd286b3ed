"""Text for calibration and evaluation: where it comes from.

SRC is `demo`, `wikitext2`, `c4`, a hub dataset (`owner/name[:config][@split]`), or a local `.txt`, `.jsonl`
or `.parquet` file (column `text`). Importing this module loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gblm_compress.errors import DataError, GblmError, first_line, is_out_of_memory
from gblm_compress.storage.paths import kind_of, local

Role = Literal["calibration", "evaluation"]

# As the reference scripts of SparseGPT, Wanda and GBLM read them.
_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_WIKITEXT2_PARTS = {"calibration": ("train", " "), "evaluation": ("test", "\n\n")}
_C4 = "allenai/c4"
_C4_CALIBRATION = "en/c4-train.00000-of-01024.json.gz"
_C4_EVALUATION, _C4_DOCUMENTS = "en/c4-validation.00000-of-00008.json.gz", 1_100

FILES = (".txt", ".jsonl", ".parquet", ".raw", ".tokens")
READS = "a .txt, .jsonl or .parquet file, or a hub dataset"
FOUND = {None: "is not there", "file": "is a file of another kind", "folder": "is a folder", "other": "is no file"}
"""What stands in the way of reading a path of that kind, see `kind_of`."""

CHARACTERS_OF_A_TOKEN = 8
"""At most, on average; in prose, vocabularies of today have four to five."""

MAX_LINE = 64 << 20
"""Bytes in a line of a .jsonl file, or in a text of a .parquet file; what is longer is no document."""

MAX_PARQUET = 2 << 30
"""Bytes of text in a .parquet file; a few kilobytes of file can repeat one text without end."""


def data_files(source: str, reads: str = READS) -> list[Path]:
    """The local file that a source names, if it does; of the hub it asks nothing.

    Args:
        reads: what may be given instead, in words.

    Raises:
        DataError: there is no such file, or it is of another kind.
    """
    path = local(source)
    if source in ("demo", "wikitext2", "c4"):
        return []
    kind = kind_of(path)
    if path.suffix in FILES and kind != "file":
        raise DataError(f"dataset {source!r}: no such file" if kind is None else f"dataset {source!r} is no file")
    if path.suffix not in FILES and (kind is not None or source.startswith((".", "/", "~"))):
        raise DataError(f"dataset {source!r} {FOUND[kind]}; give {reads}")
    return [path] if path.suffix in FILES else []


def load_text(source: str, role: Role, tokens: int | None = None) -> str:
    """The text of `source`, its documents joined; `role` picks the part where a source has several.

    Args:
        tokens: how many are enough. Documents of the hub are read until they hold so many, and no further; a text that
            is here, WikiText-2, and C4's for evaluation are read whole.

    Raises:
        DataError: the source does not exist, cannot be read, or has no text.
    """
    data_files(source)
    if source == "demo":
        text = "\n\n".join(demo_paragraphs(role))
    elif source == "wikitext2":
        split, joint = _WIKITEXT2_PARTS[role]
        text = joint.join(_texts(_dataset(source, *_WIKITEXT2, split=split), source))
    elif source == "c4" and role == "evaluation":
        documents = _dataset(source, _C4, data_files={"part": _C4_EVALUATION}, split="part", streaming=True)
        text = " ".join(islice(_texts(documents, source), _C4_DOCUMENTS))
    elif source == "c4":
        text = "\n\n".join(_enough(_texts(c4_documents(streaming=True), source), tokens))
    elif local(source).suffix in FILES:
        text = _read_file(local(source), source)
    else:
        text = "\n\n".join(_enough(_texts(hub_rows(source, role), source), tokens))
    if not text.strip():
        raise DataError(f"dataset {source!r} holds no text")
    return text


def _enough(documents: Iterable[str], tokens: int | None) -> Iterator[str]:
    characters = 0
    for document in documents:
        yield document
        characters += len(document)
        if tokens is not None and characters > tokens * CHARACTERS_OF_A_TOKEN:
            return


def c4_documents(*, streaming: bool = False) -> Any:
    """The documents of one shard of C4, each with a key `text`: a sequence to draw from, or one after the other."""
    return _dataset("c4", _C4, data_files={"part": _C4_CALIBRATION}, split="part", streaming=streaming)


def demo_paragraphs(role: Role) -> list[str]:
    """Prose of the Python language reference that CPython carries, in disjoint parts for the two roles.

    A paragraph that recurs between topics counts once. Its SHA-256 decides the part: three in four belong
    to calibration, one in four to evaluation, the same on every machine.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(
        " ".join(paragraph.split())
        for _, topic in sorted(topics.items())
        for paragraph in topic.split("\n\n")
        if paragraph.strip()
    )

    def part(paragraph: str) -> Role:
        return "evaluation" if hashlib.sha256(paragraph.encode()).digest()[0] % 4 == 0 else "calibration"

    return [paragraph for paragraph in paragraphs if part(paragraph) == role]


def _read_file(path: Path, source: str) -> str:
    try:
        if path.suffix == ".jsonl":
            return "\n\n".join(_jsonl(path, source))
        if path.suffix == ".parquet":
            return "\n\n".join(_parquet(path, source))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset {source!r} cannot be read as UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"dataset {source!r} cannot be read ({first_line(error)})") from error


def json_objects(path: Path, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with one JSON object a line, each with what to call it; empty lines are left out.

    Raises:
        DataError: a line is no object, or too long.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"dataset {source!r}, line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{where}: more than {MAX_LINE:,} bytes; every line is one document")
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not content:
                    continue
                document = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} cannot be read as JSON ({first_line(error)})") from error
            if not isinstance(document, dict):
                raise DataError(f"{where} is no object; every line is one with a 'text'")
            yield where, document


def parquet_rows(path: Path, source: str, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, of those of the columns that it has; of all where it has none of them.

    Raises:
        DataError: it is damaged, or holds more than `MAX_PARQUET` bytes of text.
    """
    from pyarrow import parquet

    left = MAX_PARQUET
    with reading(source), parquet.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in columns] or None
        for batch in file.iter_batches(batch_size=64, columns=names):
            left -= batch.nbytes
            if left < 0:
                raise DataError(f"dataset {source!r} holds more than {MAX_PARQUET:,} bytes; give a part of it")
            yield from batch.to_pylist()


def _jsonl(path: Path, source: str) -> Iterator[str]:
    for where, document in json_objects(path, source):
        yield from _text_of(document, where)


def _parquet(path: Path, source: str) -> Iterator[str]:
    from pyarrow import parquet, types

    left = MAX_PARQUET
    with reading(source):
        schema = parquet.read_schema(path)
    names = schema.names
    # As a dictionary, a text that many documents repeat is in memory once.
    repeated = ["text"] if "text" in names and not types.is_nested(schema.field("text").type) else None
    with reading(source), parquet.ParquetFile(path, read_dictionary=repeated) as file:
        for batch in file.iter_batches(batch_size=64, columns=["text"]) if "text" in names else ():
            for cell in batch.column(0):
                for text in _text_of({"text": cell.as_py()}, f"dataset {source!r}"):
                    size = len(text.encode())
                    left -= size
                    if size > MAX_LINE:
                        raise DataError(f"dataset {source!r}: a text of more than {MAX_LINE:,} bytes is no document")
                    if left < 0:
                        raise DataError(
                            f"dataset {source!r} holds more than {MAX_PARQUET:,} bytes of text; give a part of it"
                        )
                    yield text
        if "text" not in names:
            yield from _text_of(dict.fromkeys(names), f"dataset {source!r}")


def _text_of(document: Mapping[str, Any], where: str) -> Iterator[str]:
    """The text of a document: none where it is null."""
    if "text" not in document:
        raise DataError(f"{where} has no column 'text'; it has {', '.join(map(repr, islice(document, 8))) or 'none'}")
    text = document["text"]
    if text is None:
        return
    if not isinstance(text, str):
        raise DataError(f"{where}: its 'text' is no text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: its 'text' is no Unicode ({first_line(error)})") from error
    yield text


def hub_rows(source: str, role: Role) -> Any:
    """The rows of a hub dataset, of the split that it names or that the role has.

    Raises:
        DataError: it cannot be had.
    """
    location, _, split = source.partition("@")
    name, _, config = location.partition(":")
    default_split = "train" if role == "calibration" else "test"
    return _dataset(source, name, config or None, split=split or default_split, streaming=True)


def _dataset(source: str, *args: Any, **kwargs: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    advice = (
        "; give 'demo', 'wikitext2', 'c4', a hub dataset as owner/name[:config][@split], or a .txt, .jsonl or .parquet "
        "file"
    )
    with reading(source, advice):
        return datasets.load_dataset(*args, **kwargs)


def _texts(documents: Any, source: str) -> Iterator[str]:
    with reading(source):
        for document in documents:
            yield from _text_of(document, f"dataset {source!r}")


@contextmanager
def reading(source: str, advice: str = "") -> Iterator[None]:
    """The hub client, its transport, the readers of files and the splits each raise their own kinds for bad data."""
    try:
        yield
    except Exception as error:
        if isinstance(error, GblmError) or is_out_of_memory(error):
            raise
        raise DataError(f"dataset {source!r} cannot be read ({first_line(error)}){advice}") from error
