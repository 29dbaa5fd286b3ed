"""The comparison of pruning methods and patterns on one model: what each quality costs in time and memory.

It is a grid with a cell for each seed (see `grid`), summarised for each method and pattern in a table and a plot. All
cells are evaluated against one `Reference`, and recorded at once; an interrupted comparison goes on where it stopped.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from gblm_compress import errors
from gblm_compress.errors import GblmError, UsageError
from gblm_compress.machine import environment
from gblm_compress.measure.evaluation import Reference, prepare
from gblm_compress.measure.evaluation import check as evaluate_faults
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import plain_figures, printable
from gblm_compress.progress import Progress
from gblm_compress.pruning.budgeting import skeleton_budgets
from gblm_compress.runs import grid
from gblm_compress.runs.cells import Cell, CompareResult, summarise
from gblm_compress.runs.reuse import carry_out
from gblm_compress.settings import CalibrationSettings, CompareSettings, EvaluateSettings
from gblm_compress.storage import outputs, records

REPORT, PLOT = "comparison.json", "comparison.png"


def compare(
    dense: ModelSource | Reference,
    output: Path,
    settings: CompareSettings,
    calibration: CalibrationSettings,
    evaluation: EvaluateSettings,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress,
) -> CompareResult:
    """Prune and evaluate every method with every pattern and seed, and write table and plot to `output`.

    Args:
        dense: the model; a `Reference` to it computes once what this and other evaluations need.
        output: folder of the records; cells that are on record there with the same settings are not run again.
        calibration: seeds 0, 1, … take the place of its own.

    Raises:
        GblmError: of the first cell that fails; those before it stay on record.
    """
    with outputs.working_in(output, "comparison"), ExitStack() as stack:
        source = dense.source if isinstance(dense, Reference) else dense
        absent = errors.collect([partial(loading.choose_device, device)])
        errors.raise_all(absent + check(source, settings, calibration, evaluation, progress))
        prepare(source, evaluation, progress)  # what a cell would find missing only after its hours of pruning
        device = loading.choose_device(device)
        if isinstance(dense, ModelSource):
            dense = stack.enter_context(closing(Reference(dense, dtype=dtype, device=device, folder=output)))
        stages = grid.stages_of(dense, output, settings, calibration, evaluation, dtype, device)
        cells = [Cell(**carry_out(output, stage, progress).result) for stage in stages]
        result = CompareResult(
            model=source.name,
            dense_perplexity=cells[0].dense_perplexity,
            rows=summarise(cells),
            cells=cells,
            calibration=calibration.model_dump(mode="json", exclude={"seed"}),
            evaluation=evaluation.model_dump(mode="json"),
            environment=environment(),
            plot=str(output / PLOT),
        )
        draw(result, output / PLOT)
        records.write_text(output / REPORT, records.as_json(result.as_dict()))
        return result


def check(
    source: ModelSource,
    settings: CompareSettings,
    calibration: CalibrationSettings,
    evaluation: EvaluateSettings,
    progress: Progress,
    *,
    text_is_given: bool = True,
) -> list[GblmError]:
    """The faults of every cell that show before the first.

    Args:
        text_is_given: whether the text of the calibration is there already.
    """
    methods = [settings.prune_settings(method, pattern) for pattern in settings.patterns for method in settings.methods]
    if export := errors.collect([partial(loading.check_model, source, "compare")]):
        return export
    task = loading.task_of(source)
    if not task.generates:
        return [UsageError(f"compare measures perplexity, which {task.help} has none of; prune and evaluate it")]
    looks: list[Callable[[], object]] = []
    if any(method.needs_text for method in methods):
        if text_is_given:
            looks.append(partial(task.data_files, calibration.dataset))
        looks.append(partial(loading.check_length, source, calibration.sequence_length))
    found = errors.collect(looks) + evaluate_faults([source], evaluation, progress)
    if found:
        return found
    skeleton = loading.load_skeleton(source)
    return errors.collect(partial(skeleton_budgets, skeleton, method) for method in methods)


@plain_figures()
def draw(result: CompareResult, path: Path) -> None:
    """Quality against time, one panel a pattern: perplexity over seconds of pruning, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    patterns = list(dict.fromkeys(method.pattern for method in result.rows))
    figure, panels = pyplot.subplots(1, len(patterns), figsize=(6 * len(patterns), 4), squeeze=False)
    for panel, pattern in zip(panels[0], patterns, strict=True):
        for method in (method for method in result.rows if method.pattern == pattern):
            error, label = method.perplexity_error, printable(method.method)
            panel.errorbar(method.seconds, method.perplexity, yerr=error, fmt="o", label=label)
        panel.axhline(result.dense_perplexity, linestyle="--", color="grey")
        panel.set(xscale="log", yscale="log", title=pattern, xlabel="seconds of pruning", ylabel="perplexity")
        panel.legend(bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
        for axis in (panel.xaxis, panel.yaxis):
            low, high = axis.get_view_interval()
            steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
            axis.set_major_locator(ticker.LogLocator(subs=steps))
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(ticker.NullLocator())
    figure.suptitle(f"{printable(result.model)} (dense: dashed)")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
