"""The last cache: its size is what the system says, and what replaces it is larger."""

import numpy as np
import pytest

from gblm_compress.machine import caches


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [(("48K", "32K", "1024K", "32768K"), 32 << 20), (("64K", "2M"), 2 << 20), (("?", ""), 0), ((), 0)],
)
def test_the_largest_cache_counts(tmp_path, sizes, largest) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert caches.last_cache_bytes(tmp_path) == largest


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_more_is_read_than_the_cache_holds(monkeypatch, size) -> None:
    read = []
    real = np.ones
    monkeypatch.setattr(caches.np, "ones", lambda *args: read.append(real(*args)) or read[-1])
    caches.replacing(size)()
    assert read[0].nbytes >= caches.TIMES * size
