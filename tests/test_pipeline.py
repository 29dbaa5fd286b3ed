"""A whole run on a tiny model: artefacts, report, reuse, gates."""

import json
from pathlib import Path

import pytest

from gblm_compress.errors import UsageError
from gblm_compress.models.loading import load_model, load_tokenizer, save_tokenizer
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import walk
from gblm_compress.runs import pipeline, report
from gblm_compress.runs.recipe import find_recipe, load_recipe
from gblm_compress.settings import EvaluateSettings
from gblm_compress.storage.outputs import working_in

SMOKE = ("benchmark.batch=[1]",)


def smoke(*overrides: str):
    return load_recipe(find_recipe("ci-smoke"), (*SMOKE, *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> tuple[Path, pipeline.RunReport]:
    output = tmp_path_factory.mktemp("run")
    return output, pipeline.run(smoke(), output, Progress(quiet=True))


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GBLM_COMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def test_artefacts_and_report(finished) -> None:
    output, result = finished
    for name in (
        "pruned/model.safetensors",
        "onnx/model.onnx",
        "dense-onnx/model.onnx",
        "semi-structured/gblm_sparse.safetensors",
    ):
        assert (output / name).exists()
    content = json.loads((output / "report.json").read_text())
    assert content == json.loads(json.dumps(result.as_dict()))
    assert [stage["name"] for stage in content["stages"]] == [
        "prune", "export bitmask", "export onnx", "export semi-structured", "export dense-onnx",
        "evaluate pruned", "evaluate bitmask", "evaluate onnx", "benchmark",
    ]  # fmt: skip
    assert content["passed"] is True
    html = (output / report.PAGE).read_text()
    assert "data:image/png;base64," in html and "dense-onnx" in html


def test_rows_set_dense_against_pruned_per_runtime(finished) -> None:
    _, result = finished
    rows = {(row.model, row.runtime): row for row in result.rows}
    assert list(rows) == [
        ("dense", "torch"), ("pruned", "torch"), ("bitmask", "torch"),
        ("dense-onnx", "onnxruntime"), ("onnx", "onnxruntime"), ("semi-structured", "torch (CUDA)"),
    ]  # fmt: skip
    pruned, onnx = rows["pruned", "torch"], rows["onnx", "onnxruntime"]
    assert pruned.nonzero_fraction == 0.5 and rows["dense", "torch"].nonzero_fraction == 1.0
    assert onnx.perplexity == pytest.approx(pruned.perplexity, rel=1e-3)
    assert rows["dense", "torch"].perplexity != pruned.perplexity
    assert rows["semi-structured", "torch (CUDA)"].tpot_ms is None
    assert pruned.decode_verdict and rows["dense", "torch"].decode_verdict is None
    assert all(len(report.cells(row)) == len(report.COLUMNS) for row in result.rows)


def test_everything_is_reused_when_nothing_changed(finished, module_cache) -> None:
    output, first = finished
    again = pipeline.run(smoke(), output, Progress(quiet=True))
    assert all(stage.reused for stage in again.stages)
    assert again.rows == first.rows


def test_a_cut_off_prune_stage_goes_on_where_it_was_unless_the_recipe_changed(
    tmp_path, module_cache, monkeypatch
) -> None:
    """A run ends in the second block's pruning; the next one of the same recipe does only that block."""
    original, pruned = walk.prune_block_, []

    class Killed(BaseException):
        pass

    def prune_block(block, layers, *others):
        if len(pruned) == 1:
            raise Killed
        pruned.append(next(iter(layers)))
        return original(block, layers, *others)

    def ends(*recipe_overrides: str) -> list[str]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(walk, "prune_block_", prune_block)
            pipeline.run(smoke(*recipe_overrides), tmp_path / "out", Progress(quiet=True))
        return list(pruned)

    def end_before_exports(*_, **__):
        raise Killed

    def goes_on(*recipe_overrides: str) -> list[str]:
        done = []

        def count_block(block, layers, *others):
            done.append(next(iter(layers)))
            return original(block, layers, *others)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(walk, "prune_block_", count_block)
            patch.setattr(pipeline, "export", end_before_exports)
            pipeline.run(smoke(*recipe_overrides), tmp_path / "out", Progress(quiet=True))
        assert not list(tmp_path.glob("out/.pruned*"))
        pruned.clear()
        return done

    (first,) = ends()
    (second,) = goes_on()
    assert ".0." in first and ".1." in second
    ends("prune.alpha=50")
    assert len(goes_on("prune.alpha=60")) == 2


def test_only_what_a_change_touches_is_done_again(finished, module_cache) -> None:
    output, _ = finished
    again = pipeline.run(smoke("evaluate.max_windows=4"), output, Progress(quiet=True))
    assert {stage.name for stage in again.stages if not stage.reused} == {
        "evaluate pruned",
        "evaluate bitmask",
        "evaluate onnx",
    }


def test_a_change_of_a_task_or_its_data_is_evaluated_again(finished, module_cache, tmp_path) -> None:
    """Also a change of what the task file takes in from beside it; not of a cache that Python leaves there."""
    output, _ = finished
    data, task = tmp_path / "data.jsonl", tmp_path / "own.yaml"
    questions = [json.dumps({"q": f"{i} is", "choices": ["odd", "even"], "label": i % 2}) for i in range(4)]
    data.write_text("\n".join(questions))
    task.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{label}}'\ndoc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )

    def done() -> set[str]:
        recipe = smoke("evaluate.tasks=[own]", f"evaluate.include_path={tmp_path}")
        return {s.name for s in pipeline.run(recipe, output, Progress(quiet=True)).stages if not s.reused}

    done()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "own.pyc").write_text("")
    assert not done()
    for path in (data, task):
        path.write_text(path.read_text() + "\n")
        assert done() == {"evaluate pruned", "evaluate bitmask"}


def test_a_damaged_artefact_is_made_again(finished, module_cache) -> None:
    output, _ = finished
    (output / "semi-structured" / "gblm_sparse.safetensors").write_bytes(b"junk")
    again = pipeline.run(smoke(), output, Progress(quiet=True))
    redone = {stage.name for stage in again.stages if not stage.reused}
    assert "export semi-structured" in redone and "prune" not in redone


@pytest.mark.parametrize("damage", ["", "[]", "change"])
def test_a_damaged_record_is_named_and_its_stage_done_again(damage, finished, module_cache, capsys) -> None:
    """A figure that was changed in a record is not reported."""
    output, first = finished
    path = output / ".stages" / "evaluate-pruned.json"
    whole = path.read_text()
    perplexity = json.loads(whole)["result"]["perplexity"]
    path.write_text(whole.replace(str(perplexity), "1.0") if damage == "change" else damage)
    again = pipeline.run(smoke(), output, Progress())
    assert f"{path} is damaged and ignored" in capsys.readouterr().err.replace("\n", "")
    assert {stage.name for stage in again.stages if not stage.reused} == {"evaluate pruned"}
    assert again.rows == first.rows


def test_a_failed_gate_fails_the_run_and_says_which(finished, module_cache) -> None:
    output, _ = finished
    result = pipeline.run(smoke("gates.min_decode_speedup=1000"), output, Progress(quiet=True))
    assert not result.passed
    assert {gate.gate for gate in result.gates if not gate.passed} == {"min_decode_speedup"}
    assert json.loads((output / "report.json").read_text())["passed"] is False


def test_an_output_that_cannot_be_written(tmp_path, module_cache) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        pipeline.run(smoke(), tmp_path / "file" / "out", Progress(quiet=True))


def test_a_foreign_file_where_a_stage_writes_is_found_before_the_first(tmp_path, module_cache, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "prune", None)
    with working_in(tmp_path, "run"):
        for name in ("onnx", "dense-onnx"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"(?s)2 faults.*/onnx' exists and was not made.*/dense-onnx' exists"):
        pipeline.run(smoke(), tmp_path, Progress(quiet=True))


def test_a_bfloat16_checkpoint_runs_from_end_to_end_on_a_cpu(tiny, tmp_path, module_cache) -> None:
    """Dense is timed in float32 beside what is stored dense, and in bfloat16 beside what is packed in it."""
    load_model(tiny("llama"), "bfloat16").save_pretrained(tmp_path / "model")
    save_tokenizer(load_tokenizer(tiny("llama")), tmp_path / "model")
    recipe = smoke(f"model={tmp_path / 'model'}", "export=[{format: bitmask}]", "gates.max_perplexity_increase=100")
    result = pipeline.run(recipe, tmp_path / "out", Progress(quiet=True))
    assert [(row.model, row.dtype) for row in result.rows] == [
        ("dense", "float32"), ("dense", "bfloat16"), ("pruned", "float32"), ("bitmask", "bfloat16")
    ]  # fmt: skip
    assert result.passed


def test_tasks_are_asked_in_torch_only(tiny, tmp_path) -> None:
    (tmp_path / "model.onnx").touch()
    settings = EvaluateSettings(tasks=("piqa",), sequence_length=64)
    assert pipeline._measurable(settings, tiny("llama")) == settings
    assert pipeline._measurable(settings, ModelSource("onnx", tmp_path)) == EvaluateSettings(sequence_length=64)


def test_the_plan_names_every_stage() -> None:
    steps = pipeline.plan(smoke())
    assert len(steps) == 8
    tasks = pipeline.plan(smoke("evaluate.tasks=[piqa]"))
    assert "evaluate on demo and by piqa (tasks in torch only)" in tasks
    assert steps[0] == "prune tiny by gblm, 2:4"
    assert any("dense model to onnx" in step for step in steps) and "gates" in steps[-1]
