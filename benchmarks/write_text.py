r"""Let a model write text, on which `recover` trains where real text of its kind is short.

    python benchmarks/write_text.py demo -o written.txt --starts c4_first.txt --tokens 400k

A quarter of the pieces start from nothing, a third with the beginning of a paragraph of the starts, the others with
that of a sentence somewhere in one: 6, 10 or 16 words, which stand in the output. Tokens are drawn at temperature 1
from the 100 that are likeliest. The same seed writes the same text on the same machine.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from gblm_compress.errors import GblmError
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_argument
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.progress import Progress
from gblm_compress.settings.recover import Tokens

FROM_NOTHING, FROM_PARAGRAPHS = 0.25, 0.35
WORDS = (6, 10, 16)
LIKELIEST = 100
LEAST_WORDS = 30
"""Paragraphs with fewer are headings and menus."""


def paragraphs_of(text: str) -> list[list[str]]:
    """The words of each line that is long enough."""
    return [words for line in text.splitlines() if len(words := line.split()) > LEAST_WORDS]


def start(paragraphs: list[list[str]], draws: random.Random) -> str:
    """What a piece starts with; nothing where there are no paragraphs."""
    kind = draws.random()
    if kind < FROM_NOTHING or not paragraphs:
        return ""
    words, number = draws.choice(paragraphs), draws.choice(WORDS)
    first = 0
    if kind >= FROM_NOTHING + FROM_PARAGRAPHS:
        ends = [place + 1 for place, word in enumerate(words[:-number]) if word.endswith((".", "!", "?"))]
        first = draws.choice(ends or [0])
    return " ".join(words[first : first + number])


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention whose heads read the keys and values that they share without a copy for each.

    On CPUs torch's own takes several times as long for one new token of each of many pieces.

    Args:
        module: the layer, not needed.
        query: (pieces, heads, new tokens, width).
        key: (pieces, shared heads, tokens, width), as `value`.
        attention_mask: (pieces, 1, new tokens, tokens), added to the scores.
        dropout: not needed, as `others`.
    """
    pieces, heads, new, width = query.shape
    shared = key.shape[1]
    rows = (query * scaling).reshape(pieces * shared, -1, width)
    scores = rows @ key.flatten(0, 1).mT
    shares = (scores.reshape(pieces, -1, new, scores.shape[-1]) + attention_mask).softmax(-1)
    seen = shares.reshape(scores.shape) @ value.flatten(0, 1)
    return seen.reshape(pieces, heads, new, width).transpose(1, 2), None


def use_grouped_attention(model: Any) -> None:
    """Let the model call `grouped_attention`, with masks that are added to its scores."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)
    model.set_attn_implementation("grouped")


def write(model: Any, tokenizer: Any, starts: list[str], length: int, end: int) -> list[str]:
    """One piece for each start, of at most `length` tokens after it.

    Args:
        end: the token that stood between the texts that the model has learnt from.
    """
    rows = [[end, *tokenizer.encode(text, add_special_tokens=False)] for text in starts]
    widest = max(map(len, rows))
    others = [token for token in tokenizer.all_special_ids if token != end]  # of chats
    ids = torch.tensor([[end] * (widest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in rows])
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    drawn: list[torch.Tensor] = []
    over = torch.zeros(len(rows), dtype=torch.bool)
    with torch.inference_mode():
        while len(drawn) < length and not over.all():
            places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            logits = model(ids, attention_mask=mask, position_ids=places, logits_to_keep=1, **cache).logits[:, -1]
            logits[:, others] = -torch.inf
            likeliest, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))
            ids = tokens.gather(-1, torch.multinomial(likeliest.float().softmax(-1), 1))
            mask = torch.cat([mask, torch.ones_like(ids)], -1)
            drawn.append(ids)
            over |= ids[:, 0] == end
    pieces = []
    for row, whole in zip(rows, torch.cat(drawn, -1).tolist(), strict=True):
        new = whole[: whole.index(end)] if end in whole else whole
        pieces.append(tokenizer.decode(row[1:] + new, skip_special_tokens=True).strip().replace("\n\n", "\n"))
    return pieces


def count(text: str) -> int:
    """A number of tokens or pieces: 400000 or 400k.

    Raises:
        ArgumentTypeError: it is none, or not above 0.
    """
    try:
        return int(TypeAdapter(Tokens).validate_python(text))
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, such as 300 or 400k") from error


def main() -> None:
    """Write the file once all is drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--starts", type=Path, help="a text; without it all pieces start from nothing")
    parser.add_argument("--tokens", type=count, default=400_000)
    parser.add_argument("--length", type=count, default=300, help="tokens of a piece")
    parser.add_argument("--batch", type=count, default=96, help="pieces that are written at once")
    parser.add_argument("--end", default="<|endoftext|>", help="the token between the texts that the model learnt from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already")
    if not options.output.parent.is_dir():
        parser.error(f"no such folder: {options.output.parent}")
    if options.starts and not options.starts.is_file():
        parser.error(f"no such text: {options.starts}")
    silence_libraries()
    try:
        source = resolve_model(options.model, Progress())
    except GblmError as error:
        parser.error(str(error))
    tokenizer = loading.load_processor(source)
    if (end := tokenizer.get_vocab().get(options.end)) is None:
        parser.error(f"{options.model} has no token {options.end}; name with --end the one between its texts")
    model = loading.load_model(source, "bfloat16")
    use_grouped_attention(model)
    paragraphs = paragraphs_of(options.starts.read_text(encoding="utf-8")) if options.starts else []
    torch.manual_seed(options.seed)
    draws, pieces, begun = random.Random(options.seed), [], time.monotonic()
    rounds = -(-options.tokens // (options.batch * options.length))
    tokens = rounds * options.batch * options.length
    for _ in Progress().track(range(rounds), "writing", "rounds", tokens=tokens):
        starts = [start(paragraphs, draws) for _ in range(options.batch)]
        pieces += write(model, tokenizer, starts, options.length, end)
    partial = options.output.with_suffix(".partial")
    partial.write_text("".join(f"{piece}\n\n" for piece in pieces), encoding="utf-8")
    partial.rename(options.output)
    words = sum(len(piece.split()) for piece in pieces)
    print(f"{words:,} words in {time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
