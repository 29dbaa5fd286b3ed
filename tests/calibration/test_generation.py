"""Text that a model writes for itself: what is drawn, what is kept, and what stands in the way."""

from collections import Counter

import pytest
import torch

from gblm_compress.calibration import generation
from gblm_compress.calibration.generation import Author, Work, bytes_of_sample, calibration_in_place, work_of, write
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.errors import DataError, ModelError, UsageError
from gblm_compress.machine import cache_folder
from gblm_compress.models.loading import config_of, load_model
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, RecoverSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.task import fingerprint
from tests.conftest import tiny_model

END = 256


def written(progress, model=None, tokenizer=None, count=10, length=21, batch=4, seed=0) -> list[list[int]]:
    """The samples that a model writes, the tiny Llama by default."""
    work = Work(count, length, batch, seed, memory=0)
    return write(model or tiny_model("llama"), tokenizer or byte_tokenizer(), work, progress)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_top_1_the_most_likely_tokens_are_written(kind: str, progress, monkeypatch) -> None:
    monkeypatch.setattr(generation, "TOP_K", 1)
    model = tiny_model(kind)
    ((first, *got),) = written(progress, model, count=1, length=9)
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
    rows = written(progress, model, tokenizer, count=250, batch=100)
    drawn = Counter(token for row in rows for token in row)
    between = tokenizer.get_vocab()["<|endoftext|>"]
    assert {token for token in drawn if token >= END} == {between}
    assert all(row[0] == between for row in rows) and drawn[between] > len(rows)


def test_a_model_that_predicts_no_numbers_is_refused(progress) -> None:
    model = tiny_model("mistral")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="predictions are NaN or infinite"):
        written(progress, model)


def test_the_seed_decides_the_text(progress) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (written(progress, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and torch.equal(state, torch.random.get_rng_state())


def author(source, room: int = 1 << 30) -> Author:
    return Author(source, "cpu", room, Ranks(), Progress(quiet=True))


def test_a_models_own_samples_are_written_once_and_are_the_tokens_as_drawn(tiny, monkeypatch) -> None:
    source, text = tiny("llama"), CalibrationSettings(dataset="self", samples=3, sequence_length=20, seed=7)
    dtype = faster_dtype("cpu", Ranks())
    expected = written(Progress(quiet=True), load_model(source, dtype), count=3, length=20, batch=3, seed=7)
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


def test_in_a_mix_the_own_samples_go_on_from_the_others_and_come_last(tiny, tmp_path, progress) -> None:
    source, prose = tiny("llama"), tmp_path / "a.txt"
    prose.write_text("".join(f"Line {number} of no poem.\n" for number in range(40)))
    alone = {"sequence_length": 20, "seed": 3}
    read = author(source).calibration(byte_tokenizer(), CalibrationSettings(dataset=str(prose), samples=2, **alone))
    mix = CalibrationSettings(dataset=f"self=2,{prose}=1", samples=6, **alone)
    samples = author(source).calibration(byte_tokenizer(), mix)
    assert fingerprint(samples[:2]) == fingerprint(read)
    rows = [sample["input_ids"][0].tolist() for sample in samples]
    assert [row[:5] for row in rows[2:]] == [row[:5] for row in rows[:2]] * 2 and rows[0][:5] != rows[1][:5]
    assert len({tuple(row) for row in rows}) == 6 and all(len(row) == 20 for row in rows)
    model = load_model(source, faster_dtype("cpu", Ranks()))
    assert fingerprint(calibration_in_place(model, byte_tokenizer(), mix, progress)) == fingerprint(samples)


def test_in_a_mix_the_cache_keeps_the_own_samples_of_one_text(tiny, tmp_path, monkeypatch) -> None:
    source, prose = tiny("llama"), tmp_path / "a.txt"
    mix = CalibrationSettings(dataset=f"{prose},self", samples=4, sequence_length=20)
    texts = []
    for line in ("All work and no play. ", "No work, but all play. "):
        prose.write_text(line * 40)
        texts.append(fingerprint(author(source).calibration(byte_tokenizer(), mix)))
    assert texts[0] != texts[1] and author(source).cost(mix)[0] > 0
    monkeypatch.setattr("gblm_compress.models.loading.load_model", None)
    assert fingerprint(author(source).calibration(byte_tokenizer(), mix)) == texts[1]


def test_a_mix_with_fewer_own_samples_than_processes_is_refused_by_their_number(tiny) -> None:
    three = Author(tiny("llama"), "cpu", 1 << 30, Ranks(1, 3), Progress(quiet=True))
    with pytest.raises(UsageError, match="1 samples of 'self' cannot be split over 3 processes; give more --samples"):
        three.cost(CalibrationSettings(dataset="c4=5,self=1", samples=6, sequence_length=20))


def test_the_samples_of_a_mix_are_shared_by_weight() -> None:
    def counts(dataset, samples):
        text = CalibrationSettings(dataset=dataset, samples=samples)
        assert CalibrationSettings(**text.model_dump(mode="json")) == text  # as in a manifest
        return {part.datasets[0]: part.samples for part in text.parts}

    assert counts("a=b.txt=1,self=2", 192) == {"a=b.txt": 64, "self": 128}
    assert counts("c4, demo ,self", 128) == {"c4": 43, "demo": 42, "self": 43}
    assert counts("c4=0.001,self", 1001) == {"c4": 1, "self": 1000} and counts("c4", 1) == {"c4": 1}
    for dataset, message in (
        ("c4,self=2,c4", "'c4' is given twice; give it once, with a weight"),
        ("c4=0.01,self", "samples is 8, so 'c4' would give none"),
        ("c4=-1", "greater than 0"),
        ("c4=nan", "finite number|less than"),
        (" , ", "the dataset has no name"),
    ):
        with pytest.raises(ValueError, match=message):
            counts(dataset, 8)


def test_how_many_samples_are_written_at_once_depends_on_the_model_and_not_on_the_memory() -> None:
    whole = work_of(count=8, length=20, seed=0, weights=100, sample=10, room=180)
    assert whole == Work(count=8, length=20, batch=8, seed=0, memory=180)
    assert work_of(8, 20, 0, weights=100, sample=10, room=10**9) == whole
    assert work_of(8, 20, 0, weights=15, sample=10, room=10**9).batch == 3
    assert work_of(8, 20, 0, weights=1, sample=10, room=10**9).batch == 1
    with pytest.raises(UsageError, match=r"in memory as a whole, but 2\.0 GB are missing; give a text instead"):
        work_of(8, 20, 0, weights=10**9, sample=10**9, room=10**9)


def test_a_sample_takes_its_cache_and_its_logits(tiny) -> None:
    config = config_of(tiny("llama"))
    width, kept, layers = config.head_dim, config.num_key_value_heads, config.num_hidden_layers
    assert kept < config.num_attention_heads
    expected = 2 * 20 * 2 * layers * kept * width * 2 + 16 * config.vocab_size
    assert bytes_of_sample(config, 20, "bfloat16") == expected


def test_progress_counts_every_token_of_a_sample(capsys, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.progress.PLAIN_LINE_EVERY_S", 0.0)
    written(Progress(), count=4, length=6, batch=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"writing: {step}/10 steps" for step in range(1, 10)]


def test_the_models_own_text_is_no_evaluation_and_other_tasks_have_none() -> None:
    for settings, given in ((EvaluateSettings, {"dataset": "self"}), (RecoverSettings, {"disjoint_from": ("self",)})):
        with pytest.raises(ValueError, match="'self' is the model's own text"):
            settings(**given)
    for task, message in (
        ("embedding", r" that a causal language model writes; for this .* a \.txt"),
        ("image-classification", ", but the model takes images"),
    ):
        with pytest.raises(DataError, match=f"'self' is text{message}"):
            TASKS[task].data_files("self")
