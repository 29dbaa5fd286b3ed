"""Text that a model writes itself, for calibration and training (arXiv 2305.17888)."""

import random
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gblm_compress import errors
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.errors import DataError, GblmError, ModelError, UsageError
from gblm_compress.machine import cost
from gblm_compress.machine.memory import freed_memory_kept, peak_memory
from gblm_compress.models import loading
from gblm_compress.models.files import HEADS, LAYERS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import GenerateSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks import data_files, files_of
from gblm_compress.tasks.text import load_text, tokenizing

STARTS = (8, 13, 21, 0)  # tokens of a line that begin the pieces of a batch, in turn
SHORTEST = 160  # characters of a usable line; a shorter one is a heading or a menu
BETWEEN = "<|endoftext|>"  # the separator in the training text of GPT-2, Qwen, SmolLM and others


@dataclass(frozen=True)
class GenerateResult:
    """`tokens` counts the drawn tokens and the given starts."""

    file: str
    texts: int
    words: int
    tokens: int
    dtype: str
    seconds: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    source: ModelSource, output: Path, settings: GenerateSettings, device: str, progress: Progress, force: bool = False
) -> GenerateResult:
    """Let a causal language model write a .txt file, with an empty line between two texts."""
    began, inputs = time.monotonic(), files_of(settings.starts) if settings.starts else []
    with outputs.TEXT.reserved(output, force, inputs) as keep:
        errors.raise_all(check(source, settings) + errors.collect([partial(loading.choose_device, device)]))
        device, tokenizer = loading.choose_device(device), loading.load_processor(source)
        with freed_memory_kept(), peak_memory(device) as memory:
            dtype = faster_dtype(device, Ranks())
            if not progress.quiet:
                progress.say(_estimate(source, settings, dtype, device))
            model = loading.load_model(source, dtype, device)
            progress.say(f"writing {settings.tokens:,} tokens with {source.name} on {device} …")
            rows = write(model, tokenizer, settings, progress)
        texts = [each for row in rows for each in texts_of(row, tokenizer)]
        if not texts:
            raise ModelError(f"model {source.name!r} wrote nothing but ends of texts; give --starts, or another model")
        keep("".join(f"{each}\n\n" for each in texts))
    words, tokens, seconds = sum(len(each.split()) for each in texts), sum(map(len, rows)), time.monotonic() - began
    return GenerateResult(str(output), len(texts), words, tokens - len(rows), dtype, seconds, memory.peak_bytes)


def _estimate(source: ModelSource, settings: GenerateSettings, dtype: str, device: str) -> str:
    """A token costs two operations a weight; products as flat as a batch and the rest of a step take longer than that.

    SmolLM2-135M wrote 550 tokens a second on one thread of a Zen 5, which is five operations a weight.
    """
    weights, kind, config = loading.count_weights(source), getattr(torch, dtype), loading.config_of(source)
    text = config.get_text_config()
    seconds = 5 * weights * settings.tokens / cost.operations_per_second(device, kind)
    width = first_of(text, WIDTHS) * (first_of(text, ("num_key_value_heads",)) or 1) // (first_of(text, HEADS) or 1)
    pieces = min(settings.batch, -(-settings.tokens // settings.piece))
    cache = 2 * 2 * (first_of(text, LAYERS) or 1) * width * pieces * (settings.piece + max(STARTS))  # and its copy
    memory = (
        source.bytes_on_disk + kind.itemsize * (weights + cache) + 4 * 4 * pieces * text.vocab_size
    )  # and draws from logits
    tokens = cost.fewer(settings.tokens, seconds)
    return cost.sentence(seconds, memory, f"--tokens {tokens}", seconds * tokens / settings.tokens)


def check(source: ModelSource, settings: GenerateSettings) -> list[GblmError]:
    """Faults that show without the weights."""
    if unusable := errors.collect([partial(loading.check_model, source, "write with")]):
        return unusable
    if not (task := loading.task_of(source)).generates:
        return [UsageError(f"generate is for causal language models, and {source.name!r} is {task.help}")]
    looks: list[Any] = [partial(data_files, settings.starts)] if settings.starts else []
    longest = 1 + max(STARTS) + settings.piece
    return errors.collect([partial(loading.check_length, source, longest, "a piece with its start"), *looks])


def write(model: Any, tokenizer: Any, settings: GenerateSettings, progress: Progress) -> list[list[int]]:
    """The tokens of each piece. A piece begins with the separator and may hold several texts."""
    from transformers import GenerationConfig

    vocabulary, size = tokenizer.get_vocab(), model.config.get_text_config().vocab_size
    names = (BETWEEN, tokenizer.bos_token, tokenizer.eos_token)
    first = next((vocabulary[name] for name in names if vocabulary.get(name, size) < size), None)
    if first is None:
        raise UsageError("the model has no token that begins texts, and cannot write any")
    special = {each for each in (*tokenizer.all_special_ids, *range(len(tokenizer), size)) if each < size}
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=settings.top_k, temperature=settings.temperature, suppress_tokens=[*special - {first}],
        max_new_tokens=settings.piece, pad_token_id=first,
    )  # fmt: skip
    lines, draws, rows = _lines(tokenizer, settings), random.Random(settings.seed), []
    pieces = -(-settings.tokens // settings.piece)
    batches = range(0, pieces, settings.batch)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for number, begun in enumerate(progress.track(batches, "writing", "batches", settings.tokens)):
            length = STARTS[number % len(STARTS)] if lines else 0
            count = min(settings.batch, pieces - begun)
            starts = [draws.choice(lines)[:length] if lines else [] for _ in range(count)]
            begin = torch.tensor([[first, *start] for start in starts], device=model.device)
            try:
                rows += model.generate(begin, attention_mask=torch.ones_like(begin)).tolist()
            except RuntimeError as error:
                if "probability tensor" in str(error):
                    raise ModelError("the model's predictions are NaN or infinite; it cannot write") from error
                raise
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
