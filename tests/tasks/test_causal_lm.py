import random
from unittest.mock import Mock

import pytest
import tokenizers
import torch

from gblm_compress.errors import DataError, ModelError
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.tasks.passages import Row, encode
from gblm_compress.tasks.text import consecutive_windows, drawn_windows, tokenize
from tests.conftest import tiny_config
from tests.tasks import families

TOKENIZER, VOCABULARY = byte_tokenizer(), 257


@pytest.fixture
def letters(tmp_path) -> str:
    """A text of 1,000 tokens."""
    (tmp_path / "letters.txt").write_text("abcdefghij" * 100)
    return str(tmp_path / "letters.txt")


def test_windows_are_drawn_as_the_reference_draws_them_or_do_not_overlap(letters) -> None:
    generator = random.Random(7)
    starts = [generator.randint(0, 1000 - 64 - 1) for _ in range(5)]
    ids = tokenize(TOKENIZER, VOCABULARY, "abcdefghij" * 100)
    found = drawn_windows(TOKENIZER, VOCABULARY, letters, 5, 64, 7)
    assert torch.equal(torch.cat(found), torch.stack([ids[start : start + 64] for start in starts]))
    windows = torch.cat(consecutive_windows(TOKENIZER, VOCABULARY, letters, "evaluation", 300, None))
    assert torch.equal(windows, ids[:900].view(3, 300))
    short = pytest.raises(DataError, match="letters.txt' gives 1000 tokens, but one window needs 1001; give a longer")
    with short:
        drawn_windows(TOKENIZER, VOCABULARY, letters, 3, 1000, 0)
    with short:
        consecutive_windows(TOKENIZER, VOCABULARY, letters, "evaluation", 1001, 1)


def test_c4_is_drawn_document_by_document_as_the_reference_does(monkeypatch) -> None:
    """The loop of GBLM-Pruner's lib/data.py (get_c4), on documents of which some are too short."""
    documents = [{"text": f"{i:02} " * (3 + 7 * (i % 4))} for i in range(20)]
    dataset = Mock(return_value=documents)
    monkeypatch.setattr("datasets.load_dataset", dataset)
    generator = random.Random(3)
    expected = []
    for _ in range(6):
        while True:
            ids = TOKENIZER(documents[generator.randint(0, 19)]["text"])["input_ids"]
            if len(ids) > 30:
                break
        i = generator.randint(0, len(ids) - 30 - 1)
        expected.append(ids[i : i + 30])
    windows = drawn_windows(TOKENIZER, VOCABULARY, "c4", 6, 30, 3)
    assert [window[0].tolist() for window in windows] == expected
    shard = {"part": "en/c4-train.00000-of-01024.json.gz"}
    dataset.assert_called_once_with(path="allenai/c4", data_files=shard, split="part", streaming=False)
    monkeypatch.setattr("gblm_compress.tasks.text.DRAWS", 50)
    with pytest.raises(DataError, match="none of 50 random documents has more than 500 tokens"):
        drawn_windows(TOKENIZER, VOCABULARY, "c4", 1, 500, 3)


def test_a_text_is_tokenized_whole_and_ids_beyond_the_embeddings_are_refused(monkeypatch) -> None:
    message = r"gives the token id 257, but the model has embeddings for 257 tokens, 0 to 256; .*resize"
    tokenizer = byte_tokenizer()
    assert len(tokenize(tokenizer, 257, "é" * 3000)) == 6000 and len(tokenize(tokenizer, 257, "")) == 0
    tokenizer.add_tokens(["<new>"])
    assert tokenize(tokenizer, 258, "a <new>")[-1] == 257
    with pytest.raises(ModelError, match=message):
        tokenize(tokenizer, 257, "a <new>")
    monkeypatch.setattr("datasets.load_dataset", lambda **arguments: [{"text": "a <new> " * 20}])
    with pytest.raises(ModelError, match=message):
        drawn_windows(tokenizer, 257, "c4", 1, 8, 0)


def test_a_tokenizer_that_panics_is_a_fault_of_the_model() -> None:
    """Of its library, a pattern that gives up on a text raises no Exception."""
    pattern, words = tokenizers.Regex("(a+)+$"), "a" * 40 + "b"
    tokenizer = families.tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(pattern, "b")
    row, config = Row((words,)), tiny_config("llama")
    for use in (
        lambda: tokenize(tokenizer, VOCABULARY, words),
        lambda: encode(tokenizer, config, [row], 64, pad=True),
        lambda: encode(tokenizer, config, [row], 64, pad=False),
    ):
        with pytest.raises(ModelError, match=r"the tokenizer fails on a text \(Onig: .*limit.*\); use the original"):
            use()
