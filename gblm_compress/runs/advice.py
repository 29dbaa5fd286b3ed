"""Advice before any pruning: size and speed of each way to compress a model on this machine.

Two models with random weights, of one block and of a few blocks of the model's shapes, are made and timed in every way.
Size and time are linear in the blocks, and so predicted for the whole model. Quality is not measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gblm_compress.errors import GblmError, ModelError, UsageError
from gblm_compress.exporters import export
from gblm_compress.kernels import cpu
from gblm_compress.machine import busy_cores, environment, last_cache_bytes, replacing
from gblm_compress.measure.runtimes import Runtime, load_runtime
from gblm_compress.measure.timings import Spread
from gblm_compress.models import loading
from gblm_compress.models.architecture import find_blocks
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import PruneJob, prune
from gblm_compress.settings import AdviseSettings, ExportSettings, PruneSettings
from gblm_compress.storage import records
from gblm_compress.tasks.text import vocabulary_of

PROMPT, WARM_UP, STEPS = 64, 10, 100
FEW, WEIGHTS = 5, 40_000_000
"""The fewest blocks, and weights, to time; fewer would drown in noise. A small model is timed whole."""
WORTH = 1.15
"""A gain below this is not worth the quality that pruning takes."""
WAYS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "dense, torch float32": ("dense", "float32", None),
    "dense, torch bfloat16": ("dense", "bfloat16", None),
    "dense, ONNX float32": ("dense", "auto", {"format": "onnx", "dtype": "float32"}),
    "dense, ONNX int8": ("quantised", "auto", {"format": "onnx", "quantise": "int8"}),
    "dense, ONNX int8, own kernels": ("quantised", "auto", {"format": "onnx", "quantise": "int8", "kernels": True}),
    "dense, ONNX int4": ("quantised", "auto", {"format": "onnx", "quantise": "int4"}),
    "packed, torch bitmask": ("pruned", "auto", {"format": "bitmask"}),
    "packed, torch bitmask-int8": ("pruned", "auto", {"format": "bitmask-int8"}),
    "packed, ONNX float16": ("pruned", "auto", {"format": "onnx", "dtype": "float16", "kernels": True}),
    "packed, ONNX int8": ("pruned", "auto", {"format": "onnx", "quantise": "int8", "kernels": True}),
    "packed, ONNX int4": ("pruned", "auto", {"format": "onnx", "quantise": "int4", "kernels": True}),
}
"""{way: kind, dtype in torch, settings of its export}."""


@dataclass(frozen=True)
class Prediction:
    """The whole model in one way: bytes of weights, and milliseconds per decode step with p10 and p90."""

    name: str
    kind: str
    bytes: int
    ms_per_token: float
    low: float
    high: float
    export: dict[str, Any] | None = None  # settings


@dataclass(frozen=True)
class Advice(records.Result):
    """The predictions, best first; the advised one; the ways that do not work here, with the reason; and the words."""

    predictions: tuple[Prediction, ...]
    advised: Prediction | None  # None: nothing is clearly faster
    left_out: dict[str, str]
    sentences: tuple[str, ...]
    blocks: int
    seconds: float
    environment: dict[str, Any] = field(default_factory=environment)


def advise(source: ModelSource, settings: AdviseSettings, *, progress: Progress) -> Advice:
    start = time.monotonic()
    loading.check_model(source, "ask about")
    if not (task := loading.task_of(source)).generates:
        raise ModelError(f"model {source.name!r} is {task.help}, and advice is for models that generate text")
    loading.check_length(source, PROMPT + WARM_UP + STEPS, "the length that is timed")
    blocks = find_blocks(loading.load_skeleton(source))[1]
    if (settings.blocks or 0) > max(2, len(blocks)):
        raise UsageError(f"blocks {settings.blocks}: model {source.name!r} has {len(blocks)}; give at most that many")
    weights = sum(weight.numel() for weight in blocks[0].parameters())
    few = settings.blocks or max(2, min(max(FEW, WEIGHTS // weights), len(blocks)))
    predictions, left_out = [], {}
    with TemporaryDirectory() as folder:
        cuts = {number: _cut(source, number, settings, Path(folder)) for number in (1, few)}
        with progress.counter("trying", "ways", len(WAYS)) as advance:
            for way in WAYS:
                try:
                    predictions.append(_predict(way, cuts, len(blocks), settings.threads or torch.get_num_threads()))
                except GblmError as error:
                    left_out[way] = str(error)
                advance()
    if not predictions:
        raise UsageError(f"no way works for {source.name!r} here: {next(iter(left_out.values()))}")
    predictions.sort(key=lambda each: each.ms_per_token)
    said, best = tuple(sentences(predictions)), advised(predictions)
    return Advice(tuple(predictions), best, left_out, said, len(blocks), time.monotonic() - start)


def _cut(source: ModelSource, number: int, settings: AdviseSettings, folder: Path) -> dict[bool, ModelSource]:
    """Models of so many blocks with random weights, by whether they are pruned."""
    skeleton = loading.load_skeleton(source)
    config = skeleton.config.get_text_config()
    if (blocks := getattr(config, "num_hidden_layers", None)) is None:
        raise ModelError(f"{type(skeleton).__name__}: its config names no number of blocks, so it cannot be cut")
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == blocks:
            setattr(config, key, [value[n % blocks] for n in range(number)])
    config.num_hidden_layers = number
    dense, pruned = (ModelSource(f"{kind}-{number}", folder / f"{kind}-{number}") for kind in ("dense", "pruned"))
    model = type(skeleton)(skeleton.config).to(getattr(torch, loading.stored_dtype(source)))
    model.save_pretrained(dense.folder)
    loading.save_processor(loading.load_processor(source), dense.folder)
    chosen = PruneSettings(method="magnitude", fit="none", pattern=settings.pattern, sparsity=settings.sparsity)
    prune(PruneJob(dense, chosen), pruned.folder, Progress(quiet=True))
    return {False: dense, True: pruned}


def _predict(way: str, cuts: dict[int, dict[bool, ModelSource]], blocks: int, threads: int) -> Prediction:
    kind, dtype, exported = WAYS[way]
    made, size = [], []
    for number, cut in cuts.items():
        source = artefact = cut[kind == "pruned"]
        if exported is not None:
            artefact = ModelSource(way, source.folder.parent / f"{way}-{number}".replace(", ", "-").replace(" ", "-"))
            export(source, artefact.folder, ExportSettings(**exported), progress=Progress(quiet=True))
        stored, run = loading.stored_dtype(source), dtype if exported is None else loading.stored_dtype(source)
        size.append(artefact.bytes_on_disk * getattr(torch, run).itemsize / getattr(torch, stored).itemsize)
        made.append(artefact)
    few, many = cuts

    def whole(of_few: float, of_many: float) -> float:
        slope = max(0.0, of_many - of_few) / (many - few)
        return of_many + slope * (blocks - many)

    # A step of a model larger than the cache finds nothing there from the step before.
    total, cache = int(whole(*size)), last_cache_bytes()
    short, long = (_step_ms(each, dtype, threads, replacing(cache if total > cache else 0)) for each in made)
    # The slope is steepest from a fast small model to a slow large one, least the other way round.
    middle = whole(short.median, long.median)
    ends = sorted((whole(short.p90, long.p10), middle, whole(short.p10, long.p90)))
    return Prediction(way, kind, total, middle, ends[0], ends[-1], exported)


def _step_ms(artefact: ModelSource, dtype: str, threads: int, between: Callable[[], object]) -> Spread:
    runtime: Runtime = load_runtime(artefact, dtype, "cpu", threads)
    vocabulary = vocabulary_of(loading.config_of(artefact))
    ids = torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    token, cache = runtime.next_token(ids, None)
    spent = []
    for _ in range(WARM_UP + STEPS):
        between()
        start = time.perf_counter()
        token, cache = runtime.next_token(token, cache)
        spent.append(1000 * (time.perf_counter() - start))
    return Spread.of(spent[WARM_UP:])


def advised(predictions: Sequence[Prediction]) -> Prediction | None:
    """The way that is worth its loss of quality, unless ranges overlap. The fastest prediction comes first."""
    pair = _compared(predictions)
    return pair[0] if pair and pair[0].high < pair[1].low else None


def _compared(predictions: Sequence[Prediction]) -> tuple[Prediction, Prediction] | None:
    kinds = ("pruned", "dense", "quantised")
    pruned, dense, quantised = (next((p for p in predictions if p.kind == kind), None) for kind in kinds)
    for one, other in ((pruned, next((p for p in predictions if p.kind != "pruned"), None)), (quantised, dense)):
        if one and other and other.ms_per_token / one.ms_per_token >= WORTH:
            return one, other
    return None


def sentences(predictions: Sequence[Prediction]) -> Iterator[str]:
    """The advice in words."""
    if pair := _compared(predictions):
        one, other = pair
        said = f"{one.name} needs {one.ms_per_token / other.ms_per_token:.2f} times the time of {other.name}"
        if advised(predictions) is None:
            ranges = " and ".join(f"{each.name} {each.low:.1f}–{each.high:.1f}" for each in pair)
            said = f"Unclear, as the ranges overlap: {ranges} ms per token; ask again, or measure with `benchmark`"
        loss = " `evaluate` measures the loss of quality." if one.kind == "pruned" else ""
        yield f"Does {'pruning' if loss else 'quantisation alone'} pay here? {said}.{loss}"
    elif rival := next((each for each in predictions if each.kind != "pruned"), None):
        yield f"Leave the model as it is: nothing is clearly faster than {rival.name}."
    if busy_cores() > 0.5:
        yield "Other programs were running: ask again on a quiet machine before you trust the times."
    if not cpu.available():
        yield "This package's kernels were not built, so packed layers are unpacked for every product."
