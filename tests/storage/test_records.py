"""Our own JSON files: read within limits, written whole or not at all."""

import json
import math
import os

import pytest

from gblm_compress.errors import OutputError
from gblm_compress.storage.records import as_json, read_json, read_sealed, write_sealed


def test_json_is_valid_whatever_was_measured() -> None:
    content = {"a": [1.5, math.inf, (math.nan, -math.inf)], "b": {"c": "é"}}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": "é"}}
    assert json.loads(as_json(content), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"])
def test_json_that_is_no_object(content, tmp_path) -> None:
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone", "pipe"):
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / name)


def test_a_sealed_record_is_read_only_as_it_was_written(tmp_path) -> None:
    write_sealed(tmp_path / "x.json", {"a": [1, 2.5], "b": "é"})
    assert read_sealed(tmp_path / "x.json") == {"a": [1, 2.5], "b": "é"}
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="hash"):
        read_sealed(tmp_path / "x.json")
    with pytest.raises(OutputError, match="cannot be written"):
        write_sealed(tmp_path / "gone" / "x.json", {})
