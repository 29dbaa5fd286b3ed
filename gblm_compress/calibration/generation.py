"""Text that a model writes itself, for calibration and training (arXiv 2305.17888)."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor

from gblm_compress import __version__
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.errors import ModelError, OutputError, UsageError
from gblm_compress.machine import cache_folder, cost, keep
from gblm_compress.machine.memory import free_memory, freed_memory_kept
from gblm_compress.models import loading
from gblm_compress.models.files import HEADS, LAYERS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings, RecoverSettings
from gblm_compress.settings.fields import SELF, Source
from gblm_compress.storage import records
from gblm_compress.tasks import task_of
from gblm_compress.tasks.task import Sample
from gblm_compress.tasks.text import vocabulary_of

TOP_K = 1000  # of the most likely tokens one is drawn; 100 gave text that is too easy
TOGETHER = 64  # samples written at once, at most
BETWEEN = "<|endoftext|>"  # the separator in the training text of GPT-2, Qwen, SmolLM and others


@dataclass(frozen=True)
class Work:
    """What a model writes: `count` samples of `length` tokens, `batch` of them at once, in `memory` bytes."""

    count: int
    length: int
    batch: int
    seed: int
    memory: float


def work_of(count: int, length: int, seed: int, weights: float, sample: int, room: float) -> Work:
    """`weights`, what a `sample` takes, and the free `room` are bytes; UsageError if memory is too small."""
    # The batch decides which tokens are drawn, so it must not depend on the machine's memory.
    batch = max(1, min(count, TOGETHER, int(2 * weights // sample)))
    memory = weights + batch * sample
    if (missing := memory - room) > 0:
        raise UsageError(
            f"to write its own text, the model must be in memory as a whole, but {missing / 1e9:.1f} GB are missing; "
            "give a text instead, such as a .txt file, wikitext2 or c4"
        )
    return Work(count, length, batch, seed, memory)


def bytes_of_sample(config: Any, length: int, dtype: str) -> int:
    """Bytes of a sample while it is written: cached keys and values, their copy, and temporaries of the logits."""
    text = config.get_text_config()
    hidden, heads = (int(np.max(first_of(text, names) or 1)) for names in (WIDTHS, HEADS))
    width = (getattr(text, "head_dim", None) or hidden // heads) * (first_of(text, ("num_key_value_heads",)) or heads)
    cache = 2 * 2 * (first_of(text, LAYERS) or 1) * width * length
    return int(cache * getattr(torch, dtype).itemsize + 4 * 4 * vocabulary_of(config))


def beginnings(samples: Sequence[Sample], text: CalibrationSettings) -> Tensor | None:
    """[samples, tokens]: what each of a mix's own samples goes on from, the first quarter of another of its samples."""
    if not samples:
        return None
    tokens = max(1, text.sequence_length // 4)
    return torch.cat([samples[i % len(samples)]["input_ids"][:1, :tokens] for i in range(text.samples)])


def write(model: Any, tokenizer: Any, work: Work, progress: Progress, begun: Tensor | None = None) -> list[list[int]]:
    """The tokens of each sample. It begins with its row of `begun` [samples, tokens], by default the separator.

    It may hold several texts.
    """
    vocabulary, size, before = tokenizer.get_vocab(), model.config.get_text_config().vocab_size, model.generation_config
    names = (BETWEEN, tokenizer.bos_token, tokenizer.eos_token)
    first = next((vocabulary[name] for name in names if vocabulary.get(name, size) < size), None)
    if first is None:
        raise UsageError("the model has no token that begins a text, so it cannot write one")
    special = {each for each in (*tokenizer.all_special_ids, *range(len(tokenizer), size)) if each < size}
    begun = (torch.full((work.count, 1), first) if begun is None else begun).to(model.device)
    new, batches, rows = work.length - begun.shape[1], range(0, work.count, work.batch), list[list[int]]()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=TOP_K, suppress_tokens=[*special - {first}], max_new_tokens=new, pad_token_id=first
    )
    steps = progress.counter("writing", "steps", len(batches) * new, work.count * new)
    with torch.random.fork_rng(), chunked_attention(), steps as advance:
        torch.manual_seed(work.seed)

        def written(ids: Tensor, scores: Tensor) -> Tensor:
            """Called after each step; no sequence is complete before the last."""
            advance()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        try:
            for start in batches:
                begin = begun[start : start + work.batch]
                mask = torch.ones_like(begin)
                rows += model.generate(begin, attention_mask=mask, stopping_criteria=[written]).tolist()
        except RuntimeError as error:
            if "probability tensor" in str(error):
                raise ModelError("the model's predictions are NaN or infinite, so it cannot write") from error
            raise
        finally:
            model.generation_config = before
    return rows


def calibration_in_place(model: Any, processor: Any, text: CalibrationSettings, progress: Progress) -> list[Sample]:
    """As `Author.calibration`, for a model in memory."""
    task, samples = task_of(type(model)), list[Sample]()
    for part in text.parts:
        (dataset,), size = part.datasets, (part.samples, part.sequence_length, part.seed)
        if dataset == SELF:
            sample = bytes_of_sample(model.config, part.sequence_length, str(model.dtype).removeprefix("torch."))
            weights = model.get_memory_footprint(return_buffers=False)
            work = work_of(*size, weights, sample, weights + free_memory(str(model.device)))
            rows = write(model, processor, work, progress, beginnings(samples, part))
            samples += [{"input_ids": torch.tensor([row])} for row in rows]
        else:
            samples += task.calibration(processor, model.config, dataset, *size)
    return samples


@dataclass(frozen=True)
class Author:
    """Reads or writes the samples for a model's pruning or recovery. Each sample of `SELF` is written separately.

    Written samples stay in the cache folder, so resumed runs and runs with other settings do not write them again.
    """

    source: ModelSource
    device: str
    room: int  # bytes of memory on the device
    ranks: Ranks
    progress: Progress

    @cached_property
    def dtype(self) -> str:
        return faster_dtype(self.device, self.ranks)

    def calibration(self, processor: Any, text: CalibrationSettings) -> list[Sample]:
        """The samples of each dataset, one dataset after the other."""
        task, config, samples = loading.task_of(self.source), loading.config_of(self.source), list[Sample]()
        for part in text.parts:
            (dataset,), size = part.datasets, (part.samples, part.sequence_length, part.seed)
            if dataset == SELF:
                samples += self._written(processor, part, beginnings(samples, part))
            else:
                self.progress.say(f"reading {dataset} …")
                samples += task.calibration(processor, config, dataset, *size)
        return samples

    def training(self, processor: Any, dataset: str, settings: RecoverSettings, tokens: int) -> Sequence[Sample]:
        length = settings.sequence_length
        if dataset == SELF:
            count = tokens // length
            text = CalibrationSettings(
                dataset=(Source(dataset=SELF),), samples=count, sequence_length=length, seed=settings.seed
            )
            if not self.progress.quiet and (takes := self.cost(text))[0]:
                self.progress.say(f"to write the text first, {cost.sentence(*takes)}")
            return self.calibration(processor, text)
        self.progress.say(f"reading {dataset} …")
        task, config = loading.task_of(self.source), loading.config_of(self.source)
        return task.training(processor, config, dataset, length, tokens)

    def _written(self, tokenizer: Any, text: CalibrationSettings, begun: Tensor | None) -> list[Sample]:
        """Samples [1, tokens], the same on all ranks. Each rank writes a share."""
        count, length = text.samples, text.sequence_length
        own, work = self._own(text), self._work(text)
        begun = None if begun is None else begun[list(own)]
        place = self._place(work, begun)
        if (rows := _read(place)) is None:
            self.progress.say(f"{self.source.name} writes {count:,} samples of {length:,} tokens …")
            with freed_memory_kept():
                model = loading.load_model(self.source, self.dtype, self.device)
                rows = write(model, tokenizer, work, self.progress, begun)
            with suppress(OSError, OutputError):  # without a writable cache, the next run writes the samples again
                place.parent.mkdir(parents=True, exist_ok=True)
                records.write_sealed(place, {"rows": rows})
        with suppress(OSError):
            keep(place)
        ids = torch.zeros(count, length, dtype=torch.int64, device=self.device)
        ids[list(own)] = torch.tensor(rows, device=self.device)
        self.ranks.sum_([ids])
        return [{"input_ids": row.unsqueeze(0)} for row in ids.cpu()]

    def cost(self, text: CalibrationSettings) -> tuple[float, float]:
        """Seconds and bytes to write the missing samples, 0 if there are none; UsageError if memory is too small.

        A mix's own samples count as missing: only its other samples, not read yet, tell whether they are in the cache.
        """
        *others, last = text.parts
        if last.datasets != (SELF,) or (not others and _read(self._place(self._work(last))) is not None):
            return 0, 0
        work = self._work(last)
        # Two operations per weight, and the time of three for the rest: SmolLM2-135M, 550 tokens/s on a Zen 5's thread.
        operations = 5 * loading.count_weights(self.source) * work.count * work.length
        rate = cost.operations_per_second(self.device, getattr(torch, self.dtype))
        return operations / rate, self.source.bytes_on_disk + work.memory

    def _own(self, text: CalibrationSettings) -> Sequence[int]:
        """Which of the samples this rank writes."""
        return self.ranks.share(range(text.samples), f"samples of {SELF!r}")

    def _work(self, text: CalibrationSettings) -> Work:
        ranks, length = self.ranks, text.sequence_length
        count, seed = len(self._own(text)), (text.seed * ranks.size + ranks.rank) % 2**63
        weights = loading.count_weights(self.source) * getattr(torch, self.dtype).itemsize
        sample = bytes_of_sample(loading.config_of(self.source), length, self.dtype)
        return work_of(count, length, seed, weights, sample, self.room)

    def _place(self, work: Work, begun: Tensor | None = None) -> Path:
        versions = __version__, torch.__version__, transformers.__version__
        begins = None if begun is None else begun.tolist()
        decides = [self.source.fingerprint, asdict(work), self.dtype, self.device.partition(":")[0]]
        key = json.dumps([*decides, begins, torch.get_num_threads(), versions])
        return cache_folder() / "texts" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(place: Path) -> list[list[int]] | None:
    with suppress(OSError, ValueError):
        return cast(list[list[int]], records.read_sealed(place)["rows"])
    return None
