"""The script that lets a model write text."""

import random

import torch

from gblm_compress.models.loading import load_model, load_processor
from tests.scripts import loaded

PARAGRAPHS = [[f"w{place}." if place % 7 == 6 else f"w{place}" for place in range(60)]]


def test_pieces_start_from_nothing_with_paragraphs_and_with_sentences() -> None:
    draws = random.Random(0)
    with loaded("write_text") as script:
        starts = [script.start(PARAGRAPHS, draws) for _ in range(2000)]
        alone = {script.start([], draws) for _ in range(20)}
    share = {"nothing": 0, "paragraph": 0, "sentence": 0}
    for words in map(str.split, starts):
        kind = "nothing" if not words else "paragraph" if words[0] == "w0" else "sentence"
        share[kind] += 1
        assert len(words) in (0, *script.WORDS)
        assert kind != "sentence" or int(words[0].strip("w.")) % 7 == 0
    assert abs(share["nothing"] / 2000 - 0.25) < 0.04 and abs(share["paragraph"] / 2000 - 0.35) < 0.04
    assert alone == {""}


def test_short_lines_start_nothing() -> None:
    with loaded("write_text") as script:
        assert script.paragraphs_of("Menu About us\n\n" + "word " * 31) == [["word"] * 31]


def test_a_piece_holds_its_start_and_the_seed_decides_the_rest(tiny) -> None:
    source = tiny("llama")
    model, tokenizer = load_model(source, "bfloat16"), load_processor(source)
    with loaded("write_text") as script, torch.random.fork_rng(devices=[]):
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(script.write(model, tokenizer, ["The hares", "", "Clover"], 20, 0))
    first, second, other = runs
    assert first == second != other
    assert first[0].startswith("The hares") and first[2].startswith("Clover")
    assert len(first[0]) > len("The hares") and first[1]


def test_pieces_written_together_are_those_written_alone(tiny, monkeypatch) -> None:
    """Starts of different lengths, with the likeliest token each time, against the model without a cache."""
    source = tiny("llama")
    model, tokenizer = load_model(source, "float32"), load_processor(source)
    starts = ["The hares of the north", "Clover", ""]
    with loaded("write_text") as script:
        script.use_grouped_attention(model)
        monkeypatch.setattr(script, "LIKELIEST", 1)
        together = script.write(model, tokenizer, starts, 12, 0)
    model.set_attn_implementation("eager")
    others = [token for token in tokenizer.all_special_ids if token != 0]
    for text, piece in zip(starts, together, strict=True):
        ids = [0, *tokenizer.encode(text, add_special_tokens=False)]
        first = len(ids)
        while len(ids) < first + 12 and (len(ids) == first or ids[-1] != 0):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[others] = -torch.inf
            ids.append(int(logits.argmax()))
        assert piece == tokenizer.decode(ids[1:], skip_special_tokens=True).strip().replace("\n\n", "\n")
