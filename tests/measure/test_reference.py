"""What the dense model answers is computed once, and is the same whether kept or computed again."""

import errno

import pytest
import torch

from gblm_compress.measure import evaluation, zero_shot
from gblm_compress.measure.evaluation import Reference, evaluate
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.tiny import VOCABULARY
from gblm_compress.settings import EvaluateSettings
from tests.conftest import samples

LENGTH = 8


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The number of windows that went through a model, as a list with an entry for each."""
    original, read = TorchRuntime.predict, []

    def predict(runtime, sample):
        read.append(len(sample["input_ids"]))
        return original(runtime, sample)

    monkeypatch.setattr(TorchRuntime, "predict", predict)
    return read


@pytest.mark.parametrize("room", [0, 4 * (LENGTH - 1) * VOCABULARY, 1 << 30])
def test_kept_or_not_the_logits_are_the_same_to_the_bit(tiny, tmp_path, progress, monkeypatch, read, room) -> None:
    monkeypatch.setattr(evaluation, "MOST_KEPT", room)
    dense, direct = Reference(tiny("llama"), folder=tmp_path), Reference(tiny("llama"))
    asked = samples(3, LENGTH)
    first = [dense.judged(window, progress) for window in asked]
    dense.unload()
    read.clear()
    again = [dense.judged(window, progress) for window in asked]
    assert len(read) == {0: 3, 1 << 30: 0}.get(room, 2)
    for window, before, after in zip(asked, first, again, strict=True):
        assert before.shape == (LENGTH - 1, VOCABULARY)
        assert torch.equal(before, after) and torch.equal(before, direct.judged(window, progress))
    assert not list(tmp_path.iterdir())  # the file has no name that an end of the process would leave
    dense.close()


def test_a_disk_that_fills_meanwhile_ends_the_keeping_and_not_the_evaluation(
    tiny, tmp_path, progress, monkeypatch, read
) -> None:
    class Full:
        def seek(self, *_):
            return 0

        def write(self, content):
            raise OSError(errno.ENOSPC, "no space is left")

        def close(self):
            pass

    monkeypatch.setattr(evaluation.tempfile, "TemporaryFile", lambda **_: Full())
    dense, (window,) = Reference(tiny("llama"), folder=tmp_path), samples(1, LENGTH)
    assert torch.equal(dense.judged(window, progress), dense.judged(window, progress))
    assert len(read) == 2
    dense.close()


def test_tasks_are_asked_once(tiny, progress, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(zero_shot, "answers", lambda *_: asked.append(1) or {"task": ("acc", [1.0])})
    dense, settings = Reference(tiny("llama")), EvaluateSettings(tasks=("task",), sequence_length=LENGTH)
    assert dense.answers(settings, progress) == dense.answers(settings, progress) == {"task": ("acc", [1.0])}
    assert len(asked) == 1
    dense.answers(settings.model_copy(update={"limit": 3}), progress)
    assert len(asked) == 2


def test_the_dense_model_leaves_memory_after_an_evaluation(tiny, prose, tmp_path, progress, read) -> None:
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=2)
    dense = Reference(tiny("llama"), folder=tmp_path)
    first = evaluate(tiny("llama"), settings, baseline=dense, progress=progress)
    assert dense._runtime is None and len(read) == 4
    assert evaluate(tiny("llama"), settings, baseline=dense, progress=progress) == first
    assert dense._runtime is None and len(read) == 6
    dense.close()
