import math
import shutil

import pytest
import torch

from gblm_compress.errors import ModelError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings
from gblm_compress.tasks.text import load_text
from tests.conftest import CAUSAL_LM


def test_perplexity_token_by_token(tiny, prose, progress) -> None:
    result = evaluate(
        tiny("llama"),
        EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=4),
        progress=progress,
    )
    model = load_model(tiny("llama"))
    ids = load_processor(tiny("llama"))(load_text(str(prose), "evaluation"))["input_ids"]
    losses, means = [], []
    for start in range(0, 4 * 32, 32):
        window = ids[start : start + 32]
        with torch.no_grad():
            for t in range(1, 32):  # every token from its own prefix, no batching, no shift
                logits = model(input_ids=torch.tensor([window[:t]])).logits[0, -1].double()
                losses.append(float(torch.logsumexp(logits, 0) - logits[window[t]]))
        means.append(sum(losses[-31:]) / 31)
    mean = sum(losses) / len(losses)
    assert result.predicted_tokens == len(losses) == 124
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-4)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 3) / 2
    assert result.metrics["perplexity"].error == pytest.approx(math.exp(mean) * spread, rel=1e-3)
    assert result.fidelity is None


def test_a_model_is_identical_to_itself(tiny, prose, progress) -> None:
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=3)
    result = evaluate(tiny("gpt2"), settings, baseline=tiny("gpt2"), progress=progress)
    assert result.fidelity["mean_kl"] == pytest.approx(0, abs=1e-7)
    assert result.fidelity["top1_agreement"] == 1.0
    assert result.baseline == result.metrics


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, prose, tmp_path, progress) -> None:
    source = ModelSource("m", shutil.copytree(tiny("gpt2").folder, tmp_path / "model"))
    tokenizer = load_processor(source)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source.folder)
    prose.write_text(f"<new> {prose.read_text()}")
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=3)
    with pytest.raises(ModelError, match="token id 257, but the model has embeddings for 257 tokens"):
        evaluate(source, settings, progress=progress)
    calibration = CalibrationSettings(dataset=str(prose), samples=2, sequence_length=32)
    with pytest.raises(ModelError, match="token id 257, but the model has embeddings for 257 tokens"):
        prune(source, tmp_path / "out", PruneSettings(fit="none"), calibration, progress=progress)
    model = load_model(source)
    model.config.vocab_size = 9
    with pytest.raises(ModelError, match="but the model has embeddings for 9 tokens"):
        CAUSAL_LM.probe(tokenizer, model.config)
