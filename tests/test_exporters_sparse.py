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
from gblm_compress.exporters import sparse as exporters_sparse
from gblm_compress.inspection import inspect
from gblm_compress.model_files import SPARSE_INDEX, SPARSE_SINGLE
from gblm_compress.pruning import prune
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
)
from gblm_compress.sources import ModelSource, load_model, resolve_model
from gblm_compress.sparse_checkpoint import save_packed
from gblm_compress.sparse_linear import BitmaskLinear, Sparse24Linear, SparseLinear
from tests.conftest import ARCHITECTURES

IDS = torch.arange(12).reshape(2, 6)
FORMATS = pytest.mark.parametrize("format", ["bitmask", "semi-structured"])


def exported(tiny, tmp_path, progress, kind="llama", pattern="2:4", dtype="auto", format="bitmask"):
    settings = PruneSettings(method="magnitude", pattern=pattern)
    prune(tiny(kind), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    result = export(source, tmp_path / "sparse", ExportSettings(format=format, dtype=dtype), progress=progress)
    return source, ModelSource("sparse", tmp_path / "sparse"), result


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    ("format", "pattern", "layer"),
    [
        ("bitmask", "unstructured", BitmaskLinear),
        ("bitmask", "2:4", BitmaskLinear),
        ("semi-structured", "2:4", Sparse24Linear),
    ],
)
def test_from_pretrained_gives_the_sparse_model(kind, format, pattern, layer, tiny, tmp_path, progress) -> None:
    source, folder, result = exported(tiny, tmp_path, progress, kind, pattern, format=format)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, layer)}
    assert all(isinstance(module, SparseLinear) for module in sparse.values())
    assert len(sparse) == result.checks["packed_layers"] == {"gpt2": 8, "opt": 12}.get(kind, 14)
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in sparse:
            assert same_bits(model.state_dict()[name], tensor)
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert result.checks["packed_bytes"] < 0.6 * result.checks["same_layers_dense_bytes"]


@FORMATS
def test_bytes_of_the_pruned_layers_in_16_bit(format, tiny, tmp_path, progress) -> None:
    _, _, result = exported(tiny, tmp_path, progress, dtype="bfloat16", format=format)
    padding = 14 * 64 * 2 if format == "bitmask" else 0  # bytes; kernels may read that far past the last value
    assert (result.checks["packed_bytes"] - padding) / result.checks["same_layers_dense_bytes"] == 9 / 16


def test_in_a_new_process_whatever_is_imported_first(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    load = (
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(folder.folder)!r}); "
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'BitmaskLinear'"
    )
    for imports in (
        "import gblm_compress, transformers",
        "import transformers, transformers.quantizers, gblm_compress",
    ):
        done = subprocess.run([sys.executable, "-c", f"{imports}; {load}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@FORMATS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_again_and_loaded_again(format, kind, tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress, kind, format=format)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(one, other), name


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_lm_eval_loads_the_folder_by_itself(tiny, tmp_path, progress) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    source, folder, _ = exported(tiny, tmp_path, progress)
    requests = [Instance("loglikelihood", {}, (text, " and so on"), 0) for text in ("It is", "They were")]
    found = []
    for model in (source, folder):
        lm = HFLM(pretrained=str(model.folder), device="cpu", dtype="float32", batch_size=2)
        found.append([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    assert isinstance(lm.model.model.layers[0].mlp.up_proj, BitmaskLinear)
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0][0] != found[0][1]


@FORMATS
def test_generate_cast_and_compile(format, tiny, tmp_path, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress, format=format)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    ids = torch.arange(20).unsqueeze(0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        # in 16 bit, both are rounded differently in every layer: 5 % of the largest logit
        got = model.to(torch.bfloat16)(input_ids=ids).logits.float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@FORMATS
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_loaded_in_another_dtype(format, asked, tiny, tmp_path, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress, format=format)
    model = AutoModelForCausalLM.from_pretrained(folder.folder, dtype=asked, device_map="cpu")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.values.dtype == asked
    dense = load_model(source, str(asked).removeprefix("torch.")).model.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.dense_weight(), dense)


@FORMATS
def test_every_dtype(format, tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress, dtype="bfloat16", format=format)
    model = load_model(folder, "float32")  # a sparse checkpoint keeps its own
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.values.dtype == torch.bfloat16


@FORMATS
def test_evaluate_and_benchmark_take_it(format, tiny, tmp_path, prose, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress, format=format)
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=2)
    same = evaluate(folder, settings, baseline=source, progress=progress)
    assert same.fidelity.mean_kl == pytest.approx(0, abs=1e-6)
    result = benchmark(
        [folder], [source], BenchmarkSettings(prompt=8, generate=4, repeats=5, warmup=1), progress=progress
    )
    sparse = result.measurements[1]
    assert sparse.same_tokens_as_baseline is True
    layer = AutoModelForCausalLM.from_pretrained(folder.folder).model.layers[0].mlp.up_proj
    assert sparse.prefill_kernels[layer.kernel(8)] >= 2 and sparse.prefill_kernels["dense"] == 1  # the head
    assert sum(sparse.decode_kernels.values()) == 15


@pytest.mark.parametrize(
    ("format", "message"),
    [("bitmask", "the model is dense; prune it first"), ("semi-structured", "prune with `--pattern 2:4` first")],
)
def test_a_dense_model_is_refused(format, message, tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny("llama"), tmp_path / "out", ExportSettings(format=format), progress=progress)
    assert not list(tmp_path.iterdir())


def test_what_is_not_2_4_is_refused_by_layer(tiny, tmp_path, progress) -> None:
    with pytest.raises(UsageError, match=r"14 of 14 layers are not 2:4.*\n  model\.layers\.0.*nonzeros.*\n.*\n.*"):
        exported(tiny, tmp_path, progress, pattern="unstructured", format="semi-structured")
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"}


def test_a_damaged_folder(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress, format="semi-structured")
    (folder.folder / SPARSE_SINGLE).write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)
    with pytest.raises(ModelError, match="damaged safetensors file"):
        resolve_model(str(folder.folder), progress)


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_transformers_alone_finds_no_weights_rather_than_random_ones(shard_size, tiny, tmp_path, progress) -> None:
    """Without this package transformers does not know the layout, and would leave what it does not find random."""
    _, source, _ = exported(tiny, tmp_path, progress)
    folder = tmp_path / "packed"
    model, save = load_model(source), type(load_model(source)).save_pretrained
    model.save_pretrained = lambda place: save(model, place, max_shard_size=shard_size)
    save_packed(model, folder)
    assert (folder / SPARSE_INDEX).exists() == (shard_size == "20KB")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode and "no file named model.safetensors" in alone.stderr
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    again.save_pretrained(tmp_path / "again")  # with ordinary names, which this package reads too
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(third(input_ids=IDS).logits, model(input_ids=IDS).logits)


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


@pytest.mark.parametrize(("format", "layer"), [("bitmask", BitmaskLinear), ("semi-structured", Sparse24Linear)])
def test_verification_notices_a_changed_weight(format, layer, tiny, tmp_path, progress, monkeypatch) -> None:
    dense_weight = layer.dense_weight
    monkeypatch.setattr(layer, "dense_weight", lambda self: dense_weight(self) * 1.001)
    with pytest.raises(VerificationError, match=r"model\.layers\.0.*bit for bit"):
        exported(tiny, tmp_path, progress, format=format)


def test_verification_notices_a_changed_tensor_that_is_not_packed(tiny, tmp_path, progress, monkeypatch) -> None:
    load = exporters_sparse.sources.load_model

    def with_another_norm(source, *arguments):
        model = load(source, *arguments)
        if source.is_sparse:
            model.model.norm.weight.data *= 1.001
        return model

    monkeypatch.setattr(exporters_sparse.sources, "load_model", with_another_norm)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight.*bit for bit"):
        exported(tiny, tmp_path, progress)
