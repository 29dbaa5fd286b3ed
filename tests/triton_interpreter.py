"""Repairs of Triton's interpreter, made by importing this; compiled kernels are untouched.

It keeps bfloat16 as its bits and multiplies those in `tl.dot`: here such operands become float32, which holds bfloat16
exactly. And up to Triton 3.6 it makes loop bounds of arrays in a way that numpy 2.5 refuses.
"""

from typing import Any

import numpy as np
from triton.runtime import interpreter

_dot = interpreter.InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor


def _exact(operand: Any) -> Any:
    if not operand.dtype.scalar.is_bf16():
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _exact(a), _exact(b), *rest)
interpreter._patch_lang_tensor = _patch_tensor_and_index
