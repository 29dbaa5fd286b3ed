"""What can be known of a recipe before its work: every fault at once, as far as the file, this machine and a model that
is here tell. Nothing is fetched, converted or computed.
"""

from collections.abc import Callable
from functools import partial

from gblm_compress import exporters, faults
from gblm_compress.calibration import text
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.measure import evaluation
from gblm_compress.measure.runtimes import check_onnx_provider
from gblm_compress.methods.patterns import DENSE, Pattern
from gblm_compress.models import loading
from gblm_compress.models.finding import find_here
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.budgeting import planned_budgets
from gblm_compress.runs import comparison
from gblm_compress.settings import Recipe

Look = Callable[[], object]


def check(recipe: Recipe, progress: Progress) -> list[GblmError]:
    """Every fault of a run that shows before it; `unchecked` says what could not be looked at."""
    here: list[ModelSource | None] = []
    looks: list[Look] = [
        lambda: here.append(find_here(recipe.model.source)),
        partial(loading.choose_device, recipe.model.device),
        partial(_check_benchmark, recipe),
        partial(_check_gates, recipe),
    ]
    if recipe.prune.needs_text:
        looks.append(partial(text.check_source, recipe.calibration.dataset))
    found = faults.collect(looks)
    if here and here[0] is not None:
        return found + check_model(recipe, here[0], progress)
    pattern = {"prune.pattern": recipe.prune.uniform_budget.pattern}
    found += faults.collect(partial(exporters.check, None, settings, pattern) for settings in recipe.export)
    return found + (evaluation.check([], recipe.evaluate, progress) if recipe.evaluate else [])


def check_model(recipe: Recipe, dense: ModelSource, progress: Progress) -> list[GblmError]:
    """The faults that the model's folder shows: its kind, its positions, its layers."""
    if export := faults.collect([partial(loading.check_model, dense, "prune")]):
        return export
    looks: list[Look] = []
    if recipe.prune.needs_text:
        length = recipe.calibration.sequence_length
        looks.append(partial(loading.check_length, dense, length, "calibration.sequence_length"))
    if recipe.benchmark is not None:
        length = recipe.benchmark.prompt + recipe.benchmark.generate
        looks.append(partial(loading.check_length, dense, length, "benchmark.prompt plus generate"))
    patterns: dict[str, Pattern] = {}
    looks.append(lambda: patterns.update(_patterns(recipe, dense)))
    found = faults.collect(looks)
    found += faults.collect(partial(exporters.check, dense, settings, patterns) for settings in recipe.export)
    if recipe.evaluate is not None and recipe.compare is not None:
        return found + comparison.check(dense, recipe.compare, recipe.calibration, recipe.evaluate, progress)
    return found + (evaluation.check([dense], recipe.evaluate, progress) if recipe.evaluate else [])


def unchecked(recipe: Recipe) -> list[str]:
    """What `check` does not look at, because it is on the hub or would have to be converted."""
    texts = [recipe.calibration.dataset] if recipe.prune.needs_text else []
    texts += [recipe.evaluate.dataset] if recipe.evaluate else []
    model = [] if find_here(recipe.model.source) else [f"model {recipe.model.source}"]
    return model + [f"text {name}" for name in dict.fromkeys(texts) if not text.is_here(name)]


def _patterns(recipe: Recipe, dense: ModelSource) -> dict[str, Pattern]:
    """{layer: pattern} of what will be pruned."""
    budgets = planned_budgets(loading.load_skeleton(dense), recipe.prune)
    return {name: budget.pattern for name, budget in budgets.items() if budget.pattern.name != DENSE}


def _check_benchmark(recipe: Recipe) -> None:
    """Raises:
    UsageError: nothing that the recipe makes is timed.
    MissingDependencyError: ONNX Runtime lacks the device.
    """
    exports_onnx = any(settings.format == "onnx" for settings in recipe.export)
    if recipe.benchmark and "torch" not in recipe.benchmark.runtimes and not exports_onnx:
        raise UsageError("benchmark.runtimes is onnxruntime alone, and no export is to onnx: nothing would be timed")
    if exports_onnx and (recipe.evaluate or (recipe.benchmark and "onnxruntime" in recipe.benchmark.runtimes)):
        check_onnx_provider(_device(recipe))


def _check_gates(recipe: Recipe) -> None:
    """Raises:
    UsageError: the artefact that the gates name is not timed.
    """
    for settings in recipe.export:
        if settings.folder_name == recipe.gates.artefact and recipe.benchmark:
            runtime = "onnxruntime" if settings.format == "onnx" else "torch"
            if runtime not in recipe.benchmark.runtimes:
                raise UsageError(f"gates.artefact {settings.folder_name!r} runs in {runtime}, which is not timed")
            if settings.format == "semi-structured" and not _device(recipe).startswith("cuda"):
                raise UsageError(f"gates.artefact {settings.folder_name!r} is timed on CUDA only")
    if recipe.gates.artefact == "pruned" and recipe.benchmark and "torch" not in recipe.benchmark.runtimes:
        raise UsageError("gates.artefact 'pruned' runs in torch, which is not timed")


def _device(recipe: Recipe) -> str:
    """Where the recipe runs; as it asks, where that is absent."""
    absent = faults.collect([partial(loading.choose_device, recipe.model.device)])
    return recipe.model.device if absent else loading.choose_device(recipe.model.device)
