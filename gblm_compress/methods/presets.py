"""Presets: tested combinations of the choices, as the settings that a user could write out."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "obs", "update": "least-squares"},
    "balanced": {"method": "obs", "update": "reconstruct", "fit_dtype": "bfloat16"},
    "best": {"method": "obs", "update": "reconstruct", "distillation_epochs": 3, "fit_dtype": "bfloat16"},
}


def describe(name: str) -> str:
    """The keys that a preset stands for, in words."""
    return ", ".join(f"{key} {value}" for key, value in PRESETS[name].items())
