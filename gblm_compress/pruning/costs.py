"""What settings cost, and which ones would do more."""

from collections.abc import Collection

from gblm_compress.methods.allocation import ALLOCATIONS
from gblm_compress.methods.choices import Need
from gblm_compress.methods.fits import FITS
from gblm_compress.settings import PruneSettings


def better_fit(settings: PruneSettings, able: Collection[str] = tuple(FITS)) -> str | None:
    """The fit among `able` that is the next to do more for the survivors than these settings; None if none does."""
    if settings.distillation_epochs:
        return None
    order = ("best",) if settings.fits_blocks else ("balanced", "fast") if not settings.updates else ("balanced",)
    return next((name for name in order if name in able), None)


MASKS: dict[str, dict[str, float]] = {
    "none": {"gblm": 119.6, "wanda": 116.0, "obs": 105.2, "regional": 125.9},
    "fast": {"gblm": 52.4, "wanda": 51.9, "obs": 50.0, "regional": 56.3},
    "balanced": {"gblm": 43.8, "wanda": 43.6, "obs": 43.7, "regional": 46.3},
    "best": {"gblm": 42.0, "wanda": 41.7, "obs": 43.7, "regional": 43.8},
}
"""{fit: {method: perplexity}} of SmolLM2-135M at 2:4: benchmarks/results/fits-2-4-smollm2-135m.json."""

NOISE = 0.05
"""Perplexities that are no further apart than this share do not rank two methods: single ties decide between them."""


def better_method(settings: PruneSettings) -> str | None:
    """The method whose mask was clearly better than that of these settings under the same fit; None if none was."""
    as_measured = settings.pattern == "2:4" and settings.refine == "none" and not settings.grid
    measured = MASKS.get(settings.fit or "", {}) if as_measured else {}
    best = min(measured, key=measured.__getitem__, default=settings.method)
    return best if measured.get(settings.method, 0.0) * (1 - NOISE) > measured.get(best, 0.0) else None


def passes(settings: PruneSettings) -> float:
    """About how many forward passes over the calibration text the settings cost, for an estimate of time.

    A backward pass counts as two forward ones; Gram matrices and the solutions on them as one each, which they are in
    a block whose width is a few times smaller than the text is long.
    """
    count = 1.0  # loading and saving
    count += 3.0 if settings.needs_gradients else 2.0 * settings.runs_backward
    count += _measuring(settings.block_needs) + _measuring(ALLOCATIONS[settings.allocation].needs)
    count += sum(choice.passes for choice in settings.choices)
    if settings.fits_blocks:
        count += 1.0 + 3.0 * settings.reconstruction_epochs * settings.reconstruction_rounds
    if settings.distillation_epochs:
        count += 1.0 + 4.0 * settings.distillation_epochs
    return count


def _measuring(needs: Need) -> float:
    """Passes of one walk over the blocks that measures this."""
    return 2.0 * bool(needs & Need.BLOCKS) + 3.0 * (Need.REGIONAL in needs) + 1.0 * (Need.GRAM in needs)
