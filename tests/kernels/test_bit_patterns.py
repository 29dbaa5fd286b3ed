"""Words and patterns of masks: the bits themselves against loops, and back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.kernels import masks
from gblm_compress.methods.patterns import Pattern


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12))
def test_bits_are_counted(words: list[int]) -> None:
    counts = [(word & (2**64 - 1)).bit_count() for word in words]
    assert masks.word_counts(torch.tensor(words)).tolist() == counts
    assert masks.row_starts(torch.tensor(words).unsqueeze(1)).tolist() == [sum(counts[:i]) for i in range(len(words))]


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_first_three_bits_of_every_four(rows: int, groups: int, seed: int) -> None:
    score = torch.rand(rows, groups * 4, generator=torch.Generator().manual_seed(seed))
    keep = Pattern("2:4").mask(score, score, 0.5)
    assert torch.equal(masks.bits(masks.words(keep), groups * 4), keep)
    packed = masks.to_patterns(masks.words(keep))
    size = -(-groups // 16) * masks.PATTERN_BYTES
    for row, line in zip(keep.tolist(), packed.tolist(), strict=True):
        number = 0
        for group in range(groups):
            for place in range(3):
                number |= row[4 * group + place] << (3 * group + place)
        assert line == list(number.to_bytes(size, "little"))
    assert torch.equal(masks.from_patterns(packed), masks.words(keep))
    assert masks.pattern_codes(packed)[:, groups:].count_nonzero() == 0
