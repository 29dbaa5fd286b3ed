"""Text that a model writes: what is drawn, where texts begin and end, and what stands in the way."""

from collections import Counter

import pytest
import torch

from gblm_compress.calibration import generation
from gblm_compress.calibration.generation import STARTS, Author, bytes_of_piece, generate, own_settings, texts_of, write
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.errors import DataError, GblmError, ModelError, UsageError
from gblm_compress.machine import cache_folder
from gblm_compress.models.loading import config_of, load_model
from gblm_compress.models.tiny import byte_tokenizer, tiny_model
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, GenerateSettings, RecoverSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.task import fingerprint
from tests.tasks import families

END = 256
SMALL = {"tokens": 200, "sequence_length": 20, "batch": 4}


@pytest.fixture
def starts(tmp_path):
    """Long lines that begin with their number, and lines that are too short."""
    lines = "\nMenu\n".join(f"{number} is where a line begins. " * 8 for number in range(5))
    (tmp_path / "starts.txt").write_text(f"A heading\n{lines}")
    return tmp_path / "starts.txt"


def written(progress, model=None, tokenizer=None, **settings) -> list[list[int]]:
    """The pieces that a model writes, the tiny Llama by default."""
    settings = GenerateSettings(**SMALL | settings)
    return write(model or tiny_model("llama"), tokenizer or byte_tokenizer(), settings, progress)


@pytest.fixture
def to_file(tiny, tmp_path, progress):
    """to_file("out.txt", seed=1): what the tiny Llama writes to that file of the test's own."""

    def make(name: str = "out.txt", source=None, device: str = "cpu", force: bool = False, **settings):
        return generate(source or tiny("llama"), tmp_path / name, GenerateSettings(**settings), device, progress, force)

    return make


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_top_1_the_most_likely_tokens_are_written(kind: str, progress) -> None:
    model = tiny_model(kind)
    ((first, *got),) = written(progress, model, tokens=8, sequence_length=300, top_k=1)
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
    rows = written(progress, model, tokenizer, tokens=5000, batch=100, top_k=264)
    drawn = Counter(token for row in rows for token in row)
    between = tokenizer.get_vocab()["<|endoftext|>"]
    assert {token for token in drawn if token >= END} == {between}
    assert all(row[0] == between for row in rows) and drawn[between] > len(rows)


def test_a_model_that_predicts_no_numbers_is_refused(progress) -> None:
    model = tiny_model("mistral")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="predictions are NaN or infinite"):
        written(progress, model)


def test_texts_end_at_the_token_between_them_and_hold_no_empty_line() -> None:
    tokenizer = byte_tokenizer()
    first, second = "One line\n\n \nanother", " begins with a space\n"
    row = [END, *tokenizer.encode(first), END, END, *tokenizer.encode(second)]
    assert texts_of(row, tokenizer) == ["One line\nanother", "begins with a space"]


def test_the_seed_decides_the_text(to_file, tmp_path) -> None:
    state, files = torch.random.get_rng_state(), []
    for number, seed in enumerate((1, 1, 2)):
        result = to_file(f"{number}.txt", **SMALL, seed=seed)
        files.append((tmp_path / f"{number}.txt").read_text())
    assert files[0] == files[1] != files[2] and torch.equal(state, torch.random.get_rng_state())
    assert files[2].count("\n\n") == result.texts and len(files[2].split()) == result.words
    assert result.tokens == 200 and result.seconds > 0 and result.peak_memory_bytes > 0


def test_batches_begin_with_words_of_the_text_in_turn(progress, starts) -> None:
    rows = written(progress, tokens=20 * 4 * len(STARTS), starts=str(starts))
    assert [len(row) for row in rows] == [n for length in STARTS for n in [1 + length + 20] * 4]
    for number, row in enumerate(rows[:12]):
        words = byte_tokenizer().decode(row[1 : 1 + STARTS[number // 4]])
        assert words[0].isdigit() and " is where a line begins"[: len(words) - 1] == words[1:]


def test_faults_are_found_together_before_the_model_is_loaded(to_file, tmp_path, starts, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.models.loading.load_model", None)
    with pytest.raises(UsageError, match="for causal language models, but .* is "):
        to_file(source=families.written(tmp_path / "encoder", "bert"))
    with pytest.raises(UsageError, match="starts.txt' is an input of this command"):
        to_file("./starts.txt", force=True, starts=str(starts))
    with pytest.raises(GblmError) as found:
        to_file(device="gpu", sequence_length=500, starts=str(tmp_path / "gone.txt"))
    for message in ("has 512 positions; a piece with its start is 522", "no such file", "'gpu' is not supported"):
        assert message in str(found.value)


def test_a_text_without_long_lines_is_refused(tmp_path, progress) -> None:
    (tmp_path / "menu.txt").write_text("Menu\nAbout us\n")
    with pytest.raises(DataError, match="holds no line of 160 characters"):
        written(progress, starts=str(tmp_path / "menu.txt"))


def test_a_model_that_writes_nothing_is_an_error_and_no_empty_file(to_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generation, "write", lambda *_: [[END, END, END]])
    with pytest.raises(ModelError, match="wrote only empty texts; give --starts"):
        to_file(**SMALL)
    assert not list(tmp_path.iterdir())


def author(source, room: int = 1 << 30) -> Author:
    return Author(source, "cpu", room, Ranks(), Progress(quiet=True))


def test_a_models_own_samples_are_written_once_and_are_the_tokens_as_drawn(tiny, monkeypatch) -> None:
    source, text = tiny("llama"), CalibrationSettings(dataset="self", samples=3, sequence_length=20, seed=7)
    settings = GenerateSettings(tokens=3 * 19, sequence_length=19, batch=3, top_k=1000, seed=7)
    dtype = faster_dtype("cpu", Ranks())
    expected = write(load_model(source, dtype), byte_tokenizer(), settings, Progress(quiet=True))
    assert author(source).cost(text)[0] > 0
    texts = cache_folder() / "texts"
    before = set(texts.glob("*"))
    samples = author(source).calibration(byte_tokenizer(), text)
    (kept,) = set(texts.glob("*")) - before
    assert [sample["input_ids"].tolist() for sample in samples] == [[row] for row in expected]
    assert all(row[0] == END and len(row) == 20 for row in expected)
    other = author(source).calibration(byte_tokenizer(), text.model_copy(update={"seed": 8}))
    assert fingerprint(other) != fingerprint(samples)
    with monkeypatch.context() as patch:
        patch.setattr("gblm_compress.models.loading.load_model", None)
        assert fingerprint(author(source).calibration(byte_tokenizer(), text)) == fingerprint(samples)
        assert author(source).cost(text) == (0, 0)
    kept.write_text(kept.read_text().replace(str(END), "0"))  # damaged
    assert fingerprint(author(source).calibration(byte_tokenizer(), text)) == fingerprint(samples)


def test_how_many_samples_are_written_at_once_depends_on_the_model_and_not_on_the_memory() -> None:
    whole = own_settings(count=8, length=20, seed=0, weights=100, piece=10, room=180)
    assert (whole.batch, whole.tokens, whole.piece) == (8, 8 * 19, 19)
    assert own_settings(8, 20, 0, weights=100, piece=10, room=10**9) == whole
    assert own_settings(8, 20, 0, weights=15, piece=10, room=10**9).batch == 3
    assert own_settings(8, 20, 0, weights=1, piece=10, room=10**9).batch == 1
    with pytest.raises(UsageError, match=r"in memory as a whole, but 2\.0 GB are missing; give a text instead"):
        own_settings(8, 20, 0, weights=10**9, piece=10**9, room=10**9)


def test_a_piece_takes_its_cache_and_its_logits(tiny) -> None:
    config = config_of(tiny("llama"))
    width, kept, layers = config.head_dim, config.num_key_value_heads, config.num_hidden_layers
    assert kept < config.num_attention_heads
    expected = 2 * 20 * 2 * layers * kept * width * 2 + 16 * config.vocab_size
    assert bytes_of_piece(config, 20, "bfloat16") == expected


def test_progress_counts_every_token_of_a_piece_and_the_model_keeps_its_own_settings(capsys, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.progress.PLAIN_LINE_EVERY_S", 0.0)
    model = tiny_model("llama")
    before = model.generation_config
    written(Progress(), model, tokens=20, sequence_length=5, batch=2)
    assert model.generation_config is before
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"writing: {step}/10 steps" for step in range(1, 10)]


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (EvaluateSettings, {"dataset": "self"}, "'self' is the model's own text"),
        (GenerateSettings, {"starts": "self"}, "'self' is the model's own text"),
        (RecoverSettings, {"disjoint_from": ("self",)}, "'self' is the model's own text"),
        (GenerateSettings, {"temperature": 1e-300}, "temperature"),  # no number can be divided by it
        (GenerateSettings, {"temperature": 1e300}, "temperature"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**given)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("embedding", r"'self' is text that a causal language model writes; for this .* a \.txt"),
        ("image-classification", "'self' is text, but the model takes images"),
    ],
)
def test_tasks_without_a_writing_model_ask_for_data(task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASKS[task].data_files("self")
