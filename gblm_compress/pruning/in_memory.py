"""Pruning a model in memory, in place."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from torch import nn

from gblm_compress.calibration.block_weights import ResidentWeights
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.products import dtype_for_fits, with_fit_dtype
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import OutputError, UsageError, is_out_of_memory
from gblm_compress.machine.memory import peak_memory
from gblm_compress.models.experts import run_all_, unfused
from gblm_compress.models.loading import check_positions
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.placement import SHARE_OF_FREE_MEMORY
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.saving import LeftDense, left_dense_of
from gblm_compress.pruning.stage import PruneResult, check_guidance
from gblm_compress.pruning.walk import Walk
from gblm_compress.settings import CalibrationSettings, PruneSettings
from gblm_compress.tasks import task_of
from gblm_compress.tasks.task import Sample, fingerprint, on_device


def prune_in_place(
    model: Any, processor: Any, settings: PruneSettings, calibration: CalibrationSettings, progress: Progress
) -> PruneResult:
    """Prune a transformers model where it is, on its device and in its dtype. It is put into eval mode.

    Args:
        processor: for the calibration data; may be None for a method that needs none.

    Raises:
        GblmError: as `prune_`; the text cannot be read or is too short, or there is no tokenizer for it.
    """
    start = time.perf_counter()
    samples: list[Sample] = []
    if settings.needs_text:
        task = task_of(type(model))
        if processor is None:
            raise UsageError(f"method {settings.method} reads data: give the {task.processor.name} of the model")
        task.check_processor(processor)
        if task.generates:
            check_positions(type(model).__name__, model.config.to_dict(), calibration.sequence_length)
        size = calibration.samples, calibration.sequence_length, calibration.seed
        samples = task.calibration(processor, model.config, calibration.dataset, *size)
    model.eval()
    samples = [on_device(sample, model.device) for sample in samples]
    with peak_memory(str(model.device)) as memory, unfused(model):
        if settings.guidance:
            check_guidance(model)
        if calibration.experts == "all":
            run_all_(model)
        layers, left_dense = _prune(model, samples, settings, progress)
    return PruneResult(
        folder=None,
        layers=layers,
        left_dense=left_dense,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=memory.peak_bytes,
        calibration_fingerprint=fingerprint(samples) if samples else None,
        grid=settings.grid,
    )


def prune_(
    model: nn.Module, samples: Sequence[Sample], settings: PruneSettings, progress: Progress
) -> dict[str, LayerResult]:
    """Prune a model in memory, in place.

    Args:
        model: a model in eval mode; its class says what it is for.
        samples: of its task, on its device; may be empty for a method that needs no text.
        settings: what to prune and how.

    Returns:
        {layer name: what became of it}.

    Raises:
        ModelError: a value is NaN or infinite, or architecture or task is not supported.
        UsageError: a width does not divide by M, or a name pattern matches nothing.
        OutputError: the disk does not take what is kept meanwhile.
    """
    with unfused(model):
        return _prune(model, samples, settings, progress)[0]


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder for the gradients and the pruned weights of blocks.

    Raises:
        OutputError: the disk does not take them.
    """
    with tempfile.TemporaryDirectory(prefix="gblm-") as folder:
        try:
            yield folder
        except (OSError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise OutputError(
                f"{folder!r} cannot be written ({getattr(error, 'strerror', None) or error}); gradients and pruned "
                "weights are kept there meanwhile: make room, or name another folder in TMPDIR"
            ) from error


def _prune(
    model: nn.Module, samples: Sequence[Sample], settings: PruneSettings, progress: Progress
) -> tuple[dict[str, LayerResult], dict[str, LeftDense]]:
    with _scratch_folder() as folder:
        run = RunFolder(Path(folder) / "run", {}, resume=False, ranks=Ranks())
        budget = int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)
        device = next(model.parameters()).device
        if "fit_dtype" in settings.read:
            settings = with_fit_dtype(settings, str(device), Ranks())
            dtype_for_fits(str(model.dtype).removeprefix("torch."), settings, asked=True)
        pool = StatePool(run.states, budget, device)
        walk = Walk(ResidentWeights(model), task_of(type(model)), samples, settings, run, pool, progress, Ranks())
        layers = walk.prune_()
        return layers, left_dense_of(model, settings, layers, run.budgets or {})
