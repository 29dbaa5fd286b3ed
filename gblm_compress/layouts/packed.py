"""What a packed tensor must be before a kernel may read it.

Each layout has one `check`, which whoever fills a layer calls once; kernels trust what it has passed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.methods.zeros import is_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that weights are stored in


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """Raises:
    ModelError: the tensor has none of the dtypes, another shape, gaps between its elements, or no finite values.
    """
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        given, *needed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        gaps = "" if tensor.is_contiguous() else ", not contiguous"
        raise ModelError(f"{name}: {given} {list(tensor.shape)}{gaps}; needs {' or '.join(needed)} {list(shape)}")
    if tensor.is_floating_point() and not is_finite(tensor):
        raise ModelError(f"{name}: holds NaN or infinite values; the file is damaged, or {tensor.dtype} is too narrow")
