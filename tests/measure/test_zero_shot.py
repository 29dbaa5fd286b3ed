"""Zero-shot tasks: against likelihoods summed token by token, on the real benchmarks where their files are at hand."""

import bz2
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from gblm_compress.errors import DataError, MissingDependencyError, ModelError, NotEnoughMemoryError, UsageError
from gblm_compress.measure import zero_shot
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.zero_shot import recovery, score
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.settings import EvaluateSettings

TASKS = Path(__file__).parent / "zero_shot_tasks"
DATA = Path(os.environ.get("GBLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "zero_shot"
QUESTIONS = [{"question": f"Number {i} is", "choices": ["odd", "even or so", "x"], "label": i % 3} for i in range(12)]


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A folder with a task `parity` on a file beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "parity.yaml").write_text(
        "task: parity\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {folder / 'questions.jsonl'}}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{label}}'\ndoc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


def slow_answers(source: ModelSource) -> list[float]:
    """Whether the choice with the highest log-likelihood per character is the right one, a token at a time."""
    model, tokenizer = load_model(source), load_processor(source)
    right = []
    for question in QUESTIONS:
        context = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            total, ids = 0.0, list(context)
            for token in tokenizer(" " + choice)["input_ids"]:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                total += float(logits.log_softmax(0)[token])
                ids.append(token)
            scores.append(total / len(choice))
        right.append(float(scores.index(max(scores)) == question["label"]))
    return right


def test_accuracy_is_that_of_likelihoods_token_by_token(tiny, prose, own_task, progress, tmp_path) -> None:
    build_tiny("llama", tmp_path / "dense", seed=1)
    baseline = ModelSource("dense", tmp_path / "dense")
    settings = EvaluateSettings(
        dataset=str(prose), sequence_length=32, max_windows=2, tasks=("parity",), include_path=str(own_task)
    )
    result = evaluate(tiny("llama"), settings, baseline=baseline, progress=progress).zero_shot
    mine, dense = slow_answers(tiny("llama")), slow_answers(baseline)
    (task,) = result.tasks
    assert (task.task, task.metric, task.questions) == ("parity", "acc_norm", 12)
    assert task.accuracy == pytest.approx(sum(mine) / 12) == result.mean_accuracy
    assert task.dense_accuracy == pytest.approx(sum(dense) / 12)
    assert task.error == pytest.approx(math.sqrt(task.accuracy * (1 - task.accuracy) / 11))
    assert task.recovery == recovery([mine], [dense])


def test_what_decides_the_outcome_of_tasks(own_task, monkeypatch) -> None:
    first = zero_shot.fingerprint(["parity"], str(own_task))
    assert first == zero_shot.fingerprint(["parity"], str(own_task)) != zero_shot.fingerprint(["parity"], None)
    assert zero_shot.fingerprint([], str(own_task)) == []
    (own_task / "below").mkdir()
    (own_task / "below" / "helper.py").write_text("")
    assert zero_shot.fingerprint(["parity"], str(own_task)) != first
    (own_task / "below" / "helper.py").unlink()
    monkeypatch.setattr(zero_shot, "version", lambda _: "0")
    assert zero_shot.fingerprint(["parity"], str(own_task)) != first


def test_limit_takes_the_first_questions(tiny, own_task, progress) -> None:
    model, tokenizer = load_model(tiny("llama")), load_processor(tiny("llama"))
    answered = zero_shot.answers(model, tokenizer, ["parity"], 5, str(own_task), progress)
    assert answered == {"parity": ("acc_norm", slow_answers(tiny("llama"))[:5])}


def test_recovery_needs_two_questions_and_a_right_answer() -> None:
    ratio = recovery([[1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0]])
    assert (ratio.ratio, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
    assert recovery([[1.0, 1.0]], [[0.0, 0.0]]) is recovery([[1.0]], [[1.0]]) is None
    result = score({"a": ("acc", [1.0, 0.0]), "b": ("acc", [1.0])})
    assert (result.mean_accuracy, result.recovery, [task.error for task in result.tasks]) == (0.75, None, [0.5, None])


def test_recovery_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two tasks of different size, answers of the two models correlated: 95 % of the intervals hold the true ratio."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        model, dense = [], []
        for questions, p in ((300, 0.6), (150, 0.4)):
            right = torch.rand(questions, generator=generator) < p
            kept = torch.rand(questions, generator=generator) < 0.8
            dense.append(right.double().tolist())
            model.append((right & kept).double().tolist())
        ratio = recovery(model, dense)
        covered += ratio.low <= 0.8 <= ratio.high
    assert 0.92 <= covered / 400 <= 0.98


def test_refusals(tiny, own_task, progress, tmp_path, monkeypatch) -> None:
    source = tiny("llama")
    model, tokenizer = load_model(source), load_processor(source)
    with pytest.raises(UsageError, match=r"task 'pariti' is not known to lm-eval"):
        zero_shot.answers(model, tokenizer, ["pariti"], None, str(own_task), progress)
    with pytest.raises(UsageError, match=r"no such folder"):
        zero_shot.answers(model, tokenizer, ["parity"], None, str(tmp_path / "gone"), progress)
    (own_task / "questions.jsonl").unlink()
    with pytest.raises(DataError, match=r"tasks parity: cannot be read .*--include-path"):
        zero_shot.answers(model, tokenizer, ["parity"], None, str(own_task), progress)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"tasks are measured in torch"):
        settings = EvaluateSettings(tasks=("parity",), include_path=str(own_task))
        evaluate(ModelSource("onnx", tmp_path / "onnx"), settings, progress=progress)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gblm-compress\[eval\]'"):
        evaluate(source, EvaluateSettings(tasks=("parity",), sequence_length=64), progress=progress)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("questions.jsonl", None, "{not json"),
        ("questions.jsonl", None, ""),
        ("questions.jsonl", None, '{"other": 1}\n'),
        ("questions.jsonl", None, '{"question": "a", "choices": 3, "label": "x"}\n'),
        ("parity.yaml", "validation_split: validation", "validation_split: gone"),
        ("parity.yaml", "{{question}}", "{{question"),
    ],
    ids=["json", "empty", "columns", "types", "split", "template"],
)
def test_data_that_do_not_fit_a_task_are_data_errors(tiny, own_task, progress, file, old, new) -> None:
    path = own_task / file
    path.write_text(path.read_text().replace(old, new) if old else new)
    model, tokenizer = load_model(tiny("llama")), load_processor(tiny("llama"))
    with pytest.raises(DataError, match=r"tasks? '?parity"):
        zero_shot.answers(model, tokenizer, ["parity"], None, str(own_task), progress)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), NotEnoughMemoryError),
        (MemoryError(), NotEnoughMemoryError),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            NotEnoughMemoryError,
        ),
        (AttributeError("a fault of the program"), AttributeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_model_that_fails_is_no_fault_of_the_data(tiny, own_task, progress, monkeypatch, raised, expected) -> None:
    model, tokenizer = load_model(tiny("llama")), load_processor(tiny("llama"))

    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(expected, match="--dtype bfloat16" if expected is NotEnoughMemoryError else "fault of the"):
        zero_shot.answers(model, tokenizer, ["parity"], None, str(own_task), progress)


@pytest.mark.skipif(not DATA.exists(), reason="the benchmarks' files are not on this machine")
def test_task_files_for_the_real_benchmarks(tiny, tmp_path, progress) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    labels = (DATA / "piqa" / "valid-labels.lst").read_text().split()
    rows = (DATA / "piqa" / "valid.jsonl").read_text().splitlines()
    piqa = [json.loads(row) | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]
    packed = (DATA / "hellaswag" / "hellaswag_val_full.txt.bz2").read_bytes()
    lines = bz2.decompress(packed).decode().splitlines()
    hellaswag = [
        {"context": lines[i], "label": int(lines[i + 1]), "endings": lines[i + 2 : i + 6]} for i in range(0, 600, 6)
    ]
    for name, questions in (("piqa", piqa), ("hellaswag", hellaswag)):
        (prepared / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for path in TASKS.glob("*.yaml"):
        text = path.read_text().replace("DATA/", f"{DATA}/").replace("PREPARED/", f"{prepared}/")
        (folder / path.name).write_text(text)
    names = sorted(path.stem for path in TASKS.glob("*.yaml"))
    model, tokenizer = load_model(tiny("llama")), load_processor(tiny("llama"))
    model.config.max_position_embeddings = 4096  # bytes are many tokens
    answered = zero_shot.answers(model, tokenizer, names, 4, str(folder), progress)
    assert {name: len(correct) for name, (_, correct) in answered.items()} == dict.fromkeys(names, 4)
    assert all(value in (0.0, 1.0) for _, correct in answered.values() for value in correct)
