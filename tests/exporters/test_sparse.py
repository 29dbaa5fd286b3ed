"""Sparse checkpoints as users load them: through transformers, after `import gblm_compress`."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.exporters import export
from gblm_compress.exporters import sparse as exporters_sparse
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.inspection import inspect
from gblm_compress.models.files import SPARSE_INDEX
from gblm_compress.models.loading import load_model
from gblm_compress.models.packed_checkpoint import save_packed
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
)
from tests.conftest import ARCHITECTURES, prune

IDS = torch.arange(12).reshape(2, 6)
FORMATS = pytest.mark.parametrize("format", ["bitmask", "semi-structured"])
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256}
MAMBA = {**TOKENS, "pad_token_id": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
# What a layer replaced by another must not disturb.
FAMILIES = {
    # buffers that no file holds
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **TOKENS, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    # a linear layer's weight read by its name
    "mamba": lambda: transformers.MambaConfig(**MAMBA, time_step_rank=16),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**MAMBA, time_step_rank=16),
    # in slices of columns
    "bloom": lambda: transformers.BloomConfig(
        **TOKENS, hidden_size=64, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True
    ),
    # and written, unless it is kept from that
    "rwkv": lambda: transformers.RwkvConfig(
        **TOKENS, hidden_size=64, num_hidden_layers=4, context_length=512, intermediate_size=128, rescale_every=2
    ),
    # buffers of no dimension
    "gemma2": lambda: transformers.Gemma2Config(
        **TOKENS,
        pad_token_id=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
}


@pytest.fixture
def family(tmp_path):
    """family("mamba"): a tiny model of one of FAMILIES."""

    def make(kind: str) -> ModelSource:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(FAMILIES[kind](), dtype=torch.float32).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 2 and "A_log" not in name:
                        parameter.normal_(0, 0.15)
        model.save_pretrained(tmp_path / kind)
        byte_tokenizer().save_pretrained(tmp_path / kind)
        return ModelSource(kind, tmp_path / kind)

    return make


def exported(tiny, tmp_path, progress, kind="llama", pattern="2:4", dtype="auto", format="bitmask"):
    settings = PruneSettings(method="magnitude", pattern=pattern, fit="none")
    prune(tiny(kind), tmp_path / "pruned", settings, CalibrationSettings(), progress=progress)
    source = ModelSource("pruned", tmp_path / "pruned")
    result = export(source, tmp_path / "sparse", ExportSettings(format=format, dtype=dtype), progress=progress)
    return source, ModelSource("sparse", tmp_path / "sparse"), result


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    ("format", "pattern", "layer"),
    [
        ("bitmask", "unstructured", "bitmask"),
        ("bitmask", "2:4", "bitmask"),
        ("semi-structured", "2:4", "sparse24"),
    ],
)
def test_from_pretrained_gives_the_sparse_model(kind, format, pattern, layer, tiny, tmp_path, progress) -> None:
    source, folder, result = exported(tiny, tmp_path, progress, kind, pattern, format=format)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert all(module.layout == layer for module in sparse.values())
    assert len(sparse) == result.checks["packed_layers"] == {"gpt2": 8, "opt": 12}.get(kind, 14)
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in sparse:
            assert same_bits(model.state_dict()[name], tensor)
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert result.checks["packed_bytes"] < 0.6 * result.checks["same_layers_dense_bytes"]


def test_weights_that_a_model_divides_when_it_runs_are_pruned_as_they_are_stored(
    family, tmp_path, prose, progress
) -> None:
    """RWKV divides those of its later blocks; what is written is for a model that will do so again."""
    source = family("rwkv")
    settings = PruneSettings(method="wanda", fit="fast", pattern="unstructured")
    text = CalibrationSettings(dataset=str(prose), samples=4, sequence_length=64)
    prune(source, tmp_path / "pruned", settings, text, progress=progress)
    dense, pruned = (load_model(each).state_dict() for each in (source, ModelSource("p", tmp_path / "pruned")))
    for name in (
        f"rwkv.blocks.3.{part}.weight" for part in ("attention.output", "attention.key", "feed_forward.value")
    ):
        assert 0.7 < float(pruned[name].float().norm() / dense[name].float().norm()) < 1.1, name


@FORMATS
@pytest.mark.parametrize("kind", FAMILIES)
def test_from_pretrained_computes_what_the_dense_folder_does(kind, format, family, tmp_path, progress) -> None:
    source, folder, result = exported(family, tmp_path, progress, kind, format=format)
    dense, model = load_model(source), AutoModelForCausalLM.from_pretrained(folder.folder)
    assert "layers_left_dense" not in result.checks
    for name, buffer in dense.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        got, expected = (m(input_ids=ids, use_cache=False).logits for m in (model, dense))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert result.checks["logits_relative_difference"] <= 1e-5


@FORMATS
def test_bytes_of_the_pruned_layers_in_16_bit(format, tiny, tmp_path, progress) -> None:
    _, folder, result = exported(tiny, tmp_path, progress, dtype="bfloat16", format=format)
    assert load_model(folder, "float32").dtype == torch.bfloat16  # a sparse checkpoint keeps its own
    padding = 14 * 64 * 2 if format == "bitmask" else 0  # bytes; kernels may read that far past the last value
    assert (result.checks["packed_bytes"] - padding) / result.checks["same_layers_dense_bytes"] == 9 / 16


def test_in_a_new_process_whatever_is_imported_first(tiny, tmp_path, progress) -> None:
    _, folder, _ = exported(tiny, tmp_path, progress)
    load = (
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(folder.folder)!r}); "
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'PackedLinear'"
    )
    for imports in (
        "import gblm_compress, transformers",
        "import transformers, transformers.quantizers, gblm_compress",
    ):
        done = subprocess.run([sys.executable, "-c", f"{imports}; {load}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@FORMATS
def test_generate_save_cast_and_compile(format, tiny, tmp_path, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress, format=format)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    ids = torch.arange(20).unsqueeze(0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(one, other), name
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


def test_evaluate_and_benchmark_take_it(tiny, tmp_path, prose, progress) -> None:
    source, folder, _ = exported(tiny, tmp_path, progress)
    settings = EvaluateSettings(dataset=str(prose), sequence_length=32, max_windows=2)
    same = evaluate(folder, settings, baseline=source, progress=progress)
    assert same.fidelity["mean_kl"] == pytest.approx(0, abs=1e-6)
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


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_transformers_alone_finds_no_weights_rather_than_random_ones(shard_size, tiny, tmp_path, progress) -> None:
    """Without this package transformers does not know the layout, and would leave what it does not find random."""
    _, source, _ = exported(tiny, tmp_path, progress)
    folder = tmp_path / "packed"
    model, save = load_model(source), type(load_model(source)).save_pretrained
    model.save_pretrained = lambda place, **more: save(model, place, max_shard_size=shard_size, **more)
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
    pruning, out = (PruneSettings(method="magnitude", fit="none"), CalibrationSettings()), tmp_path / "x"
    for refused in (
        lambda: inspect(folder, None, progress),
        lambda: export(folder, out, ExportSettings(format="onnx"), progress=progress),
        lambda: prune(folder, out, *pruning, progress=progress),
    ):
        with pytest.raises(ModelError, match="is an export"):
            refused()


UP = "model.layers.0.mlp.up_proj"  # [128, 64]
K = "model.layers.1.self_attn.k_proj"  # [32, 64]


def replaced(name, change):
    """A damage of the weights: a tensor is changed, or goes."""

    def damage(folder) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        tensors |= {} if changed is None else {name: changed.contiguous()}
        save_file(tensors, path, {"format": "pt"})

    return damage


def described(change):
    """A damage of `quantization_config`."""

    def damage(folder) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def of_layer(**entries):
    return described(lambda config: config["layers"][UP].update(entries))


def with_value(at, number):
    return lambda values: values.index_fill(0, torch.tensor([at]), number)


NAN = float("nan")
DAMAGES = {
    "bitmask": [
        (replaced(f"{UP}.mask", lambda mask: None), rf"'{{folder}}': {UP}\.mask: no such tensor is in the folder"),
        (replaced(f"{K}.values", lambda values: None), rf"{K}\.values: no such tensor"),
        (replaced("model.norm.weight", lambda weight: None), r"model\.norm\.weight: no such tensor"),
        (replaced(f"{UP}.mask", lambda mask: torch.full_like(mask, -1)), rf"{UP}\.values: .* mask takes \[8256\]"),
        (replaced(f"{UP}.mask", lambda mask: mask[1:]), rf"{UP}\.mask: int64 \[127, 1\]; needs int64 \[128, 1\]"),
        (replaced(f"{UP}.mask", lambda mask: mask.double()), rf"{UP}\.(values|mask): "),
        (replaced(f"{K}.values", lambda values: values[:-1]), rf"{K}\.values: shape \[1087\]; .* takes \[1088\]"),
        (replaced(f"{K}.values", lambda values: values.long()), rf"{K}\.values: int64 .* needs float32 or float16 or"),
        (replaced(f"{K}.values", with_value(5, NAN)), rf"{K}\.values: holds NaN or infinite"),
        (replaced(f"{K}.values", with_value(1087, 1.0)), rf"{K}\.values: the last 64 must be zeros"),
        (of_layer(nonzeros=-64), rf"layer '{UP}': nonzeros -64 is no number of values"),
        (of_layer(nonzeros=10**18), rf"layer '{UP}': nonzeros 1000000000000000000 is no number"),
        (described(lambda c: c["layers"][UP].pop("nonzeros")), rf"layer '{UP}': it is described as .*missing"),
    ],
    "semi-structured": [
        (replaced(f"{UP}.positions", lambda positions: None), rf"{UP}\.positions: no such tensor"),
        (replaced(f"{UP}.values", lambda values: None), rf"{UP}\.values: no such tensor"),
        (replaced(f"{UP}.values", lambda values: values[:, 1:]), rf"{UP}\.values: .* needs .* \[128, 32\]"),
        (replaced(f"{UP}.values", lambda values: values * NAN), rf"{UP}\.values: holds NaN"),
        (replaced(f"{UP}.positions", lambda positions: positions[1:]), rf"{UP}\.positions: uint8 \[127, 8\]; needs"),
        (replaced(f"{UP}.positions", lambda positions: positions.long()), rf"{UP}\.positions: int64 .* needs uint8"),
        (replaced(f"{UP}.positions", lambda p: p * 0), rf"{UP}\.positions: 1024 bytes hold no two increasing"),
        (of_layer(nonzeros=5), rf"layer '{UP}': .* unexpected keyword argument 'nonzeros'"),
    ],
    "both": [
        (described(lambda config: config.update(layout="csr")), "layout 'csr' is not known; this version reads"),
        (described(lambda config: config.update(layout=["bitmask"])), r"layout \['bitmask'\] is not known"),
        (described(lambda config: config.update(layers=[UP])), "names no packed layers"),
        (described(lambda config: config["layers"].pop(UP)), rf"{UP}\.weight: no such tensor"),
        (described(lambda config: config["layers"].update({UP: None})), rf"layer '{UP}': it is described as None"),
        (described(lambda config: config["layers"].update(bogus={})), "layer 'bogus': .* has no layer 'bogus'"),
        (described(lambda config: config["layers"].update({"": {}})), "'' is a LlamaForCausalLM; only Linear"),
        (described(lambda c: c["layers"].update({"model.norm": {}})), "'model.norm' is a LlamaRMSNorm; only Linear"),
        (described(lambda c: c["layers"].update(lm_head={})), "'lm_head' is a Linear; only .* weights of their own"),
        (of_layer(shape=[64, 128]), rf"layer '{UP}': it is described as .*; the model's has shape \[128, 64\]"),
        (of_layer(shape=None), "the model's has shape"),
        (of_layer(bias=True), "the model's has shape .* bias False"),
        (of_layer(colour="red"), "unexpected keyword argument 'colour'"),
    ],
}


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    """sound("bitmask"): an exported folder, written once; not to be changed."""
    from functools import cache

    from gblm_compress.progress import Progress

    return cache(lambda format: exported(tiny, tmp_path_factory.mktemp(format), Progress(quiet=True), format=format)[1])


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [
        (format, damage, message)
        for format in ("bitmask", "semi-structured")
        for damage, message in DAMAGES[format] + DAMAGES["both"]
    ],
)
def test_a_damaged_folder_is_refused_by_from_pretrained_itself(format, damage, message, sound, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sound(format).folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message.replace("{folder}", str(folder))):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError, match="model 'x': "):
        load_model(ModelSource("x", folder))


def test_a_file_that_changes_under_a_loaded_model_moves_no_kernel(sound, tmp_path) -> None:
    """Loaded tensors are parts of the mapped file; of those the mask alone decides where values are read."""
    shutil.copytree(sound("bitmask").folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    masks = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".mask")}
    path = next((tmp_path / "copy").glob("*.safetensors"))
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert len(masks) == 14 and all(torch.equal(model.get_buffer(name), mask) for name, mask in masks.items())
    model(input_ids=torch.arange(20).unsqueeze(0))


@FORMATS
def test_zeros_of_either_sign_may_be_stored(format, sound, tmp_path) -> None:
    """A cast to a narrower dtype makes some: they are weights like others."""
    shutil.copytree(sound(format).folder, tmp_path / "copy")
    replaced(f"{UP}.values", lambda values: values * 0)(tmp_path / "copy")
    replaced(f"{K}.values", lambda values: values * -0.0)(tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for name in (UP, K):
        layer = model.get_submodule(name)
        assert not layer.dense_weight().any() and not layer(torch.randn(3, 64)).any()


@FORMATS
def test_verification_notices_a_changed_weight(format, tiny, tmp_path, progress, monkeypatch) -> None:
    dense_weight = PackedLinear.dense_weight
    monkeypatch.setattr(PackedLinear, "dense_weight", lambda self: dense_weight(self) * 1.001)
    with pytest.raises(VerificationError, match=r"model\.layers\.0.*bit for bit"):
        exported(tiny, tmp_path, progress, format=format)


def another_norm(model) -> None:
    model.model.norm.weight.data *= 1.001


def another_mask(model) -> None:
    model.transformer.h[1].attn.attention.bias[..., 5, 3] ^= True


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", another_norm, r"model\.norm\.weight.*bit for bit"),
        ("gpt_neo", another_mask, r"h\.1\.attn\.attention\.bias: .* computes another buffer"),
    ],
)
def test_verification_notices_a_tensor_that_is_not_packed(
    kind, change, message, tiny, family, tmp_path, progress, monkeypatch
) -> None:
    load = exporters_sparse.loading.load_model

    def changed(source, *arguments):
        model = load(source, *arguments)
        if source.is_packed:
            change(model)
        return model

    monkeypatch.setattr(exporters_sparse.loading, "load_model", changed)
    with pytest.raises(VerificationError, match=message):
        exported(family if kind in FAMILIES else tiny, tmp_path, progress, kind)


@FORMATS
def test_verification_runs_the_reloaded_folder(format, tiny, tmp_path, progress, monkeypatch) -> None:
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    with pytest.raises(VerificationError, match="predictions of the reloaded folder and its source differ by"):
        exported(tiny, tmp_path, progress, format=format)
    assert not (tmp_path / "sparse").exists()
