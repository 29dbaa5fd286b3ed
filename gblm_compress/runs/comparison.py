"""A grid of pruning methods, patterns and seeds on one model: what each quality costs in time and memory.

Every cell is pruned in a process of its own, so that its peak memory is its own, and recorded at once; an interrupted
comparison goes on where it stopped. All cells are evaluated against one `Reference`.
"""

import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gblm_compress import faults
from gblm_compress.errors import GblmError, ModelError, UsageError
from gblm_compress.machine.environment import environment
from gblm_compress.measure.evaluation import check as evaluate_faults
from gblm_compress.measure.evaluation import evaluate, mean_and_standard_error, prepare
from gblm_compress.measure.reference import Reference
from gblm_compress.models import finding, loading
from gblm_compress.models.source import ModelSource
from gblm_compress.printing import plain_figures, printable
from gblm_compress.progress import Progress
from gblm_compress.pruning.budgeting import planned_budgets
from gblm_compress.pruning.stage import PruneResult, prune
from gblm_compress.runs.reuse import carry_out, evaluation_hash, text_hash
from gblm_compress.settings import CalibrationSettings, CompareSettings, EvaluateSettings, PruneSettings
from gblm_compress.storage import outputs, records
from gblm_compress.tasks import text

REPORT, PLOT = "comparison.json", "comparison.png"


@dataclass(frozen=True)
class Cell:
    """One method with one pattern and one seed.

    Attributes:
        seconds, peak_memory_bytes: of pruning, loading and saving included.
        accuracy, recovery: means over the zero-shot tasks; None where none were asked for.
    """

    method: str
    pattern: str
    seed: int
    perplexity: float
    dense_perplexity: float
    mean_kl: float
    top1_agreement: float
    accuracy: float | None
    recovery: float | None
    seconds: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """A method with a pattern over all seeds: means, with standard errors over the seeds (None for one seed)."""

    method: str
    pattern: str
    seeds: int
    perplexity: float
    perplexity_error: float | None
    mean_kl: float
    mean_kl_error: float | None
    accuracy: float | None
    recovery: float | None
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class CompareResult:
    """The whole grid; `comparison.json` is this."""

    model: str
    dense_perplexity: float
    rows: list[Row]
    cells: list[Cell]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    plot: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


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
    with outputs.working_in(output, "comparison"):
        return _compare(dense, output, settings, calibration, evaluation, dtype, device, progress)


def _compare(
    dense: ModelSource | Reference,
    output: Path,
    settings: CompareSettings,
    calibration: CalibrationSettings,
    evaluation: EvaluateSettings,
    dtype: str,
    device: str,
    progress: Progress,
) -> CompareResult:
    source = dense.source if isinstance(dense, Reference) else dense
    absent = faults.collect([partial(loading.choose_device, device)])
    faults.raise_all(absent + check(source, settings, calibration, evaluation, progress))
    prepare(source, evaluation, progress)  # what a cell would find missing only after its hours of pruning
    device = loading.choose_device(device)
    with ExitStack() as stack:
        if isinstance(dense, ModelSource):
            dense = stack.enter_context(closing(Reference(dense, dtype=dtype, device=device, folder=output)))
        grid = cells(dense, output, settings, calibration, evaluation, dtype, device)
        done = [Cell(**carry_out(output, cell, progress).result) for cell in grid]
    result = CompareResult(
        model=source.name,
        dense_perplexity=done[0].dense_perplexity,
        rows=rows(done),
        cells=done,
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
) -> list[GblmError]:
    """The faults of every cell that show before the first."""
    methods = [settings.prune_settings(method, pattern) for pattern in settings.patterns for method in settings.methods]
    if export := faults.collect([partial(loading.check_model, source, "compare")]):
        return export
    looks: list[Callable[[], object]] = []
    if any(method.needs_text for method in methods):
        looks.append(partial(text.check_source, calibration.dataset))
        looks.append(partial(loading.check_length, source, calibration.sequence_length))
    found = faults.collect(looks) + evaluate_faults([source], evaluation, progress)
    if found:
        return found
    skeleton = loading.load_skeleton(source)
    return faults.collect(partial(planned_budgets, skeleton, method) for method in methods)


def rows(cells: list[Cell]) -> list[Row]:
    """The cells of each method and pattern in one row, in the order of their first cells."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.pattern), []).append(cell)
    result = []
    for (method, pattern), group in groups.items():
        perplexity, perplexity_error = mean_and_standard_error([cell.perplexity for cell in group])
        divergence, divergence_error = mean_and_standard_error([cell.mean_kl for cell in group])
        result.append(
            Row(
                method=method,
                pattern=pattern,
                seeds=len(group),
                perplexity=perplexity,
                perplexity_error=perplexity_error,
                mean_kl=divergence,
                mean_kl_error=divergence_error,
                accuracy=_mean_of_known([cell.accuracy for cell in group]),
                recovery=_mean_of_known([cell.recovery for cell in group]),
                seconds=sum(cell.seconds for cell in group) / len(group),
                peak_memory_bytes=max(cell.peak_memory_bytes for cell in group),
            )
        )
    return result


@plain_figures()
def draw(result: CompareResult, path: Path) -> None:
    """Quality against time, one panel a pattern: perplexity over seconds of pruning, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    patterns = list(dict.fromkeys(row.pattern for row in result.rows))
    figure, panels = pyplot.subplots(1, len(patterns), figsize=(6 * len(patterns), 4), squeeze=False)
    for panel, pattern in zip(panels[0], patterns, strict=True):
        for row in (row for row in result.rows if row.pattern == pattern):
            panel.errorbar(row.seconds, row.perplexity, yerr=row.perplexity_error, fmt="o", label=printable(row.method))
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


def cells(
    reference: Reference,
    output: Path,
    settings: CompareSettings,
    calibration: CalibrationSettings,
    evaluation: EvaluateSettings,
    dtype: str,
    device: str,
) -> list["GridCell"]:
    """The cells of a grid, in the order in which they are done."""
    return [
        GridCell(reference, output, method, pattern, drawn, evaluation, dtype, device)
        for pattern in settings.patterns
        for method in settings.methods
        for drawn in (calibration.model_copy(update={"seed": seed}) for seed in range(settings.seeds))
    ]


@dataclass(frozen=True)
class GridCell:
    """The stage that makes a `Cell`: one method with one pattern and one seed, pruned and evaluated.

    Attributes:
        reference: the dense model.
        output: folder of the comparison.
        calibration: with the seed of the cell.
    """

    reference: Reference
    output: Path
    method: str
    pattern: str
    calibration: CalibrationSettings
    evaluation: EvaluateSettings
    dtype: str
    device: str

    folder = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.pattern} seed {self.calibration.seed}"

    @property
    def settings(self) -> PruneSettings:
        """What its method stands for."""
        return CompareSettings.prune_settings(self.method, self.pattern)

    def inputs(self) -> list[Any]:
        texts = [text_hash(self.calibration.dataset), evaluation_hash(self.evaluation)]
        settings = [part.model_dump(mode="json") for part in (self.settings, self.calibration, self.evaluation)]
        return [self.reference.source.fingerprint, *settings, *texts, self.dtype, self.device]

    def work(self, progress: Progress) -> Cell:
        with tempfile.TemporaryDirectory(prefix=".cell-", dir=self.output) as folder:
            pruned = ModelSource(self.method, Path(folder) / "pruned")
            what = self.reference.source, pruned.folder, self.settings, self.calibration
            cost = self._in_own_process(partial(_prune, *what, self.dtype, self.device, progress.quiet))
            place = {"dtype": self.dtype, "device": self.device}
            found = evaluate(pruned, self.evaluation, baseline=self.reference, **place, progress=progress)
        assert found.baseline_perplexity is not None and found.fidelity is not None
        tasks = found.zero_shot
        return Cell(
            method=self.method,
            pattern=self.pattern,
            seed=self.calibration.seed,
            perplexity=found.perplexity,
            dense_perplexity=found.baseline_perplexity,
            mean_kl=found.fidelity.mean_kl,
            top1_agreement=found.fidelity.top1_agreement,
            accuracy=tasks.mean_accuracy if tasks else None,
            recovery=tasks.recovery.ratio if tasks and tasks.recovery else None,
            seconds=cost.seconds,
            peak_memory_bytes=cost.peak_memory_bytes,
        )

    def _in_own_process(self, prune: Callable[[], PruneResult]) -> PruneResult:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                return pool.submit(prune).result()
            except BrokenProcessPool as error:
                raise ModelError(
                    f"the process that pruned by {self.method} with {self.pattern} was killed, most likely for want "
                    "of memory; the same command goes on from here, with fewer --samples or a shorter "
                    "--sequence-length it needs less"
                ) from error


def _prune(
    source: ModelSource,
    output: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings,
    dtype: str,
    device: str,
    quiet: bool,
) -> PruneResult:
    finding.silence_libraries()
    return prune(source, output, settings, calibration, dtype=dtype, device=device, progress=Progress(quiet))


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
