"""What settings cost, and which preset would do more."""

from collections.abc import Collection

from gblm_compress.methods.presets import PRESETS
from gblm_compress.methods.saliency import SALIENCIES
from gblm_compress.settings import PruneSettings


def better(settings: PruneSettings, able: Collection[str] = tuple(PRESETS)) -> str | None:
    """The preset among `able` that is the next to do more for the survivors than these settings; None if none does."""
    does_more = {"none": ("balanced", "fast"), "reconstruct": ("best",)}.get(settings.update, ("balanced",))
    if settings.distillation_epochs:
        does_more = ()
    return next((name for name in does_more if name in able), None)


def passes(settings: PruneSettings) -> float:
    """About how many forward passes over the calibration text the settings cost, for an estimate of time.

    A backward pass counts as two forward ones; Gram matrices and the solutions on them as one each, which they are in
    a block whose width is a few times smaller than the text is long.
    """
    saliency = SALIENCIES[settings.method]
    count = 1.0  # loading and saving
    count += 3.0 * settings.needs_gradients + 2.0 * settings.needs_blocks + 3.0 * saliency.needs_regional
    count += 1.0 * settings.needs_gram + 1.0 * (settings.update != "none") + 2.0 * (settings.allocation == "owl")
    if settings.update == "reconstruct":
        count += 1.0 + 3.0 * settings.reconstruction_epochs * settings.reconstruction_rounds
    if settings.distillation_epochs:
        count += 1.0 + 4.0 * settings.distillation_epochs
    return count
