"""Patterns of 2:4 masks: the bits themselves against a loop, and back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.kernels import patterns
from gblm_compress.kernels.masks import words

PAIRS = [(first, second) for first in range(4) for second in range(first + 1, 4)]


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_first_three_bits_of_every_four(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(rows, groups * 4, dtype=torch.bool)
    for row in range(rows):
        for group in range(groups):
            for place in PAIRS[int(torch.randint(6, (1,), generator=generator))]:
                keep[row, 4 * group + place] = True
    packed = patterns.from_mask(words(keep))
    size = -(-groups // 16) * patterns.BYTES
    for row, line in zip(keep.tolist(), packed.tolist(), strict=True):
        number = 0
        for group in range(groups):
            for place in range(3):
                number |= row[4 * group + place] << (3 * group + place)
        assert line == list(number.to_bytes(size, "little"))
    assert torch.equal(patterns.to_mask(packed), words(keep))
    assert patterns.codes(packed)[:, groups:].count_nonzero() == 0
