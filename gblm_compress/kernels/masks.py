"""Masks of the stored weights, as kernels read them: words of 64 bits, and the patterns of 2:4.

Bit b of word w is column 64·w + b. A pattern is the first three bits of every four columns; the fourth is their
parity. Eight patterns fill 3 bytes, from the lowest bit of the first byte on.
"""

import torch
from torch import Tensor

WORD = 64
PADDING = 64
PATTERN_BYTES = WORD // 4 * 3 // 8  # of a word
_WITH_PARITY = (0b0000, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b1111)
_SHIFTS = tuple(range(0, 24, 3))


def bits(mask: Tensor, columns: int) -> Tensor:
    """The mask as booleans [rows, columns]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    spread = (mask.view(torch.uint8).unsqueeze(-1) >> shifts) & 1
    return spread.reshape(mask.shape[0], -1)[:, :columns].bool()


def words(alive: Tensor) -> Tensor:
    """The mask [rows, ceil(columns / 64)] of booleans [rows, columns]: the inverse of `bits`."""
    padded = torch.nn.functional.pad(alive, (0, -alive.shape[1] % WORD))
    shifts = torch.arange(8, dtype=torch.uint8, device=alive.device)
    bytes_of_8 = padded.reshape(len(alive), -1, 8).to(torch.uint8) << shifts
    return bytes_of_8.sum(-1, dtype=torch.uint8).view(torch.int64)


def row_starts(mask: Tensor) -> Tensor:
    """Where each row's values begin [rows], int64."""
    return starts_of(word_counts(mask).sum(1))


def starts_of(counts: Tensor) -> Tensor:
    """Where each part begins, for the number of elements of each."""
    return torch.cumsum(counts, 0) - counts


def word_counts(mask: Tensor) -> Tensor:
    """How many bits each word has, in its shape; counts of 1, 2 and 4 bits are added within it."""
    words = mask - ((mask >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56


def to_patterns(mask: Tensor) -> Tensor:
    """The patterns [rows, words·6] in uint8 of a mask [rows, words] with two bits, or none, in every four columns."""
    halves = mask.view(torch.uint8).unsqueeze(-1) >> torch.tensor((0, 4), dtype=torch.uint8, device=mask.device)
    codes = (halves & 7).reshape(len(mask), -1, 8).int() << torch.tensor(_SHIFTS, device=mask.device)
    of_eight = codes.sum(-1, dtype=torch.int32).view(torch.uint8)  # the fourth byte is zero
    return of_eight.reshape(len(mask), -1, 4)[..., :3].reshape(len(mask), -1).contiguous()


def pattern_codes(patterns: Tensor) -> Tensor:
    """The code of every four columns, [rows, words·16] in uint8."""
    low, middle, high = patterns.reshape(len(patterns), -1, 3).int().unbind(-1)
    of_eight = (low | middle << 8 | high << 16).unsqueeze(-1)
    return ((of_eight >> torch.tensor(_SHIFTS, device=patterns.device)) & 7).to(torch.uint8).reshape(len(patterns), -1)


def from_patterns(patterns: Tensor) -> Tensor:
    """The inverse of `to_patterns`."""
    table = torch.tensor(_WITH_PARITY, dtype=torch.uint8, device=patterns.device)
    nibbles = table[pattern_codes(patterns).int()]
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int64)
