"""Fits: what the surviving weights become, from nothing to all that helps; and presets: procedures as published.

Both stand for settings that a user could write out, and are no code path of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FitChoice:
    """An entry of `FITS`.

    Attributes:
        help: what is fitted, as half a sentence for `--help` and the recipe reference.
        update: the update that it is.
        distillation_epochs: passes over the samples that fit all survivors to the dense model's predictions.
    """

    help: str
    update: str
    distillation_epochs: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that it stands for."""
        return {"update": self.update, "distillation_epochs": self.distillation_epochs}


FITS: dict[str, FitChoice] = {
    "none": FitChoice(help="survivors keep their values", update="none"),
    "fast": FitChoice(help="each layer's output (update least-squares)", update="least-squares"),
    "balanced": FitChoice(help="then each block's output (update reconstruct)", update="reconstruct"),
    "best": FitChoice(
        help="then the model's predictions (3 epochs of distillation)", update="reconstruct", distillation_epochs=3
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"method": "gblm", "gradient_norm": "l1", "alpha": 100.0, "alpha_scale": "published", "fit": "none"},
    "sparsegpt": {"method": "obs", "update": "obs"},
}
"""paper is GBLM (arXiv 2311.04902), sparsegpt arXiv 2301.00774."""


def describe_preset(name: str) -> str:
    """The keys that a preset stands for, in words."""
    return ", ".join(f"{key} {value}" for key, value in PRESETS[name].items())
