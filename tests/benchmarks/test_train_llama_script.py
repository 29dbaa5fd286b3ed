"""The script that trains a small Llama on texts."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.scripts import loaded

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = "".join(f"The {number}th of the hares sat in the grass and ate clover. " for number in range(400))


def test_a_model_and_its_tokeniser_are_written(tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(TEXT, encoding="utf-8")
    with loaded("train_llama") as script:
        config = LlamaConfig(vocab_size=script.CONFIG.vocab_size, num_key_value_heads=1, **TINY)
        metrics = script.train(folder, [text], 1, 4, 1e-2, 32, config)
        tokeniser = AutoTokenizer.from_pretrained(folder)
        windows = script.windows_of(tokeniser, [text], 32)
    assert metrics["eval_loss"] < 8.9  # less than of a model that has learnt nothing: log 8192 is 9.01
    assert not folder.with_name("model.training").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert all(len(window["input_ids"]) == 32 for window in windows)
    together = [token for window in windows for token in window["input_ids"]]
    assert TEXT.startswith(tokeniser.decode(together)) and len(together) > len(tokeniser(TEXT)["input_ids"]) - 32


def test_a_folder_that_is_there_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_llama.py", str(tmp_path), "--texts", str(tmp_path / "none.txt")])
    with loaded("train_llama") as script:
        script.main()
    assert "is there already" in capsys.readouterr().out and not list(tmp_path.iterdir())
