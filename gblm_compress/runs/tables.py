"""The tables of a report, once for the terminal, Markdown and the page: cells have a text, and a value to sort by."""

from dataclasses import dataclass

from rich.filesize import decimal

from gblm_compress.runs.figures import Figure
from gblm_compress.runs.run_report import RunReport, number
from gblm_compress.runs.summary import ModelSummary
from gblm_compress.settings import GATES

UNMEASURED = "–"
"""What a cell says of a figure that was not measured; every table that has one explains it."""


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        value: to sort by; None sorts by the text.
        mark: "good", "bad" or nothing.
    """

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: {heading: whether it holds numbers}.
        notes: below it.
    """

    title: str
    columns: dict[str, bool]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, and what a cell without a figure means."""
        unmeasured = any(cell.text == UNMEASURED for row in self.rows for cell in row)
        return (*self.notes, *([f"{UNMEASURED} was not measured."] if unmeasured else []))


def of(report: RunReport) -> list[Table]:
    """The tables of a report that have rows."""
    tables = [
        gates(report),
        quality(report),
        speed(report),
        tasks(report),
        comparison(report),
        kernels(report),
        layers(report),
        recovery(report),
        stages(report),
    ]
    return [table for table in tables if table.rows]


def quality(report: RunReport) -> Table:
    """A row for each model: what it kept, and what it takes."""
    each = list({row.model: row for row in report.rows}.values())
    names = list(dict.fromkeys(name for row in each for name in list(row.metrics)[:1]))
    fidelity = list(dict.fromkeys(name for row in each for name in row.fidelity))
    columns = {"model": False} | dict.fromkeys(
        [*names, *(FIDELITY.get(name, name.replace("_", " ")) for name in fidelity), "nonzero", "on disk", "of dense"],
        True,
    )
    rows = []
    for row in each:
        found = report.figures(row)
        rows.append(
            [
                Cell(row.model),
                *(_metric(row, name) for name in names),
                *(_fidelity(name, found.get(name)) for name in fidelity),
                Cell(f"{100 * row.nonzero_fraction:.1f} %", row.nonzero_fraction),
                size(row.bytes_on_disk),
                Cell(f"{found['bytes_ratio'].value:.2f}×", found["bytes_ratio"].value),
            ]
        )
    errors = any(row.metrics[name].error is not None for row in each for name in names if name in row.metrics)
    notes = ("± is one standard error over the samples.",) if errors else ()
    return Table("Quality and size", columns, rows, notes)


def speed(report: RunReport) -> Table:
    """A row for each model, runtime and batch that was timed."""
    timed = [(row, row.timing, report.figures(row)) for row in report.rows if row.timing]
    generates = any("tpot_ms" in found for _, _, found in timed)
    dtypes = {row.dtype for row, _, _ in timed}
    first = "TTFT ms" if generates else "forward ms"
    columns = {"model": False, "runtime": False} | dict.fromkeys(["batch", first], True)
    columns |= dict.fromkeys(["TPOT ms", "tokens/s", "decode ×"] if generates else ["speed-up ×"], True)
    columns |= {"memory": True}
    rows = []
    for row, timing, found in timed:
        shown = ["ttft_ms"] + (["tpot_ms", "tokens_per_second"] if generates else [])
        ratio = "decode_speedup" if generates else "prefill_speedup"
        rows.append(
            [
                Cell(row.model),
                Cell(row.runtime if len(dtypes) == 1 else f"{row.runtime} {row.dtype}"),
                Cell(str(timing.batch), timing.batch),
                *(_number(found.get(name)) for name in shown),
                Cell("dense", 1.0) if row.dense else _speedup(found.get(ratio)),
                size(timing.peak_memory_bytes),
            ]
        )
    notes = [
        "Medians over the rounds; the speed-up is that over dense in the same runtime and dtype, with the interval "
        "that p10 and p90 of both span."
    ]
    if len(dtypes) == 1:
        notes.append(f"All compute in {dtypes.pop()}.")
    if untimed := [row.model for row in report.rows if row.timing is None and rows]:
        notes.append(f"Not timed: {', '.join(dict.fromkeys(untimed))}.")
    return Table("Speed and memory", columns, rows, tuple(notes))


def gates(report: RunReport) -> Table:
    """The gates."""
    rows = [
        [
            Cell(gate.gate),
            Cell(gate.subject),
            _limit(gate.gate, gate.limit),
            _limit(gate.gate, gate.measured),
            _limit(gate.gate, gate.bound) if gate.bound is not None else Cell(""),
            Cell("yes", 1, "good") if gate.passed else Cell("no", 0, "bad"),
        ]
        for gate in report.gates
    ]
    columns = {"gate": False, "of": False, "limit": True, "found": True, "worst": True, "holds": False}
    return Table("Gates", columns, rows)


def tasks(report: RunReport) -> Table:
    """Accuracies on zero-shot tasks."""
    each = {row.model: row.tasks for row in report.rows if row.tasks}
    rows = [
        [
            Cell(model),
            Cell(task.task),
            Cell(str(task.questions), task.questions),
            Cell(number(task.accuracy, task.error), task.accuracy),
            Cell(UNMEASURED if task.dense_accuracy is None else f"{task.dense_accuracy:.3f}", task.dense_accuracy),
            _speedup(None if task.recovery is None else Figure(task.recovery.ratio, task.recovery.low,
                                                               task.recovery.high)),
        ]
        for model, found in each.items()
        for task in found.tasks
    ]  # fmt: skip
    columns = {"model": False, "task": False} | dict.fromkeys(["questions", "accuracy", "dense", "recovery"], True)
    return Table("Tasks", columns, rows, ("The interval of a recovery is one of 95 %.",) if rows else ())


def comparison(report: RunReport) -> Table:
    """The grid of methods."""
    found = report.comparison
    columns = {"method": False, "pattern": False}
    columns |= dict.fromkeys(["perplexity", "KL", "seconds", "memory", "seeds"], True)
    rows = [
        [
            Cell(method.method),
            Cell(method.pattern),
            Cell(number(method.perplexity, method.perplexity_error), method.perplexity),
            Cell(number(method.mean_kl, method.mean_kl_error), method.mean_kl),
            Cell(f"{method.seconds:.0f}", method.seconds),
            size(method.peak_memory_bytes),
            Cell(str(method.seeds), method.seeds),
        ]
        for method in (found.rows if found else ())
    ]
    notes = (f"Perplexity of the dense model is {number(found.dense_perplexity)}.",) if found else ()
    return Table("Methods", columns, rows, notes)


def kernels(report: RunReport) -> Table:
    """What ran, and how often in one pass."""
    rows: list[list[Cell]] = []
    for row in report.rows:
        passes = (("prefill", row.timing.prefill_kernels), ("decode", row.timing.decode_kernels)) if row.timing else ()
        for name, ran in passes:
            for kernel, count in (ran or {}).items():
                rows.append([*map(Cell, (row.model, row.where, name, kernel)), Cell(str(count), count)])
    columns = {"model": False, "runtime": False, "pass": False, "kernel": False, "times": True}
    return Table("Kernels that ran", columns, rows)


def layers(report: RunReport) -> Table:
    """The pruned layers."""
    rows = [
        [
            Cell(layer.name),
            Cell(layer.pattern),
            Cell(f"{layer.weights:,}", layer.weights),
            Cell(f"{100 * (1 - layer.nonzeros / layer.weights):.2f}", 1 - layer.nonzeros / layer.weights),
        ]
        for layer in report.layers
    ]
    return Table("Pruned layers", {"layer": False, "pattern": False, "weights": True, "zeros %": True}, rows)


def recovery(report: RunReport) -> Table:
    """A row for each look at held-out text."""
    rows = [
        [
            Cell(f"{look.tokens:,}", look.tokens),
            Cell(number(look.held_out), look.held_out),
            Cell(f"{100 * look.moved:.1f}", look.moved),
            Cell("yes" if look.kept else "", float(look.kept)),
        ]
        for look in report.recovery
    ]
    columns = {"tokens": True, "held-out loss": True, "mask moved %": True, "kept": False}
    notes = (
        "The loss is the KL divergence from dense in nats per token, mixed with the cross-entropy of the text as in "
        "the training.",
        "The mask moved by the share of the weights that pruning kept and that are zero by now.",
    )
    return Table("Recovery", columns, rows, notes)


def stages(report: RunReport) -> Table:
    """What was done, and how long it took."""
    rows = [
        [Cell(stage.name), Cell(f"{stage.seconds:.1f}", stage.seconds), Cell("reused" if stage.reused else "done")]
        for stage in report.stages
    ]
    return Table("Stages", {"stage": False, "seconds": True, "": False}, rows)


FIDELITY = {"mean_kl": "KL", "top1_agreement": "same top-1"}


def size(count: float) -> Cell:
    """Bytes."""
    return Cell(decimal(int(count)), count)


def with_unit(value: float | None, unit: str) -> str:
    """A figure as a gate's unit has it written."""
    if value is None:
        return UNMEASURED
    if unit == "bytes":
        return decimal(int(value))
    return (
        f"{100 * value:.1f} %" if unit == "%" else f"{number(value)}{unit if unit == '×' else ' ' * bool(unit) + unit}"
    )


def unit_of(gate: str) -> str:
    """The unit of what a gate limits."""
    return GATES[gate].unit if gate in GATES else ""


def _limit(gate: str, value: float | None) -> Cell:
    return Cell(with_unit(value, unit_of(gate)), value)


def _metric(row: ModelSummary, name: str) -> Cell:
    metric = row.metrics.get(name)
    if metric is None:
        return Cell(UNMEASURED)
    return Cell(number(metric.value, metric.error), metric.value)


def _fidelity(name: str, figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(UNMEASURED)
    return Cell(f"{100 * figure.value:.1f} %" if name.endswith("agreement") else f"{figure.value:.3f}", figure.value)


def _number(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(UNMEASURED)
    return Cell(f"{figure.value:.{0 if figure.value >= 1000 else 1}f}", figure.value)


def _speedup(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(UNMEASURED)
    mark = "good" if (figure.low or 0) > 1 else "bad" if (figure.high or 2) < 1 else ""
    ends = "" if figure.low is None else f" [{figure.low:.2f}–{figure.high:.2f}]"
    return Cell(f"{figure.value:.2f}{ends}", figure.value, mark)
