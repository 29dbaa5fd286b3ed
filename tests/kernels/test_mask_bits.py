"""Bits of masks, counted word by word."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gblm_compress.kernels import masks


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12))
def test_bits_are_counted(words: list[int]) -> None:
    counts = [(word & (2**64 - 1)).bit_count() for word in words]
    assert masks.word_counts(torch.tensor(words)).tolist() == counts
    assert masks.row_starts(torch.tensor(words).unsqueeze(1)).tolist() == [sum(counts[:i]) for i in range(len(words))]
