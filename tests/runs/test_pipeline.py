"""A whole run on a tiny model: artefacts, report, reuse, gates."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from gblm_compress.errors import UsageError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models.finding import resolve_model
from gblm_compress.models.loading import load_model, load_processor, save_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning import walk
from gblm_compress.runs import pipeline, report, run_report, stages, tables
from gblm_compress.runs.job import Job
from gblm_compress.runs.pipeline import dry_run
from gblm_compress.runs.recipe import find_recipe, load_recipe
from gblm_compress.runs.stages import stages_of
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
    assert run_report.read(output) == run_report.read(output / "report.json")
    assert run_report.read(output).rows == result.rows
    assert [stage["name"] for stage in content["stages"]] == [
        "prune", "export bitmask", "export onnx", "export semi-structured", "export dense-onnx",
        "evaluate pruned", "evaluate bitmask", "evaluate onnx", "benchmark",
    ]  # fmt: skip
    assert content["passed"] is True
    html = (output / report.PAGE).read_text()
    assert "dense-onnx" in html and "data:image/png" in html
    drawn = {path.stem for path in (output / report.PICTURES).iterdir()}
    assert drawn == {
        "quality-bytes", "quality-time", "latency-decode", "latency-prefill", "byte-limit", "step", "sparsity",
        "output-error",
    }  # fmt: skip


def test_the_recipe_in_the_folder_does_the_same_again(finished, module_cache) -> None:
    output, first = finished
    (command,) = first.commands
    assert command == f"gblm-compress run {output / 'recipe.json'} -o {output}"
    again = load_recipe(output / "recipe.json")
    assert again.model_dump() == smoke().model_dump()


def test_rows_set_dense_against_pruned_per_runtime(finished) -> None:
    _, result = finished
    times = {row.artefact: row for row in result.find("ttft_ms")}
    assert {name: (row.runtime, row.dense) for name, row in times.items()} == {
        "dense": ("torch", True), "pruned": ("torch", False), "bitmask": ("torch", False),
        "dense-onnx": ("onnxruntime", True), "onnx": ("onnxruntime", False),
    }  # fmt: skip
    assert {row.artefact: row.value for row in result.find("density")} == {
        "dense": 1.0, "pruned": 0.5, "bitmask": 0.5, "semi-structured": 0.5, "dense-onnx": 1.0, "onnx": 0.5,
    }  # fmt: skip
    quality = {row.artefact: row for row in result.find("perplexity")}
    assert quality["onnx"].value == pytest.approx(quality["pruned"].value, rel=1e-3)
    assert quality["dense"].value == quality["pruned"].baseline != quality["pruned"].value
    assert {row.artefact for row in result.find("decode_speedup")} == {"pruned", "bitmask", "onnx"}
    assert result.find("bytes_ratio", "bitmask")[0].value < 0.7
    assert [table.title for table in tables.of(result)] == [
        "Gates", "Quality and size", "Speed and memory", "Kernels that ran", "Pruned layers", "Stages"
    ]  # fmt: skip


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
            patch.setattr(stages, "export", end_before_exports)
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


def test_the_dense_model_reads_every_window_once_for_all_evaluations(finished, module_cache, monkeypatch) -> None:
    """And every figure is what a run gave whose evaluations have nothing in common."""
    output, first = finished
    original, read = TorchRuntime.predict, []

    def predict(runtime, sample):
        read.append(runtime.model.config.name_or_path)
        return original(runtime, sample)

    for path in output.glob(".stages/evaluate-*.json"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(TorchRuntime, "predict", predict)
        again = pipeline.run(smoke(), output, Progress(quiet=True))
    windows = smoke().evaluate.max_windows
    names = [Path(name).name for name in read]
    assert {name: names.count(name) for name in names} == {"tiny": windows, "pruned": windows, "bitmask": windows}
    assert again.rows == first.rows
    dense = resolve_model("tiny", Progress(quiet=True))
    for outcome in (outcome for outcome in again.stages if outcome.name.startswith("evaluate ")):
        source = ModelSource("", output / outcome.name.removeprefix("evaluate "))
        alone = evaluate(source, smoke().evaluate, baseline=dense, progress=Progress(quiet=True)).as_dict()
        assert outcome.result | {"model": ""} == json.loads(json.dumps(alone))


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
    assert {gate.gate for gate in result.failed_gates} == {"min_decode_speedup"}
    assert json.loads((output / "report.json").read_text())["passed"] is False


def test_an_output_that_cannot_be_written(tmp_path, module_cache) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        pipeline.run(smoke(), tmp_path / "file" / "out", Progress(quiet=True))


def test_a_foreign_file_where_a_stage_writes_is_found_before_the_first(tmp_path, module_cache, monkeypatch) -> None:
    monkeypatch.setattr(stages, "prune", None)
    with working_in(tmp_path, "run"):
        for name in ("onnx", "dense-onnx"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"(?s)2 faults.*/onnx' exists and was not made.*/dense-onnx' exists"):
        pipeline.run(smoke(), tmp_path, Progress(quiet=True))


def test_a_bfloat16_checkpoint_runs_from_end_to_end_on_a_cpu(tiny, tmp_path, module_cache) -> None:
    """Dense is timed in float32 beside what is stored dense, and in bfloat16 beside what is packed in it."""
    load_model(tiny("llama"), "bfloat16").save_pretrained(tmp_path / "model")
    save_processor(load_processor(tiny("llama")), tmp_path / "model")
    recipe = smoke(f"model={tmp_path / 'model'}", "export=[{format: bitmask}]", "gates.max_perplexity_increase=100")
    result = pipeline.run(recipe, tmp_path / "out", Progress(quiet=True))
    assert [(row.artefact, row.dtype) for row in result.find("tpot_ms")] == [
        ("dense", "float32"), ("dense", "bfloat16"), ("pruned", "float32"), ("bitmask", "bfloat16")
    ]  # fmt: skip
    assert [row.artefact for row in result.find("decode_speedup")] == ["pruned", "bitmask"]
    assert result.passed


def test_the_list_of_stages_names_all_of_them_and_asks_tasks_in_torch_only(finished) -> None:
    output, result = finished
    listed = stages_of(Job.of(smoke("evaluate.tasks=[piqa]"), None, output))
    assert [stage.name for stage in listed] == [outcome.name for outcome in result.stages]
    said = [stage.does for stage in listed]
    assert said[0] == "prune tiny by gblm, 2:4" and any("dense model to onnx" in does for does in said)
    assert {"evaluate pruned on demo and by piqa", "evaluate onnx on demo"} < {*said}
    written = {stage.place.name for stage in listed if stage.place}
    assert written == {path.name for path in output.iterdir() if path.is_dir()} - {".stages", report.PICTURES}


def fates(recipe, output: Path) -> dict[str, str]:
    return {step.name: step.fate for step in dry_run(recipe, output, Progress(quiet=True)).steps}


def test_a_dry_run_of_a_new_folder(tmp_path, module_cache) -> None:
    output = tmp_path / "new"
    seen = dry_run(smoke("gates.max_mean_kl=1"), output, Progress(quiet=True))
    assert {step.fate for step in seen.steps} == {"do"} and seen.seconds is None
    assert seen.gates[0]["max_mean_kl"] == 1 and not output.exists()
    assert seen.bytes == sum(s.disk.stays for s in seen.steps) + max(s.disk.meanwhile for s in seen.steps)
    assert seen.as_dict()["bytes"] == seen.bytes > 0


def test_a_dry_run_says_what_is_reused_and_how_long_the_rest_took(finished, module_cache) -> None:
    output, _ = finished
    first = pipeline.run(smoke(), output, Progress(quiet=True))
    seconds = {outcome.name: outcome.seconds for outcome in first.stages}
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    seen = dry_run(smoke(), output, Progress(quiet=True))
    assert {step.fate for step in seen.steps} == {"reuse"} and (seen.bytes, seen.seconds) == (0, 0)
    again = dry_run(smoke("evaluate.max_windows=3"), output, Progress(quiet=True))
    assert [step.name for step in again.to_do] == ["evaluate pruned", "evaluate bitmask", "evaluate onnx"]
    assert again.seconds == pytest.approx(sum(seconds[step.name] for step in again.to_do))

    anew = fates(smoke("prune.alpha=77"), output)
    assert anew.pop("prune") == "do" and anew.pop("export dense-onnx") == "reuse"
    assert set(anew.values()) == {"reuse if its inputs come out the same"}
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_the_artefacts_take_no_more_disk_than_a_dry_run_says(finished, tmp_path, module_cache) -> None:
    output, _ = finished
    for step in dry_run(smoke(), tmp_path, Progress(quiet=True)).steps:
        name = step.name.removeprefix("export ").replace("prune", "pruned")
        if (output / name).is_dir():
            written = ModelSource(name, output / name).bytes_on_disk
            if (graph := output / name / "model.onnx").exists():  # not counted: the graph, and its table of rotations
                tables = [t for t in onnx.load(graph).graph.initializer if t.name in ("cos_cache", "sin_cache")]
                written -= graph.stat().st_size + sum(len(table.raw_data) for table in tables)
            assert 0 < written <= step.disk.stays


def test_a_dry_run_of_a_model_that_is_not_here(finished, tmp_path, module_cache) -> None:
    output, _ = finished
    seen = dry_run(smoke("model=owner/model"), tmp_path, Progress(quiet=True))
    assert {step.fate for step in seen.steps} == {"do"} and seen.bytes is None
    assert seen.unchecked == ["model owner/model"]
    assert fates(smoke("model=owner/model"), output)["prune"] == "reuse if its inputs come out the same"


def test_a_dry_run_of_a_grid_looks_at_every_cell(tmp_path, module_cache) -> None:
    grid = "compare={methods: [wanda, paper], patterns: ['2:4'], seeds: 2}"
    seen = dry_run(smoke(grid, "export=[]", "benchmark=null", "gates={}"), tmp_path, Progress(quiet=True))
    assert [step.does for step in seen.steps[2:]] == [
        f"compare: {method} 2:4 seed {seed}" for method in ("wanda", "paper") for seed in (0, 1)
    ]


def test_a_recovered_model_is_what_is_exported_and_measured(tmp_path, module_cache) -> None:
    recipe = smoke(
        "recover.data=[demo]", "recover.tokens=1280", "recover.sequence_length=32", "recover.batch=2",
        "export=[{format: bitmask}]", "benchmark=null", "gates={}",
    )  # fmt: skip
    result = pipeline.run(recipe, tmp_path / "run", Progress(quiet=True))
    assert [stage.name for stage in result.stages] == [
        "prune",
        "recover",
        "export bitmask",
        "evaluate recovered",
        "evaluate bitmask",
    ]
    for folder in ("recovered", "bitmask"):
        text = (tmp_path / "run" / folder / "gblm_manifest.json").read_text()
        assert ('"recovery"' in text) == (folder == "recovered")
    source = json.loads((tmp_path / "run" / "bitmask" / "gblm_manifest.json").read_text())["source_sha256"]
    assert source == ModelSource("recovered", tmp_path / "run" / "recovered").fingerprint
    curve = next(outcome for outcome in result.stages if outcome.name == "recover").result["curve"]
    looks = result.find("held_out_loss")
    assert [(look.tokens, look.value) for look in looks] == [(s["tokens"], s["held_out"]) for s in curve]
    assert min(looks, key=lambda look: look.value).part == "kept"
    again = pipeline.run(recipe, tmp_path / "run", Progress(quiet=True))
    assert all(stage["reused"] for stage in again.as_dict()["stages"]), again.as_dict()["stages"]
    assert result.as_dict()["rows"] == again.as_dict()["rows"]


WRITING = (
    "generate={tokens: 2000, sequence_length: 40, batch: 25}", "calibration.dataset=written",
    "calibration.sequence_length=32", "recover.data=[demo=0.5, written=0.5]", "recover.tokens=1280",
    "recover.sequence_length=32", "recover.batch=2", "export=[]", "benchmark=null", "gates={}",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> tuple[Path, pipeline.RunReport]:
    output = tmp_path_factory.mktemp("writing") / "run"
    assert fates(smoke(*WRITING), output) == dict.fromkeys(["generate", "prune", "recover", "evaluate recovered"], "do")
    return output, pipeline.run(smoke(*WRITING), output, Progress(quiet=True))


def test_what_the_model_writes_is_what_is_calibrated_and_trained_on(written) -> None:
    output, result = written
    assert [stage.name for stage in result.stages] == ["generate", "prune", "recover", "evaluate recovered"]
    text = output / "written.txt"
    assert result.stages[0].result["words"] == len(text.read_text().split()) > 100
    manifest = json.loads((output / "recovered" / "gblm_manifest.json").read_text())
    assert manifest["calibration"]["dataset"] == str(text)
    assert [source["dataset"] for source in manifest["recovery"]["settings"]["data"]] == ["demo", str(text)]
    assert result.conditions["written"] == "2,000 tokens by the dense model, seed 0"


def test_written_text_is_written_again_where_it_is_gone_or_asked_for_otherwise(written, tmp_path) -> None:
    output, quiet = tmp_path / "run", Progress(quiet=True)
    shutil.copytree(written[0], output)
    text = output / "written.txt"
    before, other = text.read_text(), (*WRITING, "generate.seed=1")
    assert set(fates(smoke(*WRITING), written[0]).values()) == {"reuse"}

    text.unlink()
    later = "reuse if its inputs come out the same"
    assert [*fates(smoke(*WRITING), output).values()] == ["do", later, later, later]
    pipeline.run(smoke(*WRITING), output, quiet)
    assert text.read_text() == before
    assert [*fates(smoke(*other), output).values()] == ["do", later, later, later]
    again = pipeline.run(smoke(*other), output, quiet)
    assert text.read_text() != before and not any(stage.reused for stage in again.stages)


def test_a_folder_where_the_text_goes_is_found_before_the_first_stage(tmp_path, module_cache) -> None:
    with working_in(tmp_path, "run"):
        (tmp_path / "written.txt").mkdir()
    with pytest.raises(UsageError, match=r"written.txt' is no file"):
        pipeline.run(smoke(*WRITING), tmp_path, Progress(quiet=True))
    assert not (tmp_path / ".stages").exists()
