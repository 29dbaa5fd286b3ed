"""Texts for calibration and evaluation: their sources, and their tokens in windows.

SRC is `demo`, `wikitext2`, `c4`, a hub dataset (`owner/name[:config][@split]`), or a local file (column `text`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gblm_compress.errors import DataError, ModelError, first_line, is_out_of_memory, translated
from gblm_compress.settings.fields import SELF

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["calibration", "evaluation"]
Records: TypeAlias = Iterable[tuple[str, Mapping[str, Any]]]  # rows of a table, each with its name in messages

NAMED = ("demo", "wikitext2", "c4")
# Arguments of `load_dataset`, as in the reference scripts of SparseGPT, Wanda and GBLM.
_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
_C4 = {"path": "allenai/c4", "split": "part", "streaming": True}
_REFERENCE: dict[tuple[str, Role], dict[str, Any]] = {
    ("wikitext2", "calibration"): {**_WIKITEXT2, "split": "train"},
    ("wikitext2", "evaluation"): {**_WIKITEXT2, "split": "test"},
    ("c4", "calibration"): {**_C4, "data_files": {"part": "en/c4-train.00000-of-01024.json.gz"}},
    ("c4", "evaluation"): {**_C4, "data_files": {"part": "en/c4-validation.00000-of-00008.json.gz"}},
}
_JOINTS: dict[tuple[str, Role], str] = {("wikitext2", "calibration"): " ", ("c4", "evaluation"): " "}
_C4_EVALUATION_DOCUMENTS = 1_100

TABLES = (".jsonl", ".parquet")
FILES = (".txt", *TABLES, ".raw", ".tokens")
READS = "a .txt, .jsonl or .parquet file, or a hub dataset"

CHARACTERS_OF_A_TOKEN = 8  # at most, on average; in prose they are four to five
MAX_LINE = 64 << 20  # bytes in a line of a .jsonl file, or in a text of a .parquet file
MAX_PARQUET = 2 << 30  # bytes of text in a .parquet file; a few kilobytes of file can repeat one text without end
CHOICE = 16  # a hub dataset may be endless, so windows are drawn from this many times their tokens
PATIENCE_S = 5.0  # limit for an answer of the hub
DRAWS = 100_000  # give up after this many documents of C4 that are too short


def data_files(source: str, reads: str = READS, files: Collection[str] = FILES) -> list[Path]:
    """The local file of a source, if any; `reads` describes the accepted data in words, `files` are suffixes."""
    path = Path(os.path.expanduser(source))
    if source == SELF:
        raise DataError(f"dataset {SELF!r} is text that a causal language model writes; for this model give {reads}")
    if source in NAMED:
        return []
    if path.suffix in files:
        check_file(path, source)
        return [path]
    if os.path.exists(path) or source.startswith((".", "/", "~")):
        raise DataError(f"dataset {source!r} {found(path)}; give {reads}")
    return []


def check_file(path: Path, source: str) -> None:
    """Refuse anything but a regular file before it is opened."""
    if not os.path.isfile(path):
        raise DataError(f"dataset {source!r}{' is not a file' if os.path.exists(path) else ': no such file'}")


def found(path: Path) -> str:
    """The kind of a path, in words."""
    if os.path.isfile(path):
        return "is a file of an unsupported kind"
    if os.path.isdir(path):
        return "is a folder"
    return "is not a file" if os.path.exists(path) else "does not exist"


def drawn_windows(tokenizer: Any, vocabulary: int, source: str, samples: int, length: int, seed: int) -> list[Tensor]:
    """Windows [1, length] as the reference scripts draw them: each within one document of `c4`, else from the text."""
    generator = random.Random(seed)
    if source == "c4":
        documents = _dataset("c4", **_REFERENCE["c4", "calibration"] | {"streaming": False})
        return [_document_window(tokenizer, vocabulary, documents, length, generator) for _ in range(samples)]
    ids = tokenize(tokenizer, vocabulary, load_text(source, "calibration", CHOICE * samples * length))
    _check_length(ids, length + 1, source)
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def _document_window(
    tokenizer: Any, vocabulary: int, documents: Sequence[Mapping[str, str]], length: int, generator: random.Random
) -> Tensor:
    for _ in range(DRAWS):
        ids = tokenize(tokenizer, vocabulary, documents[generator.randint(0, len(documents) - 1)]["text"])
        if len(ids) > length:
            start = generator.randint(0, len(ids) - length - 1)
            return ids[start : start + length].unsqueeze(0)
    raise DataError(
        f"dataset 'c4': none of {DRAWS:,} random documents has more than {length} tokens; give a smaller "
        "--sequence-length"
    )


def consecutive_windows(
    tokenizer: Any, vocabulary: int, source: str, role: Role, length: int, tokens: int | None
) -> list[Tensor]:
    """Complete, non-overlapping windows [1, length] of a text; of a hub dataset, only about the first `tokens`."""
    ids = tokenize(tokenizer, vocabulary, load_text(source, role, tokens))
    _check_length(ids, length, source)
    return list(ids[: len(ids) // length * length].reshape(-1, 1, length))


def _check_length(ids: Tensor, needed: int, source: str) -> None:
    if len(ids) < needed:
        raise DataError(
            f"dataset {source!r} gives {len(ids)} tokens, but one window needs {needed}; "
            "give a longer text or a smaller --sequence-length"
        )


def load_text(source: str, role: Role, tokens: int | None = None) -> str:
    """The joined documents of `source`. A hub dataset is read until it has given enough `tokens`."""
    is_stream = not data_files(source) and source not in ("demo", "wikitext2")
    documents = _texts(records(source, role, ("text",)))
    if (source, role) == ("c4", "evaluation"):
        documents = islice(documents, _C4_EVALUATION_DOCUMENTS)
    elif is_stream:
        documents = _enough(documents, tokens)
    text = _JOINTS.get((source, role), "\n\n").join(documents)
    if not text.strip():
        raise DataError(f"dataset {source!r} holds no text")
    return text


def records(source: str, role: Role, columns: Collection[str] = ()) -> Records:
    """The rows of a source, read one by one; of a .parquet file only the `columns`, if it has any of them."""
    path, where = Path(os.path.expanduser(source)), f"dataset {source!r}"
    with reading(source):
        if source == "demo":
            yield from ((where, {"text": paragraph}) for paragraph in demo_paragraphs(role))
        elif source in NAMED or path.suffix not in FILES:
            yield from ((where, row) for row in hub_rows(source, role))
        elif path.suffix == ".jsonl":
            yield from _of_jsonl(path, where)
        elif path.suffix == ".parquet":
            yield from _of_parquet(path, where, columns)
        else:
            yield where, {"text": path.read_text(encoding="utf-8")}


def hub_rows(source: str, role: Role) -> Any:
    if source in NAMED:
        return _dataset(source, **_REFERENCE[source, role])
    location, _, split = source.partition("@")
    name, _, config = location.partition(":")
    split = split or ("train" if role == "calibration" else "test")
    return _dataset(source, path=name, name=config or None, split=split, streaming=True)


def demo_paragraphs(role: Role) -> list[str]:
    """Prose of the language reference that comes with CPython; SHA-256 gives one paragraph in four to evaluation."""
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(
        " ".join(paragraph.split())
        for _, topic in sorted(topics.items())
        for paragraph in topic.split("\n\n")
        if paragraph.strip()
    )
    wanted = role == "evaluation"
    return [each for each in paragraphs if (hashlib.sha256(each.encode()).digest()[0] % 4 == 0) == wanted]


def tokenize(tokenizer: Any, vocabulary: int, text: str) -> Tensor:
    """Token ids [tokens], int64, of the whole text at once, as in the reference scripts."""
    import torch

    with tokenizing():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    check_ids(ids, vocabulary)
    return ids


@contextmanager
def tokenizing() -> Iterator[None]:
    """Turn any error of a tokenizer into a ModelError; a panic in its Rust code is not an `Exception`."""
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ModelError(
            f"the tokenizer fails on a text ({first_line(error)}); use the original model's tokenizer"
        ) from error


def check_ids(ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, but the model has embeddings for {vocabulary} tokens, 0 to "
            f"{vocabulary - 1}; use the tokenizer that belongs to the model, or resize its embeddings "
            "(`model.resize_token_embeddings(len(tokenizer))`)"
        )


def vocabulary_of(config: Any) -> int:
    """The number of tokens that a model has embeddings for."""
    with translated(lambda said: ModelError(f"the model's config has no usable vocab_size ({said})")):
        return int(config.get_text_config().vocab_size)


def padded_ids(vocabulary: int, padding: slice) -> dict[str, Tensor]:
    """Two texts of six tokens, the first padded: a mask of ones alone would let a tracer drop `attention_mask`."""
    import torch

    ids = torch.arange(12).reshape(2, 6) % vocabulary
    mask = torch.ones_like(ids)
    mask[0, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def reading(source: str, advice: str = "") -> AbstractContextManager[None]:
    """Turn any error of the hub client and the readers of files into a DataError."""
    return translated(lambda said: DataError(f"dataset {source!r} cannot be read ({said}){advice}"))


def _dataset(source: str, **arguments: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    advice = f"; give 'demo', 'wikitext2', 'c4', {READS} as owner/name[:config][@split]"
    with reading(source, advice), nullcontext() if _hub_answers() else _offline():
        try:
            return datasets.load_dataset(**arguments)
        except ConnectionError as error:
            raise DataError(
                f"dataset {source!r} is on the Hugging Face hub, which cannot be reached; give a text file "
                f"(.txt, .jsonl, .parquet), 'demo', or, to calibrate a language model, {SELF!r}"
            ) from error


def _hub_answers() -> bool:
    """Whether the hub can be reached. Its clients would try for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # errors of the transport, or of a client in offline mode
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Limit the hub's clients to their cached files."""
    import datasets
    from huggingface_hub import constants

    places = constants, datasets.config
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _of_jsonl(path: Path, dataset: str) -> Records:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{dataset}, line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{where}: more than {MAX_LINE:,} bytes; every line is one document")
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                document = json.loads(content) if content else {}
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} cannot be read as JSON ({first_line(error)})") from error
            if not isinstance(document, dict):
                raise DataError(f"{where} is not an object; every line is one with a 'text'")
            if content:
                yield where, document


def _of_parquet(path: Path, where: str, columns: Collection[str]) -> Records:
    from pyarrow import parquet, types

    left, schema = MAX_PARQUET, parquet.read_schema(path)
    names = [name for name in schema.names if name in columns]
    check_columns(names, where)
    # As a dictionary, a text that many rows repeat is in memory once.
    repeated = [name for name in names if not types.is_nested(schema.field(name).type)]
    with parquet.ParquetFile(path, read_dictionary=repeated) as file:
        for batch in file.iter_batches(batch_size=64, columns=names or None):
            for cells in zip(*batch.columns, strict=True):
                row = {name: cell.as_py() for name, cell in zip(batch.schema.names, cells, strict=True)}
                sizes = [len(value.encode()) for value in row.values() if isinstance(value, str)]
                if max(sizes, default=0) > MAX_LINE:
                    raise DataError(f"{where}: a text of more than {MAX_LINE:,} bytes is too long")
                left -= sum(sizes)
                if left < 0:
                    raise DataError(f"{where} holds more than {MAX_PARQUET:,} bytes of text; give a part of it")
                yield where, row


def check_columns(names: Sequence[str], where: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{where} has {names.count(twice[0])} columns {twice[0]!r}; give each its own name")


def _texts(rows: Records) -> Iterator[str]:
    for where, row in rows:
        if "text" not in row:
            raise DataError(f"{where} has no column 'text'; it has {', '.join(map(repr, islice(row, 8))) or 'none'}")
        text = row["text"]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"{where}: its 'text' is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: its 'text' is not valid Unicode ({first_line(error)})") from error
        yield text


def _enough(documents: Iterable[str], tokens: int | None) -> Iterator[str]:
    characters = 0
    for document in documents:
        yield document
        characters += len(document)
        if tokens is not None and characters > tokens * CHARACTERS_OF_A_TOKEN:
            return
