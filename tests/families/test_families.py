"""A fast subset of the matrix; `make test-families` runs all of it."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from gblm_compress.measure.engines import GenaiRuntime
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.models.source import ModelSource
from tests.conftest import greedy_tokens
from tests.families.__main__ import PAGE, RESULTS, page
from tests.families.steps import take
from tests.families.tiny import families

# Experts with files for each, a subclass of Linear, blocks that are no chain, a language model in a multimodal one.
FAST = ("qwen3_moe", "falcon", "gemma3n_text", "gemma3")


@pytest.mark.parametrize("name", FAST)
def test_a_family_goes_through_pruning_and_packing(name: str, tmp_path: Path) -> None:
    assert take(name, tmp_path, ["bitmask"]) == {"build": "ok", "prune": "ok", "bitmask": "ok"}


def test_states_of_convolutions_and_recurrences_are_inputs_and_outputs(tmp_path: Path) -> None:
    assert take("falcon_h1", tmp_path, ["onnx"]) == {"build": "ok", "prune": "ok", "onnx": "ok"}
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    parts = ("key", "value", "conv_state", "recurrent_state")
    expected = {f"{layer}.{part}" for layer in (0, 1) for part in parts}
    for values, stem in ((graph.input, "past_key_values."), (graph.output, "present.")):
        assert {value.name.removeprefix(stem) for value in values if value.name.startswith(stem)} == expected
    assert not (tmp_path / "onnx" / "genai_config.json").exists()  # onnxruntime-genai does not know the family


def test_onnxruntime_genai_runs_lfm2(tmp_path: Path) -> None:
    assert take("lfm2", tmp_path, ["onnx"]) == {"build": "ok", "prune": "ok", "onnx": "ok"}
    source = ModelSource("lfm2", tmp_path / "onnx")
    expected, got = OnnxRuntime(source, "cpu", 1), GenaiRuntime(source, "cpu", 1)
    ids = torch.arange(20).unsqueeze(0)
    assert greedy_tokens(got, ids, 6) == greedy_tokens(expected, ids, 6)


def test_the_page_is_made_from_the_outcomes_of_all_families() -> None:
    results = json.loads(RESULTS.read_text())
    assert set(families()) <= results.keys()
    assert PAGE.read_text() == page(results)
