"""What to expect of a model on this machine before anything is pruned: size and time of what could be made of it.

The model's first block alone, and its first few, are made and timed in the ways of `predictions.WAYS`, as far as this
machine runs them; what is pruned is pruned by magnitude. Both size and time are linear in the number of blocks, so that
the whole model follows. How good a pruned model would be, nothing here says.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import psutil
import torch

from gblm_compress.errors import GblmError, ModelError, NotEnoughMemoryError, UsageError
from gblm_compress.exporters import export
from gblm_compress.machine import environment, last_cache_bytes, replacing
from gblm_compress.measure.benchmarking import vocabulary
from gblm_compress.measure.runtimes import Generating, load_runtime
from gblm_compress.models import loading
from gblm_compress.models.architecture import find_blocks
from gblm_compress.models.files import POSITIONS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.costs import passes
from gblm_compress.pruning.placement import Size
from gblm_compress.pruning.stage import prune
from gblm_compress.runs.predictions import TARGETS, WAYS, Prediction, Way, sentences
from gblm_compress.settings import AdviseSettings, CalibrationSettings, ExportSettings, PruneSettings

PROMPT, WARM_UP, STEPS = 64, 10, 100
FEW, WEIGHTS = 5, 40_000_000
"""So many blocks are timed at least, and more as long as they have no more weights than that: noise drowns fewer."""


@dataclass(frozen=True)
class Advice:
    """The outcome.

    Attributes:
        predictions: by the target, the best first.
        left_out: {way: why it cannot be had here}.
        sentences: what follows, in words.
        pruning_seconds, pruning_memory_bytes, pruning_disk_bytes: of pruning with the settings that were asked for.
    """

    predictions: tuple[Prediction, ...]
    left_out: dict[str, str]
    sentences: tuple[str, ...]
    blocks: int
    pruning_seconds: float
    pruning_memory_bytes: int
    pruning_disk_bytes: int
    seconds: float
    environment: dict[str, Any] = field(default_factory=environment)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def advise(
    source: ModelSource,
    settings: AdviseSettings,
    pruning: PruneSettings,
    calibration: CalibrationSettings,
    *,
    progress: Progress,
) -> Advice:
    """Predict size and speed of the ways to compress a model (`predictions.WAYS`).

    Raises:
        ModelError: it is no decoder whose blocks can be left out, has one block, or is packed or exported already.
        UsageError: it has fewer positions than are timed.
        NotEnoughMemoryError: the dense model does not fit into memory.
    """
    start = time.monotonic()
    loading.check_model(source, "ask about")
    if not (task := loading.task_of(source)).generates:
        raise ModelError(f"model {source.name!r} is {task.help}, and advice is for models that generate text")
    need = 2 * source.bytes_on_disk
    if need > psutil.virtual_memory().available:
        raise NotEnoughMemoryError(
            f"model {source.name!r} is loaded whole once, which takes {need / 1e9:.1f} GB, and "
            f"{psutil.virtual_memory().available / 1e9:.1f} GB are free; ask on a larger machine"
        )
    loading.check_length(source, PROMPT + WARM_UP + STEPS, "the length that is timed")
    modules = find_blocks(loading.load_skeleton(source))[1]
    if (blocks := len(modules)) < 2:
        raise ModelError(
            f"model {source.name!r} has one block, and advice needs two to tell what each adds; benchmark it"
        )
    few_weights = WEIGHTS // sum(weight.numel() for weight in modules[0].parameters())
    numbers = (1, min(settings.blocks or max(FEW, few_weights), blocks))
    with TemporaryDirectory() as scratch:
        model, processor = loading.load_model(source), loading.load_processor(source)
        folder = Path(scratch)
        cut = {number: _cut(model, processor, number, folder / f"dense-{number}") for number in reversed(numbers)}
        del model
        forward = _whole(*numbers, blocks, *(_forward_seconds(cut[number]) for number in numbers))
        half = {number: _pruned(each, pruning, folder / f"pruned-{number}") for number, each in cut.items()}
        predictions, left_out = [], {}
        with progress.counter("trying", "ways", len(WAYS)) as advance:
            for way in WAYS:
                try:
                    folders = half if way.pruned else cut
                    predictions.append(_predict(way, folders, blocks, settings, folder))
                except GblmError as error:
                    left_out[way.name] = str(error)
                advance()
    if not predictions:
        raise UsageError(f"nothing can be made of {source.name!r} here: {next(iter(left_out.values()))}")
    predictions.sort(key=TARGETS[settings.target])
    dtype = loading.choose_dtype("auto", source, "cpu")
    size = Size(source, dtype, pruning, calibration)
    tokens = calibration.samples * calibration.sequence_length if pruning.needs_text else 0
    return Advice(
        predictions=tuple(predictions),
        left_out=left_out,
        sentences=tuple(sentences(predictions, settings.target)),
        blocks=blocks,
        pruning_seconds=forward * tokens * passes(pruning),
        pruning_memory_bytes=size.weights + size.working,
        pruning_disk_bytes=size.checkpoint + size.kept(pruning),
        seconds=time.monotonic() - start,
    )


def _cut(model: Any, processor: Any, number: int, folder: Path) -> ModelSource:
    """The model's first blocks, as a folder; the model keeps no others.

    Raises:
        ModelError: the config names no number of blocks, or others share their weights.
    """
    prefix, blocks = find_blocks(model)
    parent, _, name = prefix.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(blocks[:number]))
    config = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", None) is None:
        raise ModelError(f"{type(model).__name__}: its config names no number of blocks, so that none can be left out")
    config.num_hidden_layers = number
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, key, value[:number])
    model.save_pretrained(folder)
    loading.save_processor(processor, folder)
    return ModelSource(folder.name, folder)


def _pruned(source: ModelSource, pruning: PruneSettings, folder: Path) -> ModelSource:
    """The same, pruned by magnitude in the pattern that was asked for."""
    chosen = PruneSettings(method="magnitude", fit="none", pattern=pruning.pattern, sparsity=pruning.sparsity)
    prune(source, folder, chosen, CalibrationSettings(), progress=Progress(quiet=True))
    return ModelSource(folder.name, folder)


def _predict(
    way: Way, folders: dict[int, ModelSource], blocks: int, settings: AdviseSettings, scratch: Path
) -> Prediction:
    """Make and time both models of a way, and say what follows of the whole one."""
    threads = settings.threads or torch.get_num_threads()
    made = {number: _made(way, number, source, scratch) for number, source in folders.items()}
    few, many = sorted(made)
    whole = int(_whole(few, many, blocks, *(_bytes(way, made[each], folders[each]) for each in (few, many))))
    # Of a model that is larger than the cache, a step finds nothing there that the step before it has left.
    cache = last_cache_bytes()
    between = replacing(cache if whole > cache else 0)
    spent = {number: _step_ms(each, way.dtype, threads, between) for number, each in made.items()}
    # The slope is steepest from a fast small model to a slow large one.
    low, middle, high = (
        _whole(few, many, blocks, float(np.percentile(spent[few], small)), float(np.percentile(spent[many], large)))
        for small, large in ((90, 10), (50, 50), (10, 90))
    )
    return Prediction(way.name, way.pruned, way.bits, whole, middle, low, high)


def _made(way: Way, number: int, source: ModelSource, scratch: Path) -> ModelSource:
    """What a way makes of a model."""
    if way.export is None:
        return source
    name = f"{way.name}-{number}".replace(", ", "-").replace(" ", "-")
    artefact = ModelSource(name, scratch / name)
    export(source, artefact.folder, ExportSettings(**way.export), progress=Progress(quiet=True))
    return artefact


def _bytes(way: Way, artefact: ModelSource, source: ModelSource) -> int:
    """The bytes of an artefact in the dtype that it is run in."""
    if way.dtype == "auto":
        return artefact.bytes_on_disk
    stored, run = (getattr(torch, name).itemsize for name in (loading.stored_dtype(source), way.dtype))
    return int(artefact.bytes_on_disk * run / stored)


def _step_ms(artefact: ModelSource, dtype: str, threads: int, between: Callable[[], None]) -> list[float]:
    """Milliseconds of `STEPS` decode steps, each after `between`."""
    # One model at a time: the threads of another session that waits would take the cores.
    runtime = cast(Generating, load_runtime(artefact, dtype, "cpu", threads))
    ids = torch.randint(0, vocabulary(artefact), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    token, cache = runtime.prefill(ids)
    spent = []
    for _ in range(WARM_UP + STEPS):
        between()
        start = time.perf_counter()
        token, cache = runtime.decode(token, cache)
        spent.append(1000 * (time.perf_counter() - start))
    return spent[WARM_UP:]


def _whole(few: int, many: int, blocks: int, of_few: float, of_many: float) -> float:
    """What is linear in the number of blocks, for all of them: at least what many take, whatever noise says."""
    return max(of_many, of_few + (of_many - of_few) / (many - few) * (blocks - few))


def _forward_seconds(source: ModelSource) -> float:
    """Seconds that a forward pass of 512 tokens, or as many as the model can read, takes for a token, the least of
    three."""
    model = loading.load_model(source, "float32")
    tokens = min(512, first_of(model.config.get_text_config(), POSITIONS) or 512)
    ids = torch.arange(tokens).reshape(1, -1) % vocabulary(source)
    spent = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model(input_ids=ids)
            spent.append(time.perf_counter() - start)
    return min(spent) / tokens
