"""Text that a model writes itself: to calibrate and train on, where real text of its kind is short.

The texts that a dense model draws are what it predicts best, and there is no end of them (LLM-QAT, arXiv 2305.17888).
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress import faults
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.products import faster_dtype
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import DataError, GblmError, ModelError, UsageError
from gblm_compress.machine.memory import freed_memory_kept, peak_memory
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_argument
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import GenerateSettings
from gblm_compress.storage import outputs
from gblm_compress.storage.records import write_text
from gblm_compress.tasks import data_files, text
from gblm_compress.tasks.windows import check_ids, vocabulary_of

STARTS = (8, 13, 21, 0)
"""Tokens of text that the pieces of a batch begin with, in turn, each at least once."""

FROM_PARAGRAPHS = 0.5
"""Share of the pieces that begin as a paragraph does; the others begin as a sentence within one."""

SHORTEST = 160
"""Characters of a paragraph that something begins with; what is shorter is a heading or a menu."""

BETWEEN = "<|endoftext|>"
"""What stood between the texts that GPT-2, Qwen, SmolLM and many others learnt from, whatever chats end with."""


@dataclass(frozen=True)
class GenerateResult:
    """The outcome of the stage.

    Attributes:
        file: what was written.
        texts: parted by an empty line.
        tokens: drawn, and those that pieces begin with.
        words: parted by white space.
        dtype: of the products.
        seconds: of the whole stage.
    """

    file: str
    texts: int
    tokens: int
    words: int
    dtype: str
    seconds: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Special:
    """Tokens that are no text.

    Attributes:
        first: stands before every text.
        ends: those after which another text begins.
        barred: those that are never drawn.
    """

    first: int
    ends: tuple[int, ...]
    barred: tuple[int, ...]


def generate(
    source: ModelSource,
    output: Path,
    settings: GenerateSettings,
    *,
    device: str = "auto",
    force: bool | None = None,
    progress: Progress,
) -> GenerateResult:
    """Let the model `source` write a text file; the same seed writes the same text on the same machine.

    Args:
        output: a .txt file; it appears whole or not at all.
        device: where to compute.
        force: an existing file may be replaced, as `outputs.check_file` has it.

    Raises:
        GblmError: of the kind that says what is wrong.
    """
    began = time.monotonic()
    outputs.check_file(output, ".txt", "text", force)
    loading.check_model(source, "write with")
    faults.raise_all(check(source, settings) + faults.collect([partial(loading.choose_device, device)]))
    device, tokenizer = loading.choose_device(device), loading.load_processor(source)
    special = special_tokens(tokenizer, _language_config(source), settings.start_token)
    beginnings = _beginnings(tokenizer, settings)
    dtype = faster_dtype(device, Ranks())
    pieces = -(-settings.tokens // settings.sequence_length)
    batches = _batches(pieces, settings)
    steps, drawn = len(batches) * settings.sequence_length, pieces * settings.sequence_length
    draws, texts, tokens = torch.Generator(device).manual_seed(settings.seed), [], 0
    with freed_memory_kept(), peak_memory(device) as memory, chunked_attention():
        model = loading.load_model(source, dtype, device)
        progress.say(f"writing {pieces:,} pieces of {settings.sequence_length} tokens with {source.name} on {device} …")
        with progress.counter("writing", "steps", steps, drawn) as advance:
            for number, rows in enumerate(batches):
                starts = beginnings(STARTS[number % len(STARTS)], rows)
                begin = torch.tensor([[special.first, *start] for start in starts], device=device)
                new = write(model, begin, special, settings, draws, advance)
                whole = torch.cat([begin[:, 1:], new], -1).tolist()
                texts += [each for row in whole for each in texts_of(row, special.first, tokenizer)]
                tokens += sum(map(len, whole))
    write_text(output, "".join(f"{each}\n\n" for each in texts))
    return GenerateResult(
        file=str(output),
        texts=len(texts),
        tokens=tokens,
        words=sum(len(each.split()) for each in texts),
        dtype=dtype,
        seconds=time.monotonic() - began,
        peak_memory_bytes=memory.peak_bytes,
    )


def check(source: ModelSource, settings: GenerateSettings) -> list[GblmError]:
    """What makes writing impossible, as far as it shows without the weights."""
    if not (task := loading.task_of(source)).generates:
        return [UsageError(f"generate is for causal language models, and {source.name!r} is {task.help}")]
    longest = 1 + max(STARTS) + settings.sequence_length
    looks: list[Callable[[], object]] = [
        partial(loading.check_length, source, longest, "a piece with its start"),
        lambda: special_tokens(loading.load_processor(source), _language_config(source), settings.start_token),
    ]
    if settings.starts is not None:
        looks.append(partial(data_files, settings.starts))
    return faults.collect(looks)


def special_tokens(tokenizer: Any, config: Any, named: str | None) -> Special:
    """Which tokens begin and end texts, and which are never drawn: those of chats, and numbers that are no token.

    Args:
        config: of the language model.
        named: the token that begins texts, if the user names one.

    Raises:
        UsageError: it is no token of the model, or none is named and the tokenizer has none.
    """
    vocabulary = tokenizer.get_vocab()
    if named is not None and named not in vocabulary:
        raise UsageError(f"start token {named!r} is no token of the model; give one, such as {tokenizer.eos_token}")
    first = named or next(
        (token for token in (BETWEEN, tokenizer.bos_token, tokenizer.eos_token) if token in vocabulary), None
    )
    if first is None:
        raise UsageError("the tokenizer has no token that begins texts; give a start token")
    start, size = vocabulary[first], config.vocab_size
    if start >= size:
        raise UsageError(f"start token {first!r} has the number {start}, and the model knows {size}; give another one")
    ends = {start, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    barred = {each for each in (*tokenizer.all_special_ids, *range(len(tokenizer), size)) if each < size} - ends
    return Special(start, tuple(sorted(ends)), tuple(sorted(barred)))


@torch.inference_mode()
def write(
    model: Any,
    begin: Tensor,
    special: Special,
    settings: GenerateSettings,
    draws: torch.Generator,
    advance: Callable[[], None],
) -> Tensor:
    """Tokens drawn after those of `begin`; after the end of a text another begins.

    Args:
        begin: [pieces, tokens].
        draws: where tokens are drawn from, on the model's device.
        advance: called after every step.

    Returns:
        [pieces, sequence length]; texts are parted by `special.first`.
    """
    name, ids, device = cache_argument(model), begin, begin.device
    check_ids(begin, vocabulary_of(model.config))
    ends, barred = (torch.tensor(some, dtype=torch.long, device=device) for some in (special.ends, special.barred))
    cache: dict[str, Any] = {}
    drawn: list[Tensor] = []
    for _ in range(settings.sequence_length):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        cache, logits = {name: output[name]}, output.logits[:, -1].index_fill(-1, barred, -torch.inf)
        logits, likeliest = logits.topk(min(settings.top_k, logits.shape[-1]))
        if not bool(logits[:, 0].isfinite().all()):  # NaN counts as the largest
            raise ModelError("the model's predictions are NaN or infinite, so that nothing can be drawn from them")
        choice = torch.multinomial((logits.float() / settings.temperature).softmax(-1), 1, generator=draws)
        ids = likeliest.gather(-1, choice)
        ids = torch.where(torch.isin(ids, ends), special.first, ids)
        drawn.append(ids)
        advance()
    return torch.cat(drawn, -1)


def texts_of(tokens: list[int], between: int, tokenizer: Any) -> list[str]:
    """The texts of a row of tokens, without empty lines, which part texts from each other."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == between:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = (re.sub(r"\n\s*\n", "\n", tokenizer.decode(part, skip_special_tokens=True)).strip() for part in parts)
    return [each for each in texts if each]


def _batches(pieces: int, settings: GenerateSettings) -> list[int]:
    """How many pieces each batch has: alike within one, and so many batches that every length of start has its turn."""
    turns = 1 if settings.starts is None else len(STARTS)
    number = min(pieces, max(turns, -(-pieces // settings.batch)))
    return [pieces // number + (each < pieces % number) for each in range(number)]


def _language_config(source: ModelSource) -> Any:
    return loading.config_of(source).get_text_config()


def _beginnings(tokenizer: Any, settings: GenerateSettings) -> Callable[[int, int], list[list[int]]]:
    """What gives, for a number of tokens and a number of pieces, the tokens that each piece begins with.

    Raises:
        DataError: the text of the starts cannot be read, or holds no paragraph.
    """
    if settings.starts is None:
        return lambda length, pieces: [[] for _ in range(pieces)]
    lines = text.load_text(settings.starts, "calibration", settings.tokens // 4).splitlines()
    paragraphs = [line.strip() for line in lines if len(line.strip()) >= SHORTEST]
    paragraphs = [each for each in paragraphs if len(tokenizer.encode(each, add_special_tokens=False)) >= max(STARTS)]
    if not paragraphs:
        raise DataError(f"dataset {settings.starts!r} holds no line of {SHORTEST} characters or more to begin with")
    draws = random.Random(settings.seed)

    def start(length: int) -> list[int]:
        while True:
            paragraph, first = draws.choice(paragraphs), 0
            if draws.random() >= FROM_PARAGRAPHS:
                first = draws.choice([0, *(end.end() for end in re.finditer(r"[.!?]\s+|[。！？]", paragraph))])
            tokens: list[int] = tokenizer.encode(paragraph[first:], add_special_tokens=False)[:length]
            if len(tokens) == length:
                return tokens

    return lambda length, pieces: [start(length) for _ in range(pieces)]
