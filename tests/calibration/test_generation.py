"""Text that a model writes: what is drawn, where texts begin and end, and what stands in the way."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import gblm_compress
from gblm_compress.calibration import generation
from gblm_compress.calibration.generation import STARTS, Special, generate, special_tokens, texts_of, write
from gblm_compress.errors import DataError, GblmError, ModelError, UsageError
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer, tiny_config, tiny_model
from gblm_compress.progress import Progress
from gblm_compress.settings import GenerateSettings
from tests.conftest import ARCHITECTURES
from tests.families.tiny import tiny_family
from tests.tasks import families

END = 256
SMALL = {"tokens": 200, "sequence_length": 20, "batch": 4}


def drawn(model: torch.nn.Module, begin: Tensor, special: Special, seed: int = 0, **settings: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return write(model, begin, special, GenerateSettings(**settings), generator, lambda: None)


@pytest.fixture
def prose(tmp_path) -> Path:
    """Paragraphs whose sentences begin with their number, and lines that are too short."""
    path = tmp_path / "starts.txt"
    lines = [" ".join(f"{p}{s} is where sentence {s} of them begins." for s in "abcdef") for p in range(5)]
    path.write_text("A heading\n" + "\nMenu\n".join(lines))
    return path


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_likeliest_tokens_are_those_without_a_cache(kind: str) -> None:
    model, begin = tiny_model(kind), torch.tensor([[END, 65, 66], [END, 97, 98]])
    barred = tuple(range(0, 256, 3))
    got = drawn(model, begin, Special(END, (END,), barred), top_k=1, sequence_length=12)
    ids = begin
    for _ in range(12):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        logits[:, list(barred)] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], -1)
    assert torch.equal(got, ids[:, 3:])


def test_a_state_is_handed_on_as_a_cache_is() -> None:
    model, begin = tiny_family("rwkv").eval(), torch.tensor([[END, 65, 66]])
    got, ids = drawn(model, begin, Special(END, (END,), ()), top_k=1, sequence_length=6), begin
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], -1)
    assert torch.equal(got, ids[:, 3:])


def test_what_nothing_can_be_drawn_from_is_told() -> None:
    model = tiny_model("mistral")  # whose head is not its embedding
    with pytest.raises(ModelError, match="gives the token id 300, but the model has embeddings for 257"):
        drawn(model, torch.tensor([[END, 300]]), Special(END, (END,), ()), sequence_length=4)
    free = drawn(model, torch.tensor([[END, 65]]), Special(END, (END,), ()), sequence_length=4, top_k=1)
    assert free[0, 1] not in (END, 65, free[0, 0])
    model.model.embed_tokens.weight.data[free[0, 1]] = torch.nan  # what is drawn second leads to it
    with pytest.raises(ModelError, match="predictions are NaN or infinite"):
        drawn(model, torch.tensor([[END, 65]]), Special(END, (END,), ()), sequence_length=4, top_k=1)


def test_after_the_end_of_a_text_another_begins() -> None:
    model, begin = tiny_model("llama"), torch.tensor([[END, 65]])
    free = drawn(model, begin, Special(END, (END,), ()), sequence_length=8, top_k=1)[0].tolist()
    assert END not in free
    ended = drawn(model, begin, Special(END, (END, free[3]), ()), sequence_length=8, top_k=1)[0].tolist()
    assert ended[:4] == [*free[:3], END] and free[3] not in ended


@pytest.mark.parametrize(("top_k", "temperature"), [(257, 1.0), (20, 1.0), (20, 3.0)])
def test_tokens_are_drawn_as_often_as_the_model_says(top_k: int, temperature: float) -> None:
    model, pieces = tiny_model("gpt2"), 20_000
    begin = torch.tensor([[END, 65, 66]])
    got = drawn(
        model, begin.expand(pieces, -1), Special(END, (), (7,)), sequence_length=1, top_k=top_k, temperature=temperature
    )
    with torch.no_grad():
        logits = model(begin).logits[0, -1].double()
    logits[7] = -torch.inf
    logits[logits < logits.sort(descending=True).values[min(top_k, 256) - 1]] = -torch.inf
    expected = torch.softmax(logits / temperature, -1)
    share = torch.bincount(got.flatten(), minlength=VOCABULARY) / pieces
    assert (share - expected).abs().max() < 4 * (0.25 / pieces) ** 0.5
    assert not share[expected == 0].any()


def test_texts_are_parted_at_their_ends_and_hold_no_empty_line() -> None:
    tokenizer = byte_tokenizer()
    first, second = "One line\n\n \nanother", " begins with a space\n"
    row = [*tokenizer.encode(first), END, END, *tokenizer.encode(second)]
    assert texts_of(row, END, tokenizer) == ["One line\nanother", "begins with a space"]


def test_the_seed_decides_the_text(tiny, tmp_path, progress) -> None:
    source, files = tiny("llama"), []
    for number, seed in enumerate((1, 1, 2)):
        settings = GenerateSettings(**SMALL, seed=seed)
        result = generate(source, tmp_path / f"{number}.txt", settings, device="cpu", progress=progress)
        files.append((tmp_path / f"{number}.txt").read_text())
    assert files[0] == files[1] != files[2]
    assert files[2].count("\n\n") == result.texts and len(files[2].split()) == result.words
    assert result.tokens == 200 and result.seconds > 0 and result.peak_memory_bytes > 0


@pytest.mark.parametrize(
    ("pieces", "starts", "expected"),
    [
        (96, None, [96]),
        (97, None, [49, 48]),
        (96, "demo", [24, 24, 24, 24]),  # else none, or all, would begin with words
        (2, "demo", [1, 1]),
        (500, "demo", [84, 84, 83, 83, 83, 83]),
    ],
)
def test_every_length_of_start_has_its_turn(pieces: int, starts: str | None, expected: list[int]) -> None:
    assert generation._batches(pieces, GenerateSettings(batch=96, starts=starts)) == expected


def test_three_batches_of_four_begin_with_words_of_the_text(tiny, tmp_path, prose, progress, monkeypatch) -> None:
    begun = []

    def noted(model: object, begin: Tensor, *others: object) -> Tensor:
        begun.append(begin)
        return write(model, begin, *others)

    monkeypatch.setattr(generation, "write", noted)
    settings = GenerateSettings(tokens=20 * 4 * len(STARTS) - 20, sequence_length=20, batch=4, starts=str(prose))
    result = generate(tiny("llama"), tmp_path / "out.txt", settings, device="cpu", progress=progress)
    assert [tuple(begin.shape) for begin in begun] == [(4, 9), (4, 14), (4, 22), (3, 1)]
    assert result.tokens == 20 * 15 + 4 * 8 + 4 * 13 + 4 * 21
    tokenizer, written = byte_tokenizer(), (tmp_path / "out.txt").read_text()
    sentences = " ".join(prose.read_text().split())
    for begin in begun[:3]:
        assert begin[:, 0].eq(END).all()
        for row in begin[:, 1:].tolist():
            words = tokenizer.decode(row)
            assert words in sentences and words[0].isdigit() and words[1] in "abcdef" and words in written


def test_half_of_the_pieces_begin_as_paragraphs_do(prose) -> None:
    settings = GenerateSettings(starts=str(prose))
    starts = generation._beginnings(byte_tokenizer(), settings)(13, 2000)
    firsts = [byte_tokenizer().decode(row)[:2] for row in starts]
    share = sum(first[1] == "a" for first in firsts) / 2000
    assert abs(share - (0.5 + 0.5 / 6)) < 0.05  # a sentence that is chosen is the first of six as often as another
    assert {first[0] for first in firsts} == set("01234") and {first[1] for first in firsts} == set("abcdef")


def test_texts_begin_with_the_token_that_parted_them_in_training() -> None:
    def tokenizer(*added: str, **roles: str) -> PreTrainedTokenizerFast:
        made = byte_tokenizer()
        made.add_special_tokens({"additional_special_tokens": list(added), **roles})
        return made

    config = tiny_config("llama")
    config.vocab_size = 262
    plain = special_tokens(tokenizer(), config, None)
    assert plain == Special(256, (256,), (257, 258, 259, 260, 261))  # numbers that are no token
    chat = tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_start|>")
    number = chat.get_vocab()
    found = special_tokens(chat, config, None)
    assert found.first == number["<|endoftext|>"]
    assert set(found.ends) == {number["<|endoftext|>"], number["<|im_end|>"]}
    assert number["<|im_start|>"] in found.barred and not set(found.barred) & set(found.ends)
    llama = tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    assert special_tokens(llama, config, None).first == llama.get_vocab()["<s>"]
    assert special_tokens(llama, config, "<|end|>").first == 256
    config.vocab_size = 257  # the tokenizer was given more tokens than the model knows
    assert max(special_tokens(llama, config, "<|end|>").barred, default=0) < 257
    with pytest.raises(UsageError, match=r"start token '<s>' has the number \d+, and the model knows 257"):
        special_tokens(llama, config, None)
    with pytest.raises(UsageError, match=r"start token '<x>' is no token of the model; give one, such as </s>"):
        special_tokens(llama, config, "<x>")


def test_what_stands_in_the_way_is_told_before_the_model_is_loaded(tiny, tmp_path, progress, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.models.loading.load_model", None)
    source, out = tiny("llama"), tmp_path / "out.txt"
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "menu.txt").write_text("Menu\nAbout us\n")
    encoder = families.written(tmp_path / "encoder", "bert")
    for kind, message, model, output, options in (
        (UsageError, r"exists; give another file, or remove it", source, tmp_path / "kept.txt", {}),
        (UsageError, r"ends in \.txt", source, tmp_path / "out.json", {}),
        (UsageError, "there is no folder", source, tmp_path / "gone" / "out.txt", {}),
        (UsageError, "for causal language models, and .* is ", encoder, out, {}),
        (UsageError, "has 512 positions; a piece with its start is 522", source, out, {"sequence_length": 500}),
        (DataError, "no such file", source, out, {"starts": str(tmp_path / "gone.txt")}),
        (DataError, "holds no line of 160 characters", source, out, {"starts": str(tmp_path / "menu.txt")}),
        (UsageError, "is no token", source, out, {"start_token": "<x>"}),
    ):
        with pytest.raises(kind, match=message):
            generate(model, output, GenerateSettings(**options), device="cpu", progress=progress)
    wrong = GenerateSettings(sequence_length=500, starts=str(tmp_path / "gone.txt"), start_token="<x>")
    with pytest.raises(GblmError) as all_faults:
        generate(source, out, wrong, device="gpu", progress=progress)
    for message in ("512 positions", "no such file", "is no token", "'gpu' is not known"):
        assert message in str(all_faults.value)
    assert (tmp_path / "kept.txt").read_text() == "kept" and not out.exists()


def test_an_export_writes_nothing(tiny, tmp_path, progress) -> None:
    source = tiny("llama")
    gblm_compress.prune(
        source.folder, tmp_path / "pruned", method="magnitude", pattern="2:4", fit="none", quiet=True, device="cpu"
    )
    gblm_compress.export(tmp_path / "pruned", tmp_path / "packed", format="bitmask", quiet=True)
    with pytest.raises(ModelError, match="is an export; write with the Hugging Face folder"):
        gblm_compress.generate(str(tmp_path / "packed"), tmp_path / "out.txt", quiet=True)


def test_nothing_is_left_of_what_breaks_off(tiny, tmp_path, progress, monkeypatch) -> None:
    def broken(*arguments: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny("llama"), tmp_path / "out.txt", GenerateSettings(**SMALL), device="cpu", progress=progress)
    assert not list(tmp_path.glob("*out.txt*"))


def test_the_command_and_python_give_the_same(program, tiny, tmp_path) -> None:
    options = ["--tokens", "200", "--sequence-length", "20", "--batch", "4", "--device", "cpu"]
    given, by_python = ["generate", str(tiny("llama").folder), "-o", "command.txt", *options], tmp_path / "python.txt"
    done = program(*given, "--json")
    assert done.code == 0, done.stderr
    result = gblm_compress.generate(tiny("llama").folder, by_python, **SMALL, device="cpu", quiet=True)
    assert (tmp_path / "command.txt").read_text() == by_python.read_text()
    assert json.loads(done.stdout)["tokens"] == result.tokens
    done = program(*given)
    assert done.code == 2 and "exists; give another file, or remove it" in done.stderr
    (tmp_path / "command.txt").unlink()
    done = program(*given)
    assert done.code == 0 and "tokens/s" in done.stdout and "written to" in done.stdout


def test_what_was_written_is_read_as_a_text(tiny, tmp_path, progress) -> None:
    source, out = tiny("llama"), tmp_path / "out.txt"
    generate(source, out, GenerateSettings(**SMALL), device="cpu", progress=Progress(quiet=True))
    result = gblm_compress.prune(
        source.folder, tmp_path / "pruned", calibration=str(out), samples=2, sequence_length=32, fit="none",
        method="wanda", quiet=True, device="cpu",
    )  # fmt: skip
    assert result.nonzeros > 0
