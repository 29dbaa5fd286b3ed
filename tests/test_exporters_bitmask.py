"""Sparse checkpoints as users load them: through transformers, after `import gblm_compress`."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from gblm_compress.benchmarking import benchmark
from gblm_compress.bitmask import same_bits
from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.evaluation import evaluate
from gblm_compress.exporters import export
from gblm_compress.inspection import inspect
from gblm_compress.pruning import prune
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
)
from gblm_compress.sources import ModelSource, load_model
from gblm_compress.sparse_linear import SparseLinear
from tests.conftest import ARCHITECTURES


def exported(tiny, tmp_path, progress, kind="llama", pattern="unstructured", dtype="auto"):
    settings = PruneSettings(method="magnitude", pattern=pattern)
    prune(tiny(kind), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    result = export(source, tmp_path / "sparse", ExportSettings(format="bitmask", dtype=dtype), progress=progress)
    return source, ModelSource("sparse", tmp_path / "sparse"), result


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_from_pretrained_gives_the_sparse_model(kind, pattern, tiny, tmp_path, progress) -> None:
    source, folder, result = exported(tiny, tmp_path, progress, kind, pattern)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert len(sparse) == result.checks["packed_layers"] == {"gpt2": 8, "opt": 12}.get(kind, 14)
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in sparse:
            assert same_bits(model.state_dict()[name], tensor)
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert result.checks["packed_bytes"] < 0.6 * result.checks["same_layers_dense_bytes"]


def test_in_a_new_process_whatever_is_imported_first(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    load = (
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(folder.folder)!r}); "
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'SparseLinear'"
    )
    for imports in (
        "import gblm_compress, transformers",
        "import transformers, transformers.quantizers, gblm_compress",
    ):
        done = subprocess.run([sys.executable, "-c", f"{imports}; {load}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_saved_again_and_loaded_again(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(one, other), name


def test_every_dtype(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress, dtype="bfloat16")
    model = load_model(folder, "float32")  # a sparse checkpoint keeps its own
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.values.dtype == torch.bfloat16


def test_evaluate_and_benchmark_take_it(tiny, tmp_path, prose, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress)
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=2)
    same = evaluate(folder, settings, baseline=source, progress=progress)
    assert same.fidelity.mean_kl == pytest.approx(0, abs=1e-6)
    result = benchmark(
        [folder], [source], BenchmarkSettings(prompt=8, generate=4, repeats=5, warmup=1), progress=progress
    )
    assert result.measurements[1].same_tokens_as_baseline is True


def test_a_dense_model_is_refused(tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match="the model is dense; prune it first"):
        export(tiny("llama"), tmp_path / "out", ExportSettings(format="bitmask"), progress=progress)
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_pruned_inspected_or_exported_again(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    for refused in (
        lambda: inspect(folder, None, progress),
        lambda: export(folder, tmp_path / "x", ExportSettings(format="onnx"), progress=progress),
    ):
        with pytest.raises(ModelError, match="is an export"):
            refused()
    with pytest.raises(ModelError, match="is an export"):
        prune(folder, tmp_path / "x", PruneSettings(method="magnitude"), CalibrationSettings(), progress=progress)


def test_an_unknown_layout_is_refused(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    path = folder.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layout"] = "csr"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="layout 'csr' is not known"):
        load_model(ModelSource("x", folder.folder))


def test_verification_notices_a_changed_weight(tiny, tmp_path, progress, monkeypatch) -> None:
    dense_weight = SparseLinear.dense_weight
    monkeypatch.setattr(SparseLinear, "dense_weight", lambda self: dense_weight(self) * 1.001)
    with pytest.raises(VerificationError, match=r"model\.layers\.0.*bit for bit"):
        exported(tiny, tmp_path, progress)
