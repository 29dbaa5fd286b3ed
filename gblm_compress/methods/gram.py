"""Second moments of a layer's input: the Gram matrix, and the factorisation that OBS-type methods read.

With X [tokens, in_features] the inputs of a layer and Ŵ an approximation of its weight W, the layer's
reconstruction error is ‖X(W − Ŵ)ᵀ‖² = Σ_rows (w − ŵ)ᵀ H (w − ŵ) with the Gram matrix H = XᵀX: everything that
a method needs to know of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gblm_compress.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Gram matrix, as SparseGPT does (arXiv 2301.00774, section 4)."""


def activation_norms_of(gram: Tensor, samples: int) -> Tensor:
    """A [in_features] from the Gram matrix of `samples` samples: A_j = sqrt(H_jj / N)."""
    return (gram.diagonal() / samples).sqrt()


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """H + λI, λ = `damping` times the mean of H's diagonal, or 1 where H = 0: positive definite for any H."""
    import torch

    mean = gram.diagonal().mean()
    result = gram.clone()
    result.diagonal().add_(torch.where(mean == 0, 1.0, damping * mean))
    return result


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖: how far a layer's output is from that of its dense weights, as a share of it; 0 of 0.

    Args:
        weight: W [out_features, in_features].
        pruned: Ŵ, the same shape.
        gram: H = XᵀX [in_features, in_features].
    """
    change = weight - pruned
    lost, whole = ((matrix @ gram).mul_(matrix).sum().clamp_min(0) for matrix in (change, weight))
    return float((lost / whole).sqrt()) if whole > 0 else 0.0


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular with UᵀU = (H + λI)⁻¹ (SparseGPT, arXiv 2301.00774, section 3.3).

    U_jj² is the j-th diagonal entry of the inverse of the Hessian in which the inputs before j are eliminated, and
    U_j,j: / U_jj the compensation that the remaining weights get when weight j is changed. Computed in float64.

    Args:
        gram: H [in_features, in_features].

    Returns:
        [in_features, in_features] in H's dtype.

    Raises:
        UsageError: `damping` is so small that rounding leaves the matrix singular.
    """
    import torch

    lower, failed = torch.linalg.cholesky_ex(damped(gram.double(), damping))
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise UsageError(
            f"damping {damping:g} is too small for {len(gram)} inputs that depend on each other: their Gram matrix has "
            "no inverse; give a larger one (usual is 0.01), or more text"
        )
    return upper.to(gram.dtype)


def reconstruction_error(difference: Tensor, gram: Tensor) -> Tensor:
    """dᵀHd for each row d of `difference` [out_features, in_features]: each output's squared error, [out_features]."""
    return ((difference @ gram) * difference).sum(1)
