"""The settings of every stage, for the command line, recipes and Python. Field descriptions are the help texts.

Importing this package loads no torch.
"""

from gblm_compress.settings.fields import Panel, Settings, Source
from gblm_compress.settings.prune import REGISTRIES, GradientNorm, OverrideSettings, PruneSettings
from gblm_compress.settings.recipe import GATES, CompareSettings, GateSettings, Recipe
from gblm_compress.settings.stages import (
    AdviseSettings,
    BenchmarkSettings,
    CalibrationSettings,
    ComputeSettings,
    EvaluateSettings,
    ExportSettings,
    RecoverSettings,
    ResourceSettings,
)

__all__ = [
    "GATES", "REGISTRIES", "AdviseSettings", "BenchmarkSettings", "CalibrationSettings", "CompareSettings",
    "ComputeSettings", "EvaluateSettings", "ExportSettings", "GateSettings", "GradientNorm",
    "OverrideSettings", "Panel", "PruneSettings", "Recipe", "RecoverSettings", "ResourceSettings", "Settings", "Source",
]  # fmt: skip
