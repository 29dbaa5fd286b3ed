"""Sparse checkpoints, exact and rounded, as users load them: through transformers, after `import gblm_compress`."""

import json
import shutil
from functools import cache, partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.exporters import sparse as exporters_sparse
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS, cpu_linear
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedEmbedding, PackedLinear
from gblm_compress.measure.inspection import inspect
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models import manifest
from gblm_compress.models.files import SPARSE_INDEX, SPARSE_SINGLE
from gblm_compress.models.loading import load_model
from gblm_compress.models.packed_checkpoint import save_packed
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY
from gblm_compress.settings import PruneSettings
from tests.conftest import ARCHITECTURES, edit_json, edit_weights, export, prune, saved
from tests.families.tiny import tiny_family
from tests.scripts import python

IDS = torch.arange(20).unsqueeze(0)
NAMES = {layout.format: name for name, layout in LAYOUTS.items()}
QUANTISED = {layout.format: layout for layout in LAYOUTS.values() if layout.exact}
ROUNDING = pytest.mark.parametrize("format", QUANTISED)
# What a layer replaced by another must not disturb, with arguments of the family's config.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neo": {},  # buffers that no file holds
    "mamba": {},  # a linear layer's weight read by its name
    "falcon_mamba": {},
    "bloom": {"pretraining_tp": 2, "slow_but_exact": True},  # in slices of columns
    "rwkv": {"num_hidden_layers": 4, "rescale_every": 2},  # and written, unless it is kept from that
    "gemma2": {},  # buffers of no dimension
}


@pytest.fixture(scope="module")
def exported(pruned, tmp_path_factory):
    """exported("bitmask"): a tiny model with zeros, the same packed, and what verification found.

    `kind` is an architecture or one of FAMILIES. Made once, and not to be changed.
    """

    @cache
    def make(format: str, kind: str = "llama", pattern: str | None = None, **options):
        folder = tmp_path_factory.mktemp(format)
        if kind in FAMILIES:
            source = ModelSource("pruned", folder / "pruned")
            dense = saved(tiny_family(kind, **FAMILIES[kind]), folder / kind)
            prune(dense, source.folder, PruneSettings(method="magnitude", pattern="2:4", fit="none"))
        else:
            source = pruned(kind, pattern or LAYOUTS[NAMES[format]].pattern or "unstructured")
        result, packed = export(source, folder / "packed", format=format, **options)
        return source, packed, result.checks

    return make


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("format", ["bitmask", "semi-structured"])
@pytest.mark.parametrize("kind", [*ARCHITECTURES, *FAMILIES])
def test_from_pretrained_gives_the_sparse_model(format, kind, exported) -> None:
    source, folder, checks = exported(format, kind)
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert all(module.layout == NAMES[format] for module in sparse.values())
    assert sparse.keys() == manifest.read(source.folder)["layers"].keys() and len(sparse) == checks["packed_layers"]
    for name, tensor in (*dense.state_dict().items(), *dense.named_buffers()):
        if name.removesuffix(".weight") not in sparse:
            assert same_bits((model.state_dict() | dict(model.named_buffers()))[name], tensor), name
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        got, expected = (m(input_ids=ids, use_cache=False).logits for m in (model, dense))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert checks["packed_bytes"] < 0.6 * checks["same_layers_dense_bytes"]


def test_in_a_new_process_whatever_is_imported_first(exported) -> None:
    load = (
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(exported('bitmask')[1].folder)!r}); "
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'PackedLinear'"
    )
    for imports in ("import gblm_compress, transformers", "import transformers.quantizers, gblm_compress"):
        python("-c", f"{imports}; {load}")


def test_a_model_without_the_zeros_is_refused(tiny, pruned, tmp_path) -> None:
    not_2_4 = r"^model\.layers\.0.*: the matrix is not 2:4: .*nonzeros.*; prune with `--pattern 2:4` first"
    for source, format, message in (
        (tiny("llama"), "bitmask", "the model is dense; prune it first"),
        (tiny("llama"), "semi-structured", not_2_4),
        (pruned("llama", "unstructured"), "semi-structured", not_2_4),
    ):
        with pytest.raises(UsageError, match=message):
            export(source, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_transformers_alone_finds_no_weights_rather_than_random_ones(exported, tmp_path) -> None:
    """Without this package transformers does not know the layout, and would leave what it does not find random."""
    model = load_model(exported("bitmask")[1])
    save = model.save_pretrained
    for folder, shard_size in (("whole", "50GB"), ("sharded", "20KB")):
        model.save_pretrained = lambda place, size=shard_size, **more: save(place, max_shard_size=size, **more)
        save_packed(model, tmp_path / folder)
        assert (tmp_path / folder / SPARSE_INDEX).exists() == (folder == "sharded")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), logits(model))
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "for folder in ('whole', 'sharded'):\n"
        "    try: AutoModelForCausalLM.from_pretrained(folder)\n    except OSError as error: print(error)"
    )
    alone = python("-c", code, folder=tmp_path)
    assert alone.stdout.count("no file named model.safetensors") == 2, alone.stderr


def test_an_export_is_not_pruned_inspected_or_exported_again(exported, tmp_path, progress) -> None:
    folder, out = exported("bitmask")[1], tmp_path / "x"
    for refused in (
        lambda: inspect(folder, progress),
        lambda: export(folder, out, format="onnx"),
        lambda: prune(folder, out, PruneSettings(method="magnitude", fit="none")),
    ):
        with pytest.raises(ModelError, match="is an export"):
            refused()


@ROUNDING
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_from_pretrained_computes_what_the_rounded_weights_do(format, kind, exported) -> None:
    source, folder, checks = exported(format, kind)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    packed = [module for module in model.modules() if getattr(module, "layout", None) == NAMES[format]]
    assert len(packed) + (format != "int8") == checks["packed_layers"] == {"llama": 15, "gpt2": 9}[kind]
    assert "layers_not_rounded" not in checks
    dense, kinds = load_model(source), (PackedLinear, PackedEmbedding)
    held = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
    dense.load_state_dict(held, strict=False)
    rounded = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    left = [count_nonzeros(each.get_submodule(name).weight) for each in (load_model(source), dense) for name in rounded]
    assert checks.get("rounded_to_zero", 0) == sum(left[: len(rounded)]) - sum(left[len(rounded) :])
    for few in (1, 8):
        torch.testing.assert_close(logits(model, IDS[:, :few]), logits(dense, IDS[:, :few]), rtol=1e-3, atol=1e-3)
    exact = logits(load_model(source))
    assert 0 < (logits(model) - exact).abs().max() < (0.5 if format.endswith("-int4") else 0.05) * exact.abs().max()


@ROUNDING
def test_head_and_embedding_are_one_tensor_where_they_are_tied(format, exported) -> None:
    source, folder, _ = exported(format, "gpt2")
    tensors = load_file(folder.folder / SPARSE_SINGLE)
    assert tensors["lm_head.values"].dtype == torch.int8 and tensors["lm_head.values"].shape[0] == VOCABULARY
    assert not [name for name in tensors if "wte" in name]
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.layout == "int8" and embedding.rows is head
    assert torch.equal(embedding(IDS), head.dense_weight()[IDS])
    dense = load_model(source).lm_head.weight
    assert (head.dense_weight() - dense).abs().max() <= dense.abs().max() / 200
    moved = model.to(torch.bfloat16)
    assert moved.get_input_embeddings()(IDS).dtype == torch.bfloat16 and logits(moved).dtype == torch.bfloat16
    kept = AutoModelForCausalLM.from_pretrained(exported(format, "gpt2", keep_head=True)[1].folder)
    assert kept.lm_head.weight is kept.get_input_embeddings().weight


def test_head_and_embedding_of_their_own(exported, tmp_path) -> None:
    source, folder, checks = exported("bitmask-int8", "qwen3", group=32)
    assert checks["packed_layers"] == 16
    layers = json.loads((folder.folder / "config.json").read_text())["quantization_config"]["layers"]
    head = {"shape": [VOCABULARY, 64], "bias": False, "group": None, "layout": "int8"}
    assert layers[UP]["group"] == 32 and layers["lm_head"] == head
    model, dense = AutoModelForCausalLM.from_pretrained(folder.folder), load_model(source)
    embedding, table = model.get_input_embeddings(), dense.model.embed_tokens
    assert embedding.rows is not model.lm_head and embedding.rows.restores(table.weight)
    assert (embedding(IDS) - table(IDS)).abs().max() < table.weight.abs().max() / 200
    assert (logits(model) - logits(dense)).abs().max() < 0.05 * logits(dense).abs().max()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_again_cast_generated_and_compiled(format, kind, exported, tmp_path) -> None:
    source, folder, _ = exported(format, kind)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(one, other), name
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    same = again if format in QUANTISED else load_model(source)
    assert torch.equal(model.generate(IDS, **options), same.generate(IDS, **options))
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected, rtol=1e-3, atol=1e-3)
    narrow = AutoModelForCausalLM.from_pretrained(folder.folder, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    for one in (narrow, again.to(torch.bfloat16)):  # both are rounded differently in every layer
        difference = (logits(one).float() - expected).abs().max()
        assert difference < 0.05 * expected.abs().max()


def test_the_kernels_of_all_layers_are_named(exported) -> None:
    for format, name in NAMES.items():
        kernels = TorchRuntime(load_model(exported(format)[1])).kernels(1)
        assert sum(kernels.values()) == 15
        assert any(kernel.startswith(name) for kernel in kernels) == (format != "semi-structured")  # for CUDA alone
        assert (kernels.get("dense") == 1) == (format in ("bitmask", "semi-structured"))  # the head


@pytest.mark.parametrize("format", ["bitmask", "onnx"])
def test_weights_that_float16_makes_zero_are_refused(format, tiny, tmp_path) -> None:
    model = load_model(tiny("llama"))
    model.get_submodule(K).weight.data *= 1e-8
    prune(saved(model, tmp_path / "small"), tmp_path / "pruned", PruneSettings(method="magnitude", fit="none"))
    with pytest.raises(ModelError, match=f"^{K}: 10.. of its 1024 nonzeros would be zero: float16 does not"):
        export(ModelSource("pruned", tmp_path / "pruned"), tmp_path / "out", format=format, dtype="float16")
    assert not (tmp_path / "out").exists()


@ROUNDING
def test_a_layer_that_would_be_rounded_too_much_is_packed_exactly(format, exported, monkeypatch) -> None:
    error = PackedLinear.error
    monkeypatch.setattr(PackedLinear, "error", lambda self, weight: error(self, weight) + (self.out_features == 32))
    _, folder, checks = exported(format, dtype="bfloat16")
    kept = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "kv"]
    assert sorted(checks["layers_not_rounded"]) == kept
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    assert load_model(folder, "float32").dtype == torch.bfloat16  # a sparse checkpoint keeps its own
    assert all(model.get_submodule(name).layout == "bitmask" for name in kept)
    assert model.get_submodule(UP).layout == NAMES[format]


@pytest.mark.parametrize(
    ("format", "method", "message"),
    [
        ("bitmask", "dense_weight", "does not restore its weight bit for bit"),
        ("bitmask-int8", "dense_weight", "does not restore its weight within 8e-03 of the largest"),
        ("bitmask", "forward", "predictions of the reloaded folder and its source differ by"),
    ],
)
def test_verification_runs_the_reloaded_folder(format, method, message, exported, tmp_path, monkeypatch) -> None:
    source, right = exported(format)[0], getattr(PackedLinear, method)
    monkeypatch.setattr(PackedLinear, method, lambda self, *x: right(self, *x) * 1.001)
    with pytest.raises(VerificationError, match=message):
        export(source, tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
@pytest.mark.parametrize("tokens", [1, 64])
def test_verification_notices_a_wrong_product(tokens, exported, tmp_path, monkeypatch) -> None:
    linear = cpu.Quantised.linear
    monkeypatch.setattr(cpu.Quantised, "linear", lambda self, x: linear(self, x) * (1.01 if len(x) == tokens else 1))
    monkeypatch.setattr(cpu_linear, "crossover", lambda *arguments: cpu_linear.EVERY)
    with pytest.raises(VerificationError, match=r"model\.layers\.0.* is not the product of its weight"):
        export(exported("bitmask-int8")[0], tmp_path / "x", format="bitmask-int8")


@pytest.mark.parametrize(
    ("name", "message"), [("ln_f.weight", "bit for bit"), ("h.1.attn.attention.bias", "compute different buffers")]
)
def test_verification_notices_a_tensor_that_is_not_packed(name, message, exported, tmp_path, monkeypatch) -> None:
    load = exporters_sparse.loading.load_model

    def changed(source, *arguments):
        model = load(source, *arguments)
        if source.is_packed:
            inner = model.transformer
            (dict(inner.named_buffers()) | dict(inner.named_parameters()))[name].data[..., 3] = 0
        return model

    source = exported("bitmask", "gpt_neo")[0]
    monkeypatch.setattr(exporters_sparse.loading, "load_model", changed)
    with pytest.raises(VerificationError, match=f"{name}: .*{message}"):
        export(source, tmp_path / "x", format="bitmask")


UP = "model.layers.0.mlp.up_proj"  # [128, 64]
K = "model.layers.1.self_attn.k_proj"  # [32, 64]


EMBEDDINGS = "does not say which layer holds the rows"
# Changes of `quantization_config` or of the tensors, one for each check on a folder's way; tests/layouts has more.
DAMAGES = {
    "bitmask": [
        (lambda c, t: c.update(layout=["bitmask"]), r"layout \['bitmask'\] is not known; this version reads"),
        (lambda c, t: c.update(layers=[UP]), "names no packed layers"),
        (lambda c, t: c["layers"].pop(UP), rf"{UP}\.weight: no such tensor"),
        (lambda c, t: c["layers"].update({UP: None}), rf"layer '{UP}': it is described as None"),
        (lambda c, t: c["layers"].update(bogus={}), "layer 'bogus': .* has no layer 'bogus'"),
        (lambda c, t: c["layers"].update({"model.norm": {}}), "'model.norm' is a LlamaRMSNorm; only Linear"),
        (lambda c, t: c["layers"].update(lm_head={}), "'lm_head' is a Linear; only .* weights of their own"),
        (lambda c, t: c["layers"][UP].update(bias=True), rf"'{UP}': it is described .* model's has .* bias False"),
        (lambda c, t: t.pop(f"{UP}.mask"), rf"'{{folder}}': {UP}\.mask: no such tensor is in the folder"),
        (lambda c, t: t.pop("model.norm.weight"), r"model\.norm\.weight: no such tensor"),
        (lambda c, t: t[f"{UP}.mask"].fill_(-1), rf"{UP}\.values: .* needs .* \[8256\]"),
    ],
    "bitmask-int8": [
        (lambda c, t: c["layers"][UP].update(group=32), rf"{UP}\.scales: int16 \[128, 1\]; needs int16 \[128, 2"),
        (lambda c, t: c.update(embeddings=[UP]), EMBEDDINGS),
        (lambda c, t: c.update(embeddings={"model.embed_tokens": 5}), EMBEDDINGS),
        (lambda c, t: c.update(embeddings={"model.embed_tokens": "x"}), "'x' is not among the packed layers"),
        (lambda c, t: c["embeddings"].update({"model.norm": "lm_head"}), "has no embedding 'model.norm'"),
    ],
}


@pytest.mark.parametrize(
    ("format", "damage", "message"), [(format, *damaged) for format, damages in DAMAGES.items() for damaged in damages]
)
def test_a_damaged_folder_is_refused_by_from_pretrained_itself(format, damage, message, exported, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported(format, pattern="2:4" if format == "bitmask" else None)[1].folder, folder)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_weights(folder, partial(damage, described))
    edit_json(folder / "config.json", quantization_config=described)
    with pytest.raises(ModelError, match=message.replace("{folder}", str(folder))):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError, match="model 'x': "):
        load_model(ModelSource("x", folder))


def test_a_file_that_changes_under_a_loaded_model_moves_no_kernel(exported, tmp_path) -> None:
    """Loaded tensors are parts of the mapped file; of those the mask alone decides where values are read."""
    path = shutil.copytree(exported("bitmask")[1].folder, tmp_path / "copy") / SPARSE_SINGLE
    model = AutoModelForCausalLM.from_pretrained(path.parent)
    masks = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".mask")}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert len(masks) == 14 and all(torch.equal(model.get_buffer(name), mask) for name, mask in masks.items())
    logits(model)
