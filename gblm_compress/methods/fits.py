"""Fits: new values of the weights that survive, layer by layer. The fits of blocks are in `training`.

X [tokens, in_features] are a layer's inputs, H = XᵀX is their Gram matrix, and Ŵ approximates the weight W. The layer's
reconstruction error is ‖X(W − Ŵ)ᵀ‖² = Σ_rows (w − ŵ)ᵀ H (w − ŵ).

A fit takes W [out_features, in_features] in float32, the mask of its shape (True = keep) and the layer's `Statistics`.
It returns the new weight, with exact zeros outside the mask. It fits every row alone, since several processes share the
rows. Add a fit by writing one and listing it in `FITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gblm_compress.errors import UsageError
from gblm_compress.methods.choices import Choice, Need, Statistics
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import Grid, rounded
from gblm_compress.methods.zeros import keep_only

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01  # of a Gram matrix's diagonal, relative to its mean (SparseGPT, arXiv 2301.00774, section 4)
BLOCK_EPOCHS, BLOCK_RATE = 3, 0.007  # passes at most; Adam's step relative to a layer's root mean square weight
MODEL_EPOCHS, MODEL_RATE = 3, 0.0005  # the same for the fit of the whole model
COLUMNS = 128  # between two propagations of the accumulated error to the rest of the matrix
STEPS, FEW_STEPS = 100, 10  # of conjugate gradients at most; where tokens are few
ROWS = 2048  # of a layer that are solved at once, so that their temporaries stay small
OPEN_SHARE = 0.9  # Converged rows are dropped once at most this share is open: a copy costs as much as a few sums.
SWEEPS = 4  # of coordinate descent over all columns


@contextmanager
def damped(gram: Tensor) -> Iterator[Tensor]:
    """H + λI within the `with`, in the memory of H. λ = `DAMPING` times the mean of H's diagonal, or 1 if H = 0.

    It is positive definite for any H.
    """
    import torch

    diagonal = gram.diagonal()
    before, mean = diagonal.clone(), diagonal.mean()
    diagonal.add_(torch.where(mean == 0, 1.0, DAMPING * mean))
    try:
        yield gram
    finally:
        diagonal.copy_(before)


def output_error(pruned: Tensor, weight: Tensor, gram: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖, the relative error of a layer's output; 0 if XWᵀ is zero. `weight` may be narrower."""
    lost, whole = ((matrix @ gram).mul_(matrix).sum().clamp_min(0) for matrix in (weight - pruned, weight.float()))
    return float((lost / whole).sqrt()) if whole > 0 else 0.0


def inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular with UᵀU = (H + λI)⁻¹ (SparseGPT, arXiv 2301.00774, section 3.3), computed in float64.

    U_jj² is input j's diagonal entry in the inverse of the Hessian of the inputs from j on. U_j,j: / U_jj is the
    compensation of the remaining weights for a change of weight j.
    """
    import torch

    with damped(gram.double()) as hessian:
        lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise UsageError(
            f"the {len(gram)} inputs of a layer are linearly dependent: their Gram matrix has no inverse; give more "
            "text, or --fit fast"
        )
    return upper.to(gram.dtype)


def none(weight: Tensor, keep: Tensor, statistics: Statistics) -> Tensor:
    return keep_only(weight, keep)


def obs(weight: Tensor, keep: Tensor, statistics: Statistics, grid: Grid | None = None) -> Tensor:
    """SparseGPT's error propagation with a given mask (Frantar & Alistarh, arXiv 2301.00774, Algorithm 1).

    Column by column, those to the right compensate in the output for pruning, and for rounding to a grid (section 3.5).
    """
    factor = inverse_factor(statistics.moments())
    return _propagate(weight, factor, lambda start, end, current: keep[:, start:end], 1, grid)[0]


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
    """The weight and mask of SparseGPT (arXiv 2301.00774, Algorithm 1): the mask follows the updated weights.

    The mask is chosen by w²/U_jj²: for `N:M` group by group, else 128 columns at a time. `unstructured-per-matrix`
    compares all rows, as published, `unstructured` each row. Weights of inputs that are always zero go first.
    """
    import torch

    factor = inverse_factor(gram)
    # An input that is always zero would have the power of the damping.
    sharpness = torch.where(gram.diagonal() == 0, 0.0, factor.diagonal().reciprocal())

    def choose(start: int, end: int, current: Tensor) -> Tensor:
        return pattern.mask((current * sharpness[start:end]).square(), current, sparsity, before=start)

    step = pattern.n_m[1] if pattern.n_m is not None else COLUMNS
    return _propagate(weight, factor, choose, step)


def _propagate(
    weight: Tensor, factor: Tensor, choose: Callable[[int, int, Tensor], Tensor], step: int, grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """The survivors before rounding, and the mask, by the blocked algorithm.

    `choose` gives the mask of `step` columns, start … end, from their present values.
    """
    import torch

    result = weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    width = step * max(1, COLUMNS // step)
    for left in range(0, columns, width):
        right = min(left + width, columns)
        errors = result.new_zeros(weight.shape[0], right - left)
        for column in range(left, right):
            if (column - left) % step == 0:
                end = min(column + step, right)
                mask[:, column:end] = choose(column, end, result[:, column:end])
            value, kept = result[:, column : column + 1], mask[:, column : column + 1]
            point = value * kept if grid is None else rounded(value, kept, grid.of_column(column))
            error = (value - point) / factor[column, column]
            result[:, column + 1 : right] -= error * factor[column, column + 1 : right]
            errors[:, column - left] = error.squeeze(1)
        result[:, right:] -= errors @ factor[left:right, right:]
    return keep_only(result, mask), mask


def most_steps(tokens: int | None, inputs: int) -> int:
    """Of conjugate gradients. With fewer tokens than twice the inputs further ones fit what is special in the text."""
    return FEW_STEPS if tokens is not None and tokens < 2 * inputs else STEPS


def least_squares(
    weight: Tensor, keep: Tensor, statistics: Statistics, tolerance: float = 1e-2, steps: int | None = None
) -> Tensor:
    """The survivors that minimise the layer's reconstruction error for a given mask.

    Each row w solves (H + λI)_SS ŵ_S = ((H + λI) w)_S on its support S: the minimiser of (w − ŵ)ᵀ H (w − ŵ) + λ‖w −
    ŵ‖². `ROWS` rows at once are solved by conjugate gradients with the diagonal as the preconditioner D, from the
    masked weights on. A row is done when its residual r, measured as √(rᵀD⁻¹r), has fallen to `tolerance` of its start.
    Inputs of any power count alike in this measure. Rows that are done are soon dropped. It takes `steps` at most, by
    default `most_steps`.
    """
    import torch

    result, count = torch.empty_like(weight), steps or most_steps(statistics.tokens, weight.shape[1])
    with damped(statistics.moments()) as hessian:
        for first in range(0, len(weight), ROWS):
            part = slice(first, first + ROWS)
            result[part] = _conjugate_gradients(weight[part], keep[part], hessian, tolerance, count)
    return result


def _conjugate_gradients(weight: Tensor, keep: Tensor, hessian: Tensor, tolerance: float, steps: int) -> Tensor:
    import torch

    inverse_diagonal = hessian.diagonal().reciprocal()
    mask = keep.to(weight.dtype)
    solution = torch.empty_like(weight)
    rows = torch.arange(len(weight), device=weight.device)  # in `current` and the tensors below
    current = weight * mask
    residual = ((weight - current) @ hessian).mul_(mask)
    direction = residual * inverse_diagonal
    product = (residual * direction).sum(1)
    goal = tolerance**2 * product
    for _ in range(steps):
        active = product > goal
        count = int(active.sum())
        if not count:
            break
        if count <= OPEN_SHARE * len(rows):
            solution[rows] = current
            rows, mask, current, residual, direction, product, goal = (
                tensor[active] for tensor in (rows, mask, current, residual, direction, product, goal)
            )
            active = product > goal
        image = (direction @ hessian).mul_(mask)
        curvature = (direction * image).sum(1)
        # A row that is done stands still; without the guard its 0/0 would be NaN.
        length = torch.where(active, product / curvature.clamp_min(torch.finfo(weight.dtype).tiny), 0.0).unsqueeze(1)
        current.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        preconditioned = residual * inverse_diagonal
        new_product = (residual * preconditioned).sum(1)
        ratio = new_product / product.clamp_min(torch.finfo(weight.dtype).tiny)
        direction.mul_(ratio.unsqueeze(1)).add_(preconditioned)
        product = new_product
    solution[rows] = current
    return solution


def settle(weight: Tensor, fitted: Tensor, keep: Tensor, statistics: Statistics, grid: Grid) -> Tensor:
    """Coordinate descent on the grid (QuantEase, arXiv 2309.01885, Algorithm 1) for a given mask.

    It starts at the nearest grid points. Column by column, each survivor moves to the grid point with the least damped
    reconstruction error while all others stay. No step raises the error.
    """
    # Transposed: a column lies in one piece of memory.
    goal, wishes, mask, chosen = (
        matrix.T.contiguous() for matrix in (weight, fitted, keep, rounded(fitted, keep, grid))
    )
    columns = weight.shape[1]
    with damped(statistics.moments()) as hessian:
        for _ in range(SWEEPS):
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                slope = hessian[left:right] @ (goal - chosen)
                for column in range(left, right):
                    place = column - left
                    wish = chosen[column] + slope[place] / hessian[column, column]
                    point = rounded(wish.unsqueeze(1), mask[column].unsqueeze(1), grid.of_column(column)).squeeze(1)
                    slope[place + 1 :].addr_(hessian[column + 1 : right, column], point - chosen[column], alpha=-1)
                    wishes[column], chosen[column] = wish, point
    return keep_only(wishes.T, keep)


@dataclass(frozen=True)
class FitChoice(Choice):
    apply: Callable[[Tensor, Tensor, Statistics], Tensor]  # (W, mask, statistics) -> weight
    # (W, weight of `apply`, mask, statistics, grid) -> values, whose nearest points are the result; None: of `apply`
    on_grid: Callable[[Tensor, Tensor, Tensor, Statistics, Grid], Tensor] | None = None
    moves: bool = True  # survivors change their values
    fits_block: bool = False  # then the layers of a block are fitted together, to the dense block's output
    fits_model: bool = False  # at the end all survivors are fitted to the dense model's predictions


_LEAST_SQUARES = partial(FitChoice, least_squares, settle, needs=Need.GRAM, passes=1.0)

FITS: dict[str, FitChoice] = {
    "none": FitChoice(none, help="survivors keep their values", moves=False),
    "fast": _LEAST_SQUARES(help="least squares on each layer's output"),
    "obs": FitChoice(
        obs,
        lambda weight, fitted, keep, statistics, grid: obs(weight, keep, statistics, grid),
        help="SparseGPT's error propagation",
        needs=Need.GRAM | Need.FACTOR,
        passes=1.0,
    ),
    "balanced": _LEAST_SQUARES(help="fast, then Adam on each block's output", reads=("rounds",), fits_block=True),
    "best": _LEAST_SQUARES(
        help="balanced, then Adam on the model's predictions", reads=("rounds",), fits_block=True, fits_model=True
    ),
}
