"""Weights that layouts can hold, for their tests."""

from typing import Any

import torch
from torch import Tensor

from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.patterns import Pattern

ROUNDING = [name for name, layout in LAYOUTS.items() if layout.width]
EXACT = [name for name in LAYOUTS if name not in ROUNDING]


def sparse(layout: str, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half zeros: 2:4 where the layout needs it, with fewer nonzeros in some groups; the last row is empty."""
    generator = torch.Generator().manual_seed(1000 * rows + columns + seed)
    weight = torch.randn(rows, columns, generator=generator)
    score = torch.rand(rows, columns, generator=generator)
    weight *= Pattern(LAYOUTS[layout].pattern or "unstructured").mask(score, weight, 0.5)
    weight[:, ::9] = weight[-1:] = 0.0
    return weight.add(0.0).to(dtype)


def packed(layout: str, weight: Tensor, **options: Any) -> PackedLinear:
    kind: Any = LAYOUTS[layout].kind
    return PackedLinear.holding(layout, weight.shape, kind.pack(weight, **options), weight.dtype)
