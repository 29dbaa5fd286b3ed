"""Repairs of Triton's interpreter, made by importing this; compiled kernels are untouched.

It keeps bfloat16 as its bits and multiplies those in `tl.dot`: here such operands become float32, which holds bfloat16
exactly. It cuts float32 off where it should round it to bfloat16. And up to Triton 3.6 it makes loop bounds of arrays
in a way that numpy 2.5 refuses.
"""

from typing import Any

import numpy as np
from triton.runtime import interpreter

_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor


def _exact(operand: Any) -> Any:
    if not operand.dtype.scalar.is_bf16():
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def _rounded(self: Any, operand: Any, dtype: Any) -> Any:
    """To nearest, ties to even, as the hardware does; finite numbers."""
    tl = interpreter.tl
    if operand.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return _cast(self, operand, dtype)
    bits = operand.data.view(np.uint32)
    return interpreter.TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _exact(a), _exact(b), *rest)
interpreter.InterpreterBuilder.cast_impl = _rounded
interpreter._patch_lang_tensor = _patch_tensor_and_index
