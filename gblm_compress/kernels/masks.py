"""Masks of the stored weights, as kernels read them: words of 64 bits. Bit b of word w is column 64·w + b."""

import torch
from torch import Tensor

WORD = 64
PADDING = 64


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
