"""The samples of a training, mixed from several datasets by weight. The seed alone decides their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from gblm_compress.calibration.generation import Author
from gblm_compress.errors import DataError
from gblm_compress.models import loading
from gblm_compress.settings import RecoverSettings
from gblm_compress.tasks import text
from gblm_compress.tasks.task import Sample

# One window in 32 is never trained on, whatever the weights, so that a second training is judged on unread windows.
HELD_OUT_EVERY, MOST_HELD_OUT = 32, 32
GRAM = 13  # words in a row that count as a copy, as for GPT-3 (arXiv 2005.14165, appendix C)
ALLOWED_OVERLAP = 0.02
MOST_OF_ANOTHER = 10_000_000  # tokens read from a hub dataset in `disjoint_from`
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Windows:
    """All samples, and the numbers of those that are held out and of those of each step."""

    samples: Sequence[Sample]
    held_out: list[int]
    steps: list[list[int]]
    overlap: dict[str, float]  # {text: share of its 13-grams that the windows hold}

    @property
    def used(self) -> set[int]:
        return {index for step in self.steps for index in step}.union(self.held_out)

    def passes(self, steps: int | None = None) -> float:
        """How often a window is read on average, in the first `steps`."""
        read = [index for step in self.steps[:steps] for index in step]
        return len(read) / max(1, len(set(read)))


def windows_of(author: Author, processor: Any, settings: RecoverSettings) -> Windows:
    """Each text gives its share of the windows; those of a short one are read again, in another order.

    `DataError` if a text has less than two windows, or overlaps too much with `disjoint_from`.
    """
    length, needed, task = settings.sequence_length, settings.steps * settings.batch, loading.task_of(author.source)
    total = sum(source.weight for source in settings.data)
    held_out: list[int] = []
    queues, count, texts = [], 0, list[Any]()
    generator = torch.Generator().manual_seed(settings.seed)
    for source in settings.data:
        share = source.weight / total
        found = author.training(processor, source.dataset, settings, int(share * needed * length) + length)
        if len(found) < 2:
            more = "a longer text or a smaller --sequence-length" if task.generates else "more"
            raise DataError(
                f"dataset {source.dataset!r} holds {len(found) or 'no'} {task.sample} of {length} tokens, and two are "
                f"needed: one to train on, one to hold out; give {more}"
            )
        numbers = range(count, count + len(found))
        aside = numbers[::HELD_OUT_EVERY]
        few = max(1, min(len(aside), int(MOST_HELD_OUT * share)))
        held_out += aside[:: -(-len(aside) // few)]
        queues.append(_shuffled([number for number in numbers if number not in aside], generator))
        count += len(found)
        texts.append(found)
    order = _mixed([Fraction(source.weight / total) for source in settings.data], queues, needed)
    steps = [order[first : first + settings.batch] for first in range(0, needed, settings.batch)]
    samples = cast(Sequence[Sample], ConcatDataset(texts))  # each is read when it is asked for
    return Windows(samples, held_out, steps, _overlap(processor, texts, settings.disjoint_from))


def _shuffled(numbers: list[int], generator: torch.Generator) -> Iterator[int]:
    """The windows of one text, without end; each pass has another order."""
    while True:
        order = torch.randperm(len(numbers), generator=generator).tolist()
        yield from (numbers[i] for i in reversed(order))


def _mixed(shares: Sequence[Fraction], texts: Sequence[Iterator[int]], needed: int) -> list[int]:
    """At any place each text has given its share, to the nearest window."""
    order, given = [], [0] * len(texts)
    for place in range(1, needed + 1):
        behind = max(range(len(texts)), key=lambda text: shares[text] * place - given[text])
        given[behind] += 1
        order.append(next(texts[behind]))
    return order


def _overlap(processor: Any, texts: Sequence[Sequence[Sample]], others: Sequence[str]) -> dict[str, float]:
    """{other text: share of its 13-grams that the texts hold}, also across windows."""
    if not others:
        return {}
    known: dict[str, int] = {}
    running = [torch.cat([window["input_ids"][0] for window in windows]) for windows in texts]
    with text.tokenizing():
        own = np.unique(np.concatenate([grams(processor.decode(ids), known) for ids in running]))
    found = {}
    for other in others:
        theirs = np.unique(grams(text.load_text(other, "evaluation", MOST_OF_ANOTHER), known))
        found[other] = float(np.isin(theirs, own).mean()) if len(theirs) else 0.0
    if much := [f"{other!r} ({100 * share:.1f} %)" for other, share in found.items() if share > ALLOWED_OVERLAP]:
        raise DataError(
            f"the data holds {GRAM}-grams of {', '.join(much)}; {100 * ALLOWED_OVERLAP:.0f} % is allowed, so that an "
            "evaluation on it says something: train on other text, or evaluate on other text"
        )
    return found


def grams(prose: str, known: dict[str, int]) -> Any:
    """64-bit hashes [words - GRAM + 1] of every `GRAM` words in a row, in lower case; adds new words to `known`."""
    words = np.array([known.setdefault(word, len(known) + 1) for word in prose.lower().split()], np.uint64)
    count = max(0, len(words) - GRAM + 1)
    found = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(GRAM):
            found = found * _FACTOR + words[place : place + count]
    return found
