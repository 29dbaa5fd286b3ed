import random

import pytest
import torch

from gblm_compress.errors import DataError, ModelError
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.tasks.causal_lm import calibration_windows, consecutive_windows, random_windows
from gblm_compress.tasks.text import tokenize


def test_windows_are_drawn_as_the_reference_draws_them() -> None:
    generator = random.Random(7)
    expected = [generator.randint(0, 1000 - 64 - 1) for _ in range(5)]
    found = torch.cat(random_windows(torch.arange(1000), 5, 64, 7, "x"))
    assert found[:, 0].tolist() == expected and (found.diff(dim=1) == 1).all() and found.shape == (5, 64)


def test_c4_is_drawn_document_by_document_as_the_reference_does(monkeypatch) -> None:
    """The loop of GBLM-Pruner's lib/data.py (get_c4), on documents of which some are too short."""
    tokenizer = byte_tokenizer()
    documents = [{"text": f"{i:02} " * (3 + 7 * (i % 4))} for i in range(20)]
    asked = []

    def dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return documents

    monkeypatch.setattr("datasets.load_dataset", dataset)
    generator = random.Random(3)
    expected = []
    for _ in range(6):
        while True:
            ids = tokenizer(documents[generator.randint(0, 19)]["text"])["input_ids"]
            if len(ids) > 30:
                break
        i = generator.randint(0, len(ids) - 30 - 1)
        expected.append(ids[i : i + 30])
    windows = calibration_windows(tokenizer, 257, "c4", 6, 30, 3)
    assert [window[0].tolist() for window in windows] == expected
    shard = {"part": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [(("allenai/c4",), {"data_files": shard, "split": "part", "streaming": False})]
    monkeypatch.setattr("gblm_compress.tasks.causal_lm.DRAWS", 50)
    with pytest.raises(DataError, match="none of 50 documents drawn has more than 500 tokens"):
        calibration_windows(tokenizer, 257, "c4", 1, 500, 3)


def test_consecutive_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = consecutive_windows(torch.arange(35), 8, None, "x")
    assert windows.flatten().tolist() == list(range(32)) and windows.shape == (4, 8)
    assert consecutive_windows(torch.arange(35), 8, 2, "x").shape == (2, 8)


@pytest.mark.parametrize("cut", [random_windows, consecutive_windows])
def test_a_text_shorter_than_a_window_is_refused(cut) -> None:
    arguments = (3, 64, 0) if cut is random_windows else (64, None)
    with pytest.raises(DataError, match="'short' gives 10 tokens, but one window needs 6"):
        cut(torch.arange(10), *arguments, "short")


def test_a_text_is_tokenized_whole_and_ids_beyond_the_embeddings_are_refused(monkeypatch) -> None:
    message = r"gives the token id 257, but the model has embeddings for 257 tokens, 0 to 256; .*resize"
    tokenizer = byte_tokenizer()
    assert len(tokenize(tokenizer, 257, "é" * 3000)) == 6000 and len(tokenize(tokenizer, 257, "")) == 0
    tokenizer.add_tokens(["<new>"])
    assert tokenize(tokenizer, 258, "a <new>")[-1] == 257
    with pytest.raises(ModelError, match=message):
        tokenize(tokenizer, 257, "a <new>")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: [{"text": "a <new> " * 20}])
    with pytest.raises(ModelError, match=message):
        calibration_windows(tokenizer, 257, "c4", 1, 8, 0)
