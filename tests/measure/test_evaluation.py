import errno
import math
from collections.abc import Iterator
from unittest.mock import Mock, patch

import pytest
import torch

from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.measure.evaluation import Reference, evaluate
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.tiny import VOCABULARY
from gblm_compress.settings import EvaluateSettings
from gblm_compress.tasks.text import load_text
from tests.conftest import samples


def test_perplexity_token_by_token(tiny, prose, progress) -> None:
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=4)
    result = evaluate(tiny("llama"), settings, progress=progress)
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
    assert len(losses) == 124
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-4)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 3) / 2
    assert result.metrics["perplexity"].error == pytest.approx(math.exp(mean) * spread, rel=1e-3)
    assert result.fidelity is None


LENGTH = 8


@pytest.fixture
def read() -> Iterator[Mock]:
    """Counts the windows that go through a model."""
    with patch.object(TorchRuntime, "predict", autospec=True, side_effect=TorchRuntime.predict) as predict:
        yield predict


@pytest.mark.parametrize("room", [0, 4 * (LENGTH - 1) * VOCABULARY, 1 << 30])
def test_kept_or_not_the_logits_are_the_same_to_the_bit(tiny, tmp_path, progress, monkeypatch, read, room) -> None:
    monkeypatch.setattr(evaluation, "MOST_KEPT", room)
    dense, direct = Reference(tiny("llama"), folder=tmp_path), Reference(tiny("llama"))
    asked = samples(3, LENGTH)
    first = [dense.judged(window, progress) for window in asked]
    dense.unload()
    read.reset_mock()
    again = [dense.judged(window, progress) for window in asked]
    assert read.call_count == {0: 3, 1 << 30: 0}.get(room, 2)
    for window, before, after in zip(asked, first, again, strict=True):
        assert before.shape == (LENGTH - 1, VOCABULARY)
        assert torch.equal(before, after) and torch.equal(before, direct.judged(window, progress))
    assert not list(tmp_path.iterdir())  # the file has no name that an end of the process would leave
    dense.close()


def test_a_disk_that_fills_ends_the_keeping_and_not_the_evaluation(tiny, tmp_path, progress, monkeypatch, read) -> None:
    full = Mock(seek=Mock(return_value=0), write=Mock(side_effect=OSError(errno.ENOSPC, "no space is left")))
    monkeypatch.setattr(evaluation.tempfile, "TemporaryFile", lambda **_: full)
    dense, (window,) = Reference(tiny("llama"), folder=tmp_path), samples(1, LENGTH)
    assert torch.equal(dense.judged(window, progress), dense.judged(window, progress))
    assert read.call_count == 2
    dense.close()


def test_tasks_are_asked_once(tiny, progress, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(zero_shot, "answers", lambda *_: asked.append(1) or {"task": ("acc", [1.0])})
    dense, settings = Reference(tiny("llama")), EvaluateSettings(tasks=("task",), sequence_length=LENGTH)
    assert dense.answers(settings, progress) == dense.answers(settings, progress) == {"task": ("acc", [1.0])}
    assert len(asked) == 1
    dense.answers(settings.model_copy(update={"limit": 3}), progress)
    assert len(asked) == 2


def test_a_model_is_identical_to_itself_and_leaves_memory_with_its_logits_kept(tiny, prose, tmp_path, progress, read):
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=2)
    dense = Reference(tiny("gpt2"), folder=tmp_path)
    first = evaluate(tiny("gpt2"), settings, baseline=dense, progress=progress)
    assert first.fidelity["mean_kl"] == pytest.approx(0, abs=1e-7) and first.fidelity["top1_agreement"] == 1.0
    assert first.baseline == first.metrics and dense._runtime is None and read.call_count == 4
    assert evaluate(tiny("gpt2"), settings, baseline=dense, progress=progress) == first
    assert dense._runtime is None and read.call_count == 6
    dense.close()
