import json
import shutil

import pytest

from gblm_compress.errors import UsageError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models.baseline import check_baseline
from gblm_compress.models.manifest import MANIFEST
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings


@pytest.fixture
def pruned(tiny, tmp_path, progress) -> ModelSource:
    settings = PruneSettings(method="magnitude", pattern="2:4", fit="none")
    prune(tiny("llama"), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    return ModelSource("pruned", tmp_path / "pruned")


def changed(source: ModelSource, folder, **config) -> ModelSource:
    """A copy of a model with another config.json."""
    shutil.copytree(source.folder, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return ModelSource(folder.name, folder)


def test_the_source_is_a_baseline_wherever_it_lies(pruned, tiny, tmp_path) -> None:
    check_baseline(pruned, tiny("llama"))
    check_baseline(pruned, ModelSource("copy", shutil.copytree(tiny("llama").folder, tmp_path / "copy")))
    check_baseline(pruned, pruned)  # it comes from the same model


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 32), ("num_hidden_layers", 3), ("vocab_size", 99), ("architectures", ["X"])]
)
def test_another_architecture_is_named_by_its_first_difference(tiny, tmp_path, key, value) -> None:
    other = changed(tiny("llama"), tmp_path / "other", **{key: value})
    with pytest.raises(UsageError, match=rf"'other' is no baseline of .*its {key} is "):
        check_baseline(tiny("llama"), other)


def test_the_shapes_of_a_model_within_a_model_count(tiny, tmp_path) -> None:
    first = changed(tiny("llama"), tmp_path / "first", text_config={"num_experts": 4})
    second = changed(tiny("llama"), tmp_path / "second", text_config={"num_experts": 8})
    with pytest.raises(UsageError, match="its num_experts is 8, the model's 4"):
        check_baseline(first, second)


def test_another_model_of_the_same_shapes_is_told_by_the_manifest(pruned, tmp_path) -> None:
    build_tiny("llama", tmp_path / "twin", seed=1)
    twin = ModelSource("twin", tmp_path / "twin")
    with pytest.raises(UsageError, match=r"'twin' is no baseline of 'pruned', which was made from .* by its gblm_m"):
        check_baseline(pruned, twin)
    (pruned.folder / MANIFEST).unlink()
    check_baseline(pruned, twin)  # nothing but the shapes is known


def test_evaluate_refuses_it_before_reading_anything(tiny, pruned, progress) -> None:
    settings = EvaluateSettings(dataset="./gone.txt", sequence_length=32)
    with pytest.raises(UsageError) as found:
        evaluate(pruned, settings, baseline=tiny("mistral"), progress=progress)
    assert "2 faults" in str(found.value) and "its model_type is 'mistral'" in str(found.value)
    assert "'./gone.txt': no such file" in str(found.value)
