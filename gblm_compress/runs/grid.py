"""The cells of a comparison: one method with one pattern and one seed each, pruned and evaluated.

Every cell is pruned in a process of its own, so that its peak memory is its own.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gblm_compress.errors import ModelError
from gblm_compress.measure import zero_shot
from gblm_compress.measure.evaluation import Reference, evaluate
from gblm_compress.models import finding
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import PruneResult, prune
from gblm_compress.runs.cells import Cell
from gblm_compress.runs.reuse import data_hash
from gblm_compress.settings import CalibrationSettings, CompareSettings, EvaluateSettings, PruneSettings


def stages_of(
    reference: Reference,
    output: Path,
    settings: CompareSettings,
    calibration: CalibrationSettings,
    evaluation: EvaluateSettings,
    dtype: str,
    device: str,
) -> list["CellStage"]:
    """The stages that make the cells of a grid, in their order."""
    return [
        CellStage(reference, output, method, pattern, drawn, evaluation, dtype, device)
        for pattern in settings.patterns
        for method in settings.methods
        for drawn in (calibration.model_copy(update={"seed": seed}) for seed in range(settings.seeds))
    ]


@dataclass(frozen=True)
class CellStage:
    """The stage that makes a `Cell`.

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

    place = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.pattern} seed {self.calibration.seed}"

    @property
    def settings(self) -> PruneSettings:
        """What its method stands for."""
        return CompareSettings.prune_settings(self.method, self.pattern)

    def inputs(self) -> list[Any]:
        texts = [data_hash(self.calibration.dataset), data_hash(self.evaluation.dataset)]
        tasks = zero_shot.fingerprint(self.evaluation.tasks, self.evaluation.include_path)
        settings = [part.model_dump(mode="json") for part in (self.settings, self.calibration, self.evaluation)]
        return [self.reference.source.fingerprint, *settings, *texts, tasks, self.dtype, self.device]

    def work(self, progress: Progress) -> Cell:
        with tempfile.TemporaryDirectory(prefix=".cell-", dir=self.output) as folder:
            pruned = ModelSource(self.method, Path(folder) / "pruned")
            what = self.reference.source, pruned.folder, self.settings, self.calibration
            cost = self._in_own_process(partial(_prune, *what, self.dtype, self.device, progress.quiet))
            place = {"dtype": self.dtype, "device": self.device}
            found = evaluate(pruned, self.evaluation, baseline=self.reference, **place, progress=progress)
        assert found.baseline is not None and found.fidelity is not None
        tasks = found.zero_shot
        return Cell(
            method=self.method,
            pattern=self.pattern,
            seed=self.calibration.seed,
            perplexity=found.metrics["perplexity"].value,
            dense_perplexity=found.baseline["perplexity"].value,
            mean_kl=found.fidelity["mean_kl"],
            top1_agreement=found.fidelity["top1_agreement"],
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
