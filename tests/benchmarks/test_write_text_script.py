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
