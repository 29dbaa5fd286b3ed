"""Text that a model writes: what is drawn, where texts begin and end, and what stands in the way."""

from collections import Counter

import pytest
import torch

from gblm_compress.calibration import generation
from gblm_compress.calibration.generation import STARTS, generate, texts_of, write
from gblm_compress.errors import DataError, GblmError, ModelError, OutputError, UsageError
from gblm_compress.models.tiny import byte_tokenizer, tiny_model
from gblm_compress.settings import GenerateSettings
from gblm_compress.storage import outputs
from tests.tasks import families

END = 256
SMALL = {"tokens": 200, "sequence_length": 20, "batch": 4}


@pytest.fixture
def starts(tmp_path):
    """Long lines that begin with their number, and lines that are too short."""
    lines = "\nMenu\n".join(f"{number} is where a line begins. " * 8 for number in range(5))
    (tmp_path / "starts.txt").write_text(f"A heading\n{lines}")
    return tmp_path / "starts.txt"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_top_1_the_most_likely_tokens_are_written(kind: str, progress) -> None:
    model, settings = tiny_model(kind), GenerateSettings(tokens=8, sequence_length=8, top_k=1)
    ((first, *got),) = write(model, byte_tokenizer(), settings, progress)
    ids = torch.tensor([[first]])
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], -1)
    assert (first, got) == (END, ids[0, 1:].tolist())


def test_only_tokens_of_text_are_drawn(progress) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|im_start|>"]})
    model = tiny_model("llama")
    model.resize_token_embeddings(264)  # more than the tokenizer has
    rows = write(model, tokenizer, GenerateSettings(tokens=2000, sequence_length=20, top_k=264), progress)
    drawn = Counter(token for row in rows for token in row)
    between = tokenizer.get_vocab()["<|endoftext|>"]
    assert {token for token in drawn if token >= END} == {between}
    assert all(row[0] == between for row in rows) and drawn[between] > len(rows)


def test_a_model_that_predicts_no_numbers_is_refused(progress) -> None:
    model = tiny_model("mistral")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="predictions are NaN or infinite"):
        write(model, byte_tokenizer(), GenerateSettings(**SMALL), progress)


def test_texts_end_at_the_token_between_them_and_hold_no_empty_line() -> None:
    tokenizer = byte_tokenizer()
    first, second = "One line\n\n \nanother", " begins with a space\n"
    row = [END, *tokenizer.encode(first), END, END, *tokenizer.encode(second)]
    assert texts_of(row, tokenizer) == ["One line\nanother", "begins with a space"]


def test_the_seed_decides_the_text(tiny, tmp_path, progress) -> None:
    state, files = torch.random.get_rng_state(), []
    for number, seed in enumerate((1, 1, 2)):
        settings = GenerateSettings(**SMALL, seed=seed)
        result = generate(tiny("llama"), tmp_path / f"{number}.txt", settings, device="cpu", progress=progress)
        files.append((tmp_path / f"{number}.txt").read_text())
    assert files[0] == files[1] != files[2] and torch.equal(state, torch.random.get_rng_state())
    assert files[2].count("\n\n") == result.texts and len(files[2].split()) == result.words
    assert result.tokens == 200 and result.seconds > 0 and result.peak_memory_bytes > 0


def test_batches_begin_with_words_of_the_text_in_turn(progress, starts) -> None:
    settings = GenerateSettings(tokens=20 * 4 * len(STARTS), sequence_length=20, batch=4, starts=str(starts))
    rows = write(tiny_model("llama"), byte_tokenizer(), settings, progress)
    assert [len(row) for row in rows] == [n for length in STARTS for n in [1 + length + 20] * 4]
    for number, row in enumerate(rows[:12]):
        words = byte_tokenizer().decode(row[1 : 1 + STARTS[number // 4]])
        assert words[0].isdigit() and " is where a line begins"[: len(words) - 1] == words[1:]


def test_faults_are_found_before_the_model_is_loaded(tiny, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.models.loading.load_model", None)
    source, out = tiny("llama"), tmp_path / "out.txt"
    (tmp_path / "kept.txt").write_text("kept")
    encoder = families.written(tmp_path / "encoder", "bert")
    for kind, message, model, output, options in (
        (UsageError, r"exists; give another file, or --force to replace it", source, tmp_path / "kept.txt", {}),
        (UsageError, r"ends in \.txt", source, tmp_path / "out.json", {}),
        (UsageError, "there is no folder", source, tmp_path / "gone" / "out.txt", {}),
        (UsageError, "for causal language models, and .* is ", encoder, out, {}),
        (UsageError, "has 512 positions; a piece with its start is 522", source, out, {"sequence_length": 500}),
        (DataError, "no such file", source, out, {"starts": str(tmp_path / "gone.txt")}),
    ):
        with pytest.raises(kind, match=message):
            generate(model, output, GenerateSettings(**options), device="cpu", progress=progress)
    wrong = GenerateSettings(sequence_length=500, starts=str(tmp_path / "gone.txt"))
    with pytest.raises(GblmError) as all_faults:
        generate(source, out, wrong, device="gpu", progress=progress)
    for message in ("512 positions", "no such file", "'gpu' is not supported"):
        assert message in str(all_faults.value)
    with outputs.TEXT.reserved(out), pytest.raises(UsageError, match="is being written by this command already"):
        generate(source, out, GenerateSettings(), device="cpu", progress=progress)
    assert (tmp_path / "kept.txt").read_text() == "kept" and not out.exists()


def test_a_text_without_long_lines_is_refused(tiny, tmp_path, progress) -> None:
    (tmp_path / "menu.txt").write_text("Menu\nAbout us\n")
    with pytest.raises(DataError, match="holds no line of 160 characters"):
        write(tiny_model("llama"), byte_tokenizer(), GenerateSettings(starts=str(tmp_path / "menu.txt")), progress)


def test_a_file_that_appears_meanwhile_is_kept(tiny, tmp_path, progress, monkeypatch) -> None:
    original, out = generation.write, tmp_path / "out.txt"
    monkeypatch.setattr(generation, "write", lambda *given: (out.write_text("mine"), original(*given))[1])
    with pytest.raises(OutputError, match="out.txt' exists; give another file"):
        generate(tiny("llama"), out, GenerateSettings(**SMALL), device="cpu", progress=progress)
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UsageError, match="out.txt' is an input of this command"):
        asked = GenerateSettings(**SMALL, starts=str(out))
        generate(tiny("llama"), tmp_path / "." / "out.txt", asked, device="cpu", progress=progress, force=True)


def test_a_text_shorter_than_a_piece_is_one_piece_of_it(progress) -> None:
    (row,) = write(tiny_model("llama"), byte_tokenizer(), GenerateSettings(tokens=5, sequence_length=300), progress)
    assert len(row) == 1 + 5


def test_a_model_that_writes_nothing_is_an_error_and_no_empty_file(tiny, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr(generation, "write", lambda *_: [[END, END, END]])
    with pytest.raises(ModelError, match="wrote nothing but ends of texts; give --starts"):
        generate(tiny("llama"), tmp_path / "out.txt", GenerateSettings(**SMALL), device="cpu", progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_a_temperature_that_no_number_can_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        GenerateSettings(temperature=temperature)


def test_the_batches_of_any_number_of_tokens_are_not_listed(progress, monkeypatch) -> None:
    monkeypatch.setattr(type(progress), "track", lambda self, items, *_: iter([]) if len(items) > 1 << 40 else items)
    settings = GenerateSettings(tokens=10**13, sequence_length=1, batch=1)
    assert write(tiny_model("llama"), byte_tokenizer(), settings, progress) == []


def test_an_interrupted_run_leaves_no_file(tiny, tmp_path, progress, monkeypatch) -> None:
    def broken(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny("llama"), tmp_path / "out.txt", GenerateSettings(**SMALL), device="cpu", progress=progress)
    assert not list(tmp_path.iterdir())
