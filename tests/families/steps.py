"""The steps that a family is taken through."""

from collections.abc import Callable, Collection
from pathlib import Path

from gblm_compress.errors import GblmError, first_line
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from tests.conftest import export, prune, saved
from tests.families.tiny import tiny_family

BUILD, PRUNE = "build", "prune"
STEPS = (BUILD, PRUNE, "offload", "bitmask", "onnx")
LEAST = 0.9  # of the linear weights in the blocks, routers apart, must be pruned
_APART = ("head", "embedding tied", "router", "outside the blocks")
_TEXT = "The quick brown fox jumps over the lazy dog. 0123456789 Pack my box with five dozen liquor jugs!\n" * 40


def take(name: str, folder: Path, steps: Collection[str] = STEPS) -> dict[str, str]:
    """{step: "ok", or why it is refused}. A step after one that is refused is left out.

    Pruning reopens what it wrote through transformers and counts its zeros; exports verify themselves.
    """
    dense, pruned = (ModelSource(name, folder / made) for made in ("dense", "pruned"))
    text = folder / "text.txt"
    text.write_text(_TEXT)
    outcomes: dict[str, str] = {}

    def run(output: Path, fit: str, offload: bool) -> None:
        calibration = CalibrationSettings(dataset=str(text), samples=4, sequence_length=64)
        settings, resources = PruneSettings(method="gblm", fit=fit), ResourceSettings(offload=offload)
        result = prune(dense, output, settings, calibration, resources=resources)
        apart = sum(dense.weights for dense in result.left_dense.values() if dense.reason in _APART)
        share = result.weights / (result.linear_weights - apart)
        assert share >= LEAST, f"{100 * share:.1f} % of the linear weights are pruned"

    work: dict[str, Callable[[], object]] = {
        BUILD: lambda: saved(tiny_family(name), dense.folder),
        PRUNE: lambda: run(pruned.folder, "balanced", False),
        "offload": lambda: run(folder / "streamed", "fast", True),
        "bitmask": lambda: export(pruned, folder / "bitmask", format="bitmask"),
        "onnx": lambda: export(pruned, folder / "onnx", format="onnx", graph="plain"),
    }
    for step in STEPS:
        if step not in (BUILD, PRUNE, *steps):
            continue
        try:
            work[step]()
            outcomes[step] = "ok"
        except GblmError as error:
            outcomes[step] = str(error).replace(str(folder), "…")
        except Exception as error:  # of a model that cannot be built so small, or a fault of the program
            outcomes[step] = f"{type(error).__name__}: {first_line(error)}"
        if step in (BUILD, PRUNE) and outcomes[step] != "ok":
            break
    return outcomes
