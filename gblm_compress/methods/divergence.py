"""KL divergence of predictions over a vocabulary, without autograd's many copies of the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time, beside a few temporaries of that size. Fewer are 3 % faster on a CPU, but call a GPU more often.
ELEMENTS = 1 << 22


def kl_divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense ‖ logits) in nats per row, of [rows, classes] each; differentiable once, in `logits` alone.

    The gradient is computed with the value, a few rows at a time in float32 or wider.
    """
    apply: Any = _Divergence.apply  # has types since torch 2.15
    return apply(logits, dense)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        rows, classes = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        count = max(1, ELEMENTS // classes)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for start in range(0, rows, count):
            some = slice(start, start + count)
            own, target = (each[some].to(dtype).log_softmax(-1) for each in (logits, dense))
            probability = target.exp()
            total += target.sub_(own).mul_(probability).sum()
            if gradient is not None:
                gradient[some] = own.exp_().sub_(probability).div_(rows)
        ctx.save_for_backward(gradient)
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.saved_tensors[0], None
