"""The patterns of a 2:4 mask: of every four columns the first three bits, for the fourth is their parity.

Eight such codes of 3 bits, the first lowest, are 24 bits and lie in 3 bytes, the low one first. Kernels rest on this,
as on the words of `masks`.
"""

import torch
from torch import Tensor

from gblm_compress.kernels.masks import WORD

BYTES = WORD // 4 * 3 // 8
"""The patterns of a word of the mask take so many."""
_WITH_PARITY = (0b0000, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b1111)
_SHIFTS = tuple(range(0, 24, 3))


def from_mask(mask: Tensor) -> Tensor:
    """The patterns [rows, words·6] in uint8 of a mask [rows, words] with two bits, or none, in every four columns."""
    halves = mask.view(torch.uint8).unsqueeze(-1) >> torch.tensor((0, 4), dtype=torch.uint8, device=mask.device)
    codes = (halves & 7).reshape(len(mask), -1, 8).int() << torch.tensor(_SHIFTS, device=mask.device)
    of_eight = codes.sum(-1, dtype=torch.int32).view(torch.uint8)  # the fourth byte is zero
    return of_eight.reshape(len(mask), -1, 4)[..., :3].reshape(len(mask), -1).contiguous()


def codes(patterns: Tensor) -> Tensor:
    """The code of every four columns, [rows, words·16] in uint8."""
    low, middle, high = patterns.reshape(len(patterns), -1, 3).int().unbind(-1)
    of_eight = (low | middle << 8 | high << 16).unsqueeze(-1)
    return ((of_eight >> torch.tensor(_SHIFTS, device=patterns.device)) & 7).to(torch.uint8).reshape(len(patterns), -1)


def to_mask(patterns: Tensor) -> Tensor:
    """The mask [rows, words] in int64 of such patterns."""
    table = torch.tensor(_WITH_PARITY, dtype=torch.uint8, device=patterns.device)
    nibbles = table[codes(patterns).int()]
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int64)
