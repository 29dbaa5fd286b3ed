"""Text that a model writes itself, for calibration and training (arXiv 2305.17888)."""

import hashlib
import json
import random
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from gblm_compress import __version__, errors
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.errors import DataError, GblmError, ModelError, OutputError, UsageError
from gblm_compress.machine import cache_folder, cost, keep
from gblm_compress.machine.memory import free_memory, freed_memory_kept, peak_memory
from gblm_compress.models import loading
from gblm_compress.models.files import HEADS, LAYERS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings, GenerateSettings, RecoverSettings
from gblm_compress.settings.fields import SELF
from gblm_compress.storage import outputs, records
from gblm_compress.tasks import data_files, files_of, task_of
from gblm_compress.tasks.task import Sample
from gblm_compress.tasks.text import load_text, tokenizing, vocabulary_of

STARTS = (8, 13, 21, 0)  # tokens of a line that begin a piece; each batch takes the next number
SHORTEST = 160  # characters of a usable line; a shorter one is a heading or a menu
OWN_TOP_K = 1000  # for a model's own samples; 100 gave text that is too easy
TOGETHER = 64  # samples written at once, at most
BETWEEN = "<|endoftext|>"  # the separator in the training text of GPT-2, Qwen, SmolLM and others


@dataclass(frozen=True)
class GenerateResult(records.Result):
    """`tokens` counts the drawn tokens and the given starts."""

    file: str
    texts: int
    words: int
    tokens: int
    dtype: str
    seconds: float
    peak_memory_bytes: int


def generate(
    source: ModelSource, output: Path, settings: GenerateSettings, device: str, progress: Progress, force: bool = False
) -> GenerateResult:
    """Let a causal language model write a .txt file of texts with an empty line between them."""
    began, inputs = time.monotonic(), files_of(settings.starts) if settings.starts else []
    with outputs.TEXT.reserved(output, force, inputs) as keep:
        errors.raise_all(check(source, settings) + errors.collect([partial(loading.choose_device, device)]))
        device, tokenizer = loading.choose_device(device), loading.load_processor(source)
        with freed_memory_kept(), peak_memory(device) as memory:
            dtype = faster_dtype(device, Ranks())
            if not progress.quiet:
                seconds, needed = cost_of(source, settings, dtype, device)
                less = cost.fewer(settings.tokens, seconds)
                progress.say(cost.sentence(seconds, needed, f"--tokens {less}", seconds * less / settings.tokens))
            model = loading.load_model(source, dtype, device)
            progress.say(f"writing {settings.tokens:,} tokens with {source.name} on {device} …")
            rows = write(model, tokenizer, settings, progress)
        texts = [each for row in rows for each in texts_of(row, tokenizer)]
        if not texts:
            raise ModelError(f"model {source.name!r} wrote only empty texts; give --starts, or another model")
        keep("".join(f"{each}\n\n" for each in texts))
    words, tokens, seconds = sum(len(each.split()) for each in texts), sum(map(len, rows)), time.monotonic() - began
    return GenerateResult(str(output), len(texts), words, tokens - len(rows), dtype, seconds, memory.peak_bytes)


def cost_of(source: ModelSource, settings: GenerateSettings, dtype: str, device: str) -> tuple[float, float]:
    """Seconds and bytes of the writing."""
    weights, kind = loading.count_weights(source), getattr(torch, dtype)
    # Two operations per weight, and the time of three for the rest: SmolLM2-135M, 550 tokens/s on a thread of a Zen 5.
    seconds = 5 * weights * settings.tokens / cost.operations_per_second(device, kind)
    pieces = min(settings.batch, -(-settings.tokens // settings.piece))
    piece = bytes_of_piece(loading.config_of(source), settings.piece + max(STARTS), dtype)
    return seconds, source.bytes_on_disk + kind.itemsize * weights + pieces * piece


def check(source: ModelSource, settings: GenerateSettings) -> list[GblmError]:
    """Faults that can be found without the weights."""
    if unusable := errors.collect([partial(loading.check_model, source, "write with")]):
        return unusable
    if not (task := loading.task_of(source)).generates:
        return [UsageError(f"generate is for causal language models, but {source.name!r} is {task.help}")]
    looks: list[Any] = [partial(data_files, settings.starts)] if settings.starts else []
    longest = 1 + max(STARTS) + settings.piece
    return errors.collect([partial(loading.check_length, source, longest, "a piece with its start"), *looks])


def write(model: Any, tokenizer: Any, settings: GenerateSettings, progress: Progress) -> list[list[int]]:
    """The tokens of each piece. A piece begins with the separator and may hold several texts."""
    vocabulary, size, before = tokenizer.get_vocab(), model.config.get_text_config().vocab_size, model.generation_config
    names = (BETWEEN, tokenizer.bos_token, tokenizer.eos_token)
    first = next((vocabulary[name] for name in names if vocabulary.get(name, size) < size), None)
    if first is None:
        raise UsageError("the model has no token that begins a text, so it cannot write one")
    special = {each for each in (*tokenizer.all_special_ids, *range(len(tokenizer), size)) if each < size}
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=settings.top_k, temperature=settings.temperature, suppress_tokens=[*special - {first}],
        max_new_tokens=settings.piece, pad_token_id=first,
    )  # fmt: skip
    lines, draws, rows = _lines(tokenizer, settings), random.Random(settings.seed), []
    pieces = -(-settings.tokens // settings.piece)
    batches = range(0, pieces, settings.batch)
    steps = progress.counter("writing", "steps", len(batches) * settings.piece, settings.tokens)
    with torch.random.fork_rng(), chunked_attention(), steps as advance:
        torch.manual_seed(settings.seed)

        def written(ids: Tensor, scores: Tensor) -> Tensor:
            """Called after each step; no sequence is complete before the last."""
            advance()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        try:
            for number, begun in enumerate(batches):
                length = STARTS[number % len(STARTS)] if lines else 0
                count = min(settings.batch, pieces - begun)
                starts = [draws.choice(lines)[:length] if lines else [] for _ in range(count)]
                begin = torch.tensor([[first, *start] for start in starts], device=model.device)
                mask = torch.ones_like(begin)
                rows += model.generate(begin, attention_mask=mask, stopping_criteria=[written]).tolist()
        except RuntimeError as error:
            if "probability tensor" in str(error):
                raise ModelError("the model's predictions are NaN or infinite, so it cannot write") from error
            raise
        finally:
            model.generation_config = before
    return rows


def _lines(tokenizer: Any, settings: GenerateSettings) -> list[list[int]]:
    if settings.starts is None:
        return []
    content = load_text(settings.starts, "calibration", settings.tokens // 4)
    long = [line.strip() for line in content.splitlines() if len(line.strip()) >= SHORTEST]
    with tokenizing():
        lines = [tokenizer.encode(line, add_special_tokens=False)[: max(STARTS)] for line in long]
    if not (lines := [line for line in lines if len(line) == max(STARTS)]):
        raise DataError(f"dataset {settings.starts!r} holds no line of {SHORTEST} characters or more to begin with")
    return lines


def texts_of(tokens: list[int], tokenizer: Any) -> list[str]:
    """The texts of a piece, split at its first token, without empty lines inside them."""
    with tokenizing():
        texts = tokenizer.decode(tokens).split(tokenizer.convert_ids_to_tokens(tokens[0]))
    return [each for text in texts if (each := re.sub(r"\n\s*\n", "\n", text).strip())]


def own_settings(count: int, length: int, seed: int, weights: int, piece: int, room: int) -> GenerateSettings:
    """Settings for a model's own samples. `weights`, `piece` (for a sample) and the free `room` are bytes."""
    # The batch decides which tokens are drawn, so it must not depend on the machine's memory.
    batch = max(1, min(count, TOGETHER, 2 * weights // piece))
    if (missing := weights + batch * piece - room) > 0:
        raise UsageError(
            f"to write its own text, the model must be in memory as a whole, but {missing / 1e9:.1f} GB are missing; "
            "give a text instead, such as a .txt file, wikitext2 or c4"
        )
    tokens, new = count * (length - 1), length - 1
    return GenerateSettings(tokens=tokens, sequence_length=new, batch=batch, top_k=OWN_TOP_K, seed=seed)


def bytes_of_piece(config: Any, length: int, dtype: str) -> int:
    """Bytes of a piece while it is written: cached keys and values, their copy, and temporaries of the logits."""
    text = config.get_text_config()
    hidden, heads = (int(np.max(first_of(text, names) or 1)) for names in (WIDTHS, HEADS))
    width = (getattr(text, "head_dim", None) or hidden // heads) * (first_of(text, ("num_key_value_heads",)) or heads)
    cache = 2 * 2 * (first_of(text, LAYERS) or 1) * width * length
    return int(cache * getattr(torch, dtype).itemsize + 4 * 4 * vocabulary_of(config))


def as_samples(rows: Iterable[list[int]]) -> list[Sample]:
    return [{"input_ids": torch.tensor([row])} for row in rows]


def calibration_in_place(model: Any, processor: Any, text: CalibrationSettings, progress: Progress) -> list[Sample]:
    """As `Author.calibration`, for a model in memory."""
    size = text.samples, text.sequence_length, text.seed
    if text.dataset != SELF:
        return task_of(type(model)).calibration(processor, model.config, text.dataset, *size)
    piece = bytes_of_piece(model.config, text.sequence_length, str(model.dtype).removeprefix("torch."))
    weights = model.get_memory_footprint(return_buffers=False)
    settings = own_settings(*size, weights, piece, weights + free_memory(str(model.device)))
    return as_samples(write(model, processor, settings, progress))


@dataclass(frozen=True)
class Author:
    """Reads or writes the samples for a model's pruning or recovery. Each sample of `SELF` is a separate text.

    Written samples stay in the cache folder, so resumed runs and runs with other settings do not write them again.
    """

    source: ModelSource
    device: str
    room: int  # bytes of memory on the device
    ranks: Ranks
    progress: Progress

    def calibration(self, processor: Any, text: CalibrationSettings) -> list[Sample]:
        if text.dataset == SELF:
            return self._written(processor, text)
        self.progress.say(f"reading {text.dataset} …")
        task, config = loading.task_of(self.source), loading.config_of(self.source)
        return task.calibration(processor, config, text.dataset, text.samples, text.sequence_length, text.seed)

    def training(self, processor: Any, dataset: str, settings: RecoverSettings, tokens: int) -> Sequence[Sample]:
        length = settings.sequence_length
        if dataset == SELF:
            count = tokens // length
            text = CalibrationSettings(dataset=SELF, samples=count, sequence_length=length, seed=settings.seed)
            if not self.progress.quiet and (takes := self.cost(text))[0]:
                self.progress.say(f"to write the text first, {cost.sentence(*takes)}")
            return self.calibration(processor, text)
        self.progress.say(f"reading {dataset} …")
        task, config = loading.task_of(self.source), loading.config_of(self.source)
        return task.training(processor, config, dataset, length, tokens)

    def _written(self, tokenizer: Any, text: CalibrationSettings) -> list[Sample]:
        """Samples [1, tokens], the same on all ranks. Each rank writes a share."""
        count, length = text.samples, text.sequence_length
        own, settings = self.ranks.share(range(count)), self._settings(text)
        place = self._place(settings)
        if (rows := _read(place)) is None:
            self.progress.say(f"{self.source.name} writes {count:,} samples of {length:,} tokens …")
            with freed_memory_kept():
                model = loading.load_model(self.source, self.dtype, self.device)
                rows = write(model, tokenizer, settings, self.progress)
            with suppress(OSError, OutputError):  # without a writable cache, the next run writes the samples again
                place.parent.mkdir(parents=True, exist_ok=True)
                records.write_sealed(place, {"rows": rows})
        with suppress(OSError):
            keep(place)
        ids = torch.zeros(count, length, dtype=torch.int64, device=self.device)
        ids[list(own)] = torch.tensor(rows, device=self.device)
        self.ranks.sum_([ids])
        return as_samples(ids.tolist())

    def cost(self, text: CalibrationSettings) -> tuple[float, float]:
        """Seconds and bytes to write the missing samples, 0 if there are none; UsageError if memory is too small."""
        if text.dataset == SELF and _read(self._place(settings := self._settings(text))) is None:
            return cost_of(self.source, settings, self.dtype, self.device)
        return 0, 0

    @cached_property
    def dtype(self) -> str:
        return faster_dtype(self.device, self.ranks)

    def _settings(self, text: CalibrationSettings) -> GenerateSettings:
        ranks, length = self.ranks, text.sequence_length
        count, seed = len(ranks.share(range(text.samples))), (text.seed * ranks.size + ranks.rank) % 2**63
        weights = loading.count_weights(self.source) * getattr(torch, self.dtype).itemsize
        piece = bytes_of_piece(loading.config_of(self.source), length, self.dtype)
        return own_settings(count, length, seed, weights, piece, self.room)

    def _place(self, settings: GenerateSettings) -> Path:
        versions = __version__, torch.__version__, transformers.__version__
        decides = [self.source.fingerprint, settings.model_dump(), self.dtype, self.device.partition(":")[0]]
        key = json.dumps([*decides, torch.get_num_threads(), versions])
        return cache_folder() / "texts" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(place: Path) -> list[list[int]] | None:
    try:
        rows: list[list[int]] = records.read_sealed(place)["rows"]
    except (OSError, ValueError):
        return None
    return rows
