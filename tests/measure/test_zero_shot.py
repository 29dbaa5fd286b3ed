"""Zero-shot tasks: against likelihoods summed token by token, on the real benchmarks where their files are at hand."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import gblm_compress
from gblm_compress.cli import summaries
from gblm_compress.errors import DataError, ModelError, UsageError
from gblm_compress.measure import zero_shot
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.zero_shot import recovery, score
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import EvaluateSettings
from tests.conftest import build_tiny, edit_json

TASKS = Path(__file__).parent / "zero_shot_tasks"
DATA = Path(os.environ.get("GBLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "zero_shot"
QUESTIONS = [{"question": f"Number {i} is", "choices": ["odd", "even or so", "x"], "label": i % 3} for i in range(12)]


def write_lines(path: Path, questions: list[Any]) -> None:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A folder with a task `parity` on a file beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_lines(folder / "questions.jsonl", QUESTIONS)
    (folder / "parity.yaml").write_text(
        "task: parity\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {folder / 'questions.jsonl'}}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{label}}'\ndoc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


def ask(source: ModelSource, folder: Path, tasks: Sequence[str] = ("parity",), limit: int | None = None) -> Any:
    settings = EvaluateSettings(tasks=tuple(tasks), limit=limit, include_path=str(folder))
    return zero_shot.answers(load_model(source), load_processor(source), settings, Progress(quiet=True))


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
    text = {"dataset": str(prose), "sequence_length": 32, "max_windows": 2}
    settings = EvaluateSettings(**text, tasks=("parity",), include_path=str(own_task))
    result = evaluate(tiny("llama"), settings, baseline=baseline, progress=progress).zero_shot
    mine, dense = slow_answers(tiny("llama")), slow_answers(baseline)
    assert ask(tiny("llama"), own_task, limit=5) == {"parity": ("acc_norm", mine[:5])}
    (task,) = result.tasks
    assert (task.task, task.metric, task.questions) == ("parity", "acc_norm", 12)
    assert task.accuracy == pytest.approx(sum(mine) / 12) == result.mean_accuracy
    assert task.dense_accuracy == pytest.approx(sum(dense) / 12)
    assert task.error == pytest.approx(math.sqrt(task.accuracy * (1 - task.accuracy) / 11))
    assert task.recovery == recovery([mine], [dense])


def test_the_command_measures_tasks_without_a_text(tiny, own_task, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gblm_compress.tasks.text.load_text", None)
    folder, asked = tiny("llama").folder, {"tasks": ["parity"], "include_path": str(own_task), "quiet": True}
    result = gblm_compress.evaluate(folder, baseline=folder, **asked)
    assert result.metrics == {} and result.baseline is None and result.fidelity is None
    (task,) = result.zero_shot.tasks
    assert task.questions == len(QUESTIONS) and task.recovery.ratio == 1
    summaries.show("evaluate", result, as_json=False)
    said = capsys.readouterr().out
    assert "parity" in said and "wikitext2" not in said and "perplexity" not in said
    with pytest.raises(TypeError, match="not callable"):
        gblm_compress.evaluate(folder, dataset="demo", sequence_length=32, **asked)


def test_what_decides_the_outcome_of_tasks(own_task, monkeypatch) -> None:
    """Besides the content of their files: the name of each file, and the version of lm-eval."""
    asked = EvaluateSettings(tasks=("parity",), include_path=str(own_task))
    found = [zero_shot.fingerprint(asked)]
    (own_task / "below").mkdir()
    (own_task / "below" / "helper.py").touch()
    found.append(zero_shot.fingerprint(asked))
    monkeypatch.setattr(zero_shot, "version", lambda _: "0")
    found.append(zero_shot.fingerprint(asked))
    assert found[0] != found[1] != found[2] == zero_shot.fingerprint(asked)
    assert zero_shot.fingerprint(EvaluateSettings(include_path=str(own_task))) == []


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


def test_refusals(tiny, own_task, progress, tmp_path) -> None:
    source = tiny("llama")
    with pytest.raises(UsageError, match=r"task 'pariti' is not known to lm-eval"):
        ask(source, own_task, ["pariti"])
    (own_task / "questions.jsonl").unlink()
    with pytest.raises(DataError, match=r"tasks parity: cannot be read .*--include-path"):
        ask(source, own_task)
    (tmp_path / "model.onnx").touch()
    settings = EvaluateSettings(tasks=("parity",), include_path=str(own_task))
    with pytest.raises(ModelError, match=r"tasks are measured in torch"):
        evaluate(ModelSource("onnx", tmp_path), settings, progress=progress)


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
def test_data_that_do_not_fit_a_task_are_data_errors(tiny, own_task, file, old, new) -> None:
    path = own_task / file
    path.write_text(path.read_text().replace(old, new) if old else new)
    with pytest.raises(DataError, match=r"tasks? '?parity"):
        ask(tiny("llama"), own_task)


@pytest.mark.parametrize(
    ("place", "raised", "kind"),
    [
        ("transformers.LlamaForCausalLM.forward", torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        ("lm_eval.tasks.TaskManager.load", MemoryError("out of memory"), MemoryError),
        ("transformers.LlamaForCausalLM.forward", AttributeError("a fault of the program"), AttributeError),
        ("lm_eval.tasks.TaskManager.load", AttributeError("a fault of the task"), DataError),
    ],
)
def test_memory_that_runs_out_is_no_fault_of_the_data(tiny, own_task, monkeypatch, place, raised, kind) -> None:
    monkeypatch.setattr(place, Mock(side_effect=raised))
    with pytest.raises(kind, match="out of memory|a fault of the"):
        ask(tiny("llama"), own_task)


@pytest.mark.skipif(not DATA.exists(), reason="the benchmarks' files are not on this machine")
def test_task_files_for_the_real_benchmarks(tiny, tmp_path) -> None:
    prepared, folder = tmp_path / "prepared", tmp_path / "tasks"
    prepared.mkdir()
    folder.mkdir()
    write_lines(prepared / "piqa.jsonl", 4 * [{"goal": "To sleep", "sol1": "lie down", "sol2": "run", "label": 0}])
    write_lines(prepared / "hellaswag.jsonl", 4 * [{"context": "I", "endings": ["go", "a", "b", "c"], "label": 0}])
    for path in TASKS.glob("*.yaml"):
        text = path.read_text().replace("DATA/", f"{DATA}/").replace("PREPARED/", f"{prepared}/")
        (folder / path.name).write_text(text)
    names = sorted(path.stem for path in TASKS.glob("*.yaml"))
    source = ModelSource("long", shutil.copytree(tiny("llama").folder, tmp_path / "long"))
    edit_json(source.folder / "config.json", max_position_embeddings=4096)  # bytes are many tokens
    answered = ask(source, folder, names, 4)
    assert {name: len(correct) for name, (_, correct) in answered.items()} == dict.fromkeys(names, 4)
    assert all(value in (0.0, 1.0) for _, correct in answered.values() for value in correct)
