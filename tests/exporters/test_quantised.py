"""Exports in 8 and 4 bits: what is in the folder, what it computes, head and embedding, and damaged ones."""

import json
import shutil
from functools import cache

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import ModelError, VerificationError
from gblm_compress.exporters import export
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS, cpu_linear
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedEmbedding, PackedLinear
from gblm_compress.measure.benchmarking import benchmark
from gblm_compress.models.files import SPARSE_SINGLE
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    ExportSettings,
    PruneSettings,
)
from tests.conftest import prune
from tests.exporters.test_sparse import UP, described, of_layer, replaced, with_value

QUANTISED = {layout.format: layout for layout in LAYOUTS.values() if layout.exact}
NAMES = {layout.format: name for name, layout in LAYOUTS.items()}
FORMATS = pytest.mark.parametrize("format", QUANTISED)
IDS = torch.arange(20).unsqueeze(0)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """pruned("llama"): a pruned folder, written once."""

    def make(kind: str, pattern: str = "unstructured") -> ModelSource:
        folder = tmp_path_factory.mktemp(kind) / "pruned"
        settings = PruneSettings(method="magnitude", pattern=pattern, fit="none")
        prune(tiny(kind), folder, settings, CalibrationSettings(), progress=QUIET)
        return ModelSource("pruned", folder)

    return cache(make)


def pattern_of(format: str) -> str:
    return QUANTISED[format].pattern or "unstructured"


@pytest.fixture(scope="module")
def exported(pruned, tmp_path_factory):
    """exported("bitmask-int8", "llama"): a folder and what verification found, written once; not to be changed."""

    def make(format: str, kind: str = "llama", **options):
        folder = tmp_path_factory.mktemp(format) / "packed"
        result = export(
            pruned(kind, pattern_of(format)), folder, ExportSettings(format=format, **options), progress=QUIET
        )
        return ModelSource("packed", folder), result

    return cache(make)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def dense_again(model, source: ModelSource):
    """The dense model with the weights that the packed one holds."""
    dense = load_model(source)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "dense_weight") and "rows" not in name:
                weight = dense.get_submodule(name).weight
                held = module.dense_weight()
                weight.copy_(held.T if module.transposed else held)
            elif isinstance(module, PackedEmbedding):
                dense.get_submodule(name).weight.copy_(module.weight)
    return dense


@FORMATS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_from_pretrained_computes_what_the_rounded_weights_do(format, kind, exported, pruned) -> None:
    folder, result = exported(format, kind)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    packed = [module for module in model.modules() if getattr(module, "layout", None) == NAMES[format]]
    assert len(packed) + (format != "int8") == result.checks["packed_layers"] == {"llama": 15, "gpt2": 9}[kind]
    assert "layers_not_rounded" not in result.checks
    dense = dense_again(model, pruned(kind, pattern_of(format)))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)
    exact = logits(load_model(pruned(kind, pattern_of(format))))
    assert 0 < (logits(model) - exact).abs().max() < (0.5 if format.endswith("-int4") else 0.05) * exact.abs().max()
    one = model(input_ids=IDS[:, :1]).logits
    torch.testing.assert_close(one, dense(input_ids=IDS[:, :1]).logits, rtol=1e-3, atol=1e-3)


@FORMATS
def test_head_and_embedding_are_one_tensor_where_they_are_tied(format, exported, pruned) -> None:
    folder, _ = exported(format, "gpt2")
    tensors = load_file(folder.folder / SPARSE_SINGLE)
    assert tensors["lm_head.values"].dtype == torch.int8 and tensors["lm_head.values"].shape[0] == VOCABULARY
    assert not [name for name in tensors if "wte" in name]
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.layout == "int8" and embedding.rows is head
    assert torch.equal(embedding(IDS), head.dense_weight()[IDS])
    dense = load_model(pruned("gpt2", pattern_of(format))).lm_head.weight
    assert (head.dense_weight() - dense).abs().max() <= dense.abs().max() / 200
    moved = model.to(torch.bfloat16)
    assert moved.get_input_embeddings()(IDS).dtype == torch.bfloat16 and logits(moved).dtype == torch.bfloat16
    kept = AutoModelForCausalLM.from_pretrained(exported(format, "gpt2", keep_head=True)[0].folder)
    assert kept.lm_head.weight is kept.get_input_embeddings().weight


def test_head_and_embedding_of_their_own(tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    settings = PruneSettings(method="magnitude", fit="none")
    prune(ModelSource("d", tmp_path / "dense"), tmp_path / "p", settings, CalibrationSettings(), progress=QUIET)
    source = ModelSource("p", tmp_path / "p")
    result = export(source, tmp_path / "packed", ExportSettings(format="bitmask-int8"), progress=QUIET)
    assert result.checks["packed_layers"] == 9
    model, dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), load_model(source)
    embedding = model.get_input_embeddings()
    assert embedding.rows is not model.lm_head and embedding.rows.restores(dense.model.embed_tokens.weight)
    assert (embedding(IDS) - dense.model.embed_tokens(IDS)).abs().max() < 1e-3
    assert (logits(model) - logits(dense)).abs().max() < 0.05 * logits(dense).abs().max()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@FORMATS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_again_cast_generated_and_compiled(format, kind, exported, tmp_path) -> None:
    folder, _ = exported(format, kind)
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(one, other), name
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), again.generate(IDS, **options))
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected, rtol=1e-3, atol=1e-3)
    narrow = AutoModelForCausalLM.from_pretrained(folder.folder, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    for one in (narrow, again.to(torch.bfloat16)):
        difference = (logits(one).float() - expected).abs().max()
        assert difference < 0.05 * expected.abs().max()
    scales = [name for name in narrow.state_dict() if name.endswith("scales")]
    assert scales and all(torch.equal(narrow.state_dict()[name], model.state_dict()[name]) for name in scales)


def test_benchmark_takes_all_of_them(exported, tiny) -> None:
    timing = BenchmarkSettings(prompt=8, generate=4, repeats=5, warmup=1)
    result = benchmark([exported(format)[0] for format in QUANTISED], [tiny("llama")], timing, progress=QUIET)
    dense, *packed = (measurement.decode_kernels for measurement in result.measurements)
    assert dense == {"dense": 15}
    for format, kernels in zip(QUANTISED, packed, strict=True):
        assert sum(kernels.values()) == 15 and any(name.startswith(NAMES[format]) for name in kernels)


def test_groups_stand_in_the_folder(exported) -> None:
    folder, _ = exported("bitmask-int8", group=32)
    layers = json.loads((folder.folder / "config.json").read_text())["quantization_config"]["layers"]
    head = {"shape": [VOCABULARY, 64], "bias": False, "group": None, "layout": "int8"}
    assert layers[UP]["group"] == 32 and layers["lm_head"] == head


@FORMATS
def test_a_layer_that_would_be_rounded_too_much_is_packed_exactly(format, exported, monkeypatch) -> None:
    error = PackedLinear.error
    monkeypatch.setattr(PackedLinear, "error", lambda self, weight: error(self, weight) + (self.out_features == 32))
    folder, result = exported(format, dtype="bfloat16")
    kept = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "kv"]
    assert sorted(result.checks["layers_not_rounded"]) == kept
    model = AutoModelForCausalLM.from_pretrained(folder.folder)
    assert all(model.get_submodule(name).layout == "bitmask" for name in kept)
    assert model.get_submodule(UP).layout == NAMES[format]


@FORMATS
def test_verification_notices_a_changed_weight(format, pruned, tmp_path, monkeypatch) -> None:
    dense_weight = PackedLinear.dense_weight
    monkeypatch.setattr(PackedLinear, "dense_weight", lambda self: dense_weight(self) * 1.001)
    with pytest.raises(VerificationError, match=r"does not restore its weight"):
        export(pruned("llama", pattern_of(format)), tmp_path / "x", ExportSettings(format=format), progress=QUIET)
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
@pytest.mark.parametrize("tokens", [1, 64])
def test_verification_notices_a_wrong_product(tokens, pruned, tmp_path, monkeypatch) -> None:
    linear = cpu.Quantised.linear
    wrong = {tokens: 1.01}
    monkeypatch.setattr(cpu.Quantised, "linear", lambda self, x: linear(self, x) * wrong.get(len(x), 1.0))
    monkeypatch.setattr(cpu_linear, "crossover", lambda *arguments: cpu_linear.EVERY)
    with pytest.raises(VerificationError, match=r"model\.layers\.0.* is not the product of its weight"):
        export(pruned("llama"), tmp_path / "x", ExportSettings(format="bitmask-int8"), progress=QUIET)


HALF_NAN = 0x7E00
VALUES, SCALES, LEVELS, PATTERNS = (f"{UP}.{part}" for part in ("values", "scales", "levels", "patterns"))
EMBEDDINGS = "does not say which layer holds the rows"
TWO_OF_FOUR = "codes do not stand for two of four columns"
DAMAGES = {
    "bitmask-int8": [
        (replaced(f"{UP}.mask", lambda mask: torch.full_like(mask, -1)), rf"{VALUES}: .* the mask takes"),
        (replaced(VALUES, lambda values: None), rf"{VALUES}: no such tensor"),
        (replaced(VALUES, lambda values: values[:-1]), rf"{VALUES}: shape .* take"),
        (replaced(VALUES, lambda values: values.view(torch.uint8)), rf"{VALUES}: uint8 .* needs int8"),
        (replaced(VALUES, with_value(3, -128)), rf"{VALUES}: a level is below -127"),
        (replaced(VALUES, with_value(-1, 1)), rf"{VALUES}: the last 64 must be zeros"),
        (replaced(SCALES, with_value(3, HALF_NAN)), rf"{SCALES}: not all are finite"),
        (replaced(SCALES, with_value(0, -1)), rf"{SCALES}: not all are finite numbers of at least 0"),
        (replaced(SCALES, lambda scales: scales[1:]), rf"{SCALES}: int16 \[127, 1\]; needs int16 \[128, 1\]"),
        (replaced(SCALES, lambda scales: scales.view(torch.float16)), rf"{SCALES}: all are zero"),
        (of_layer(stored=-1), rf"layer '{UP}': stored -1 is no number of values"),
        (of_layer(group=16), rf"layer '{UP}': group 16 is none of 32, 64, 128"),
        (of_layer(group=32), rf"{SCALES}: int16 \[128, 1\]; needs int16 \[128, 2\]"),
        (of_layer(layout="csr"), rf"layer '{UP}': layout 'csr' is not known"),
        (of_layer(layout="bitmask"), rf"layer '{UP}': .* unexpected keyword argument 'group'"),
        (described(lambda c: c["layers"]["lm_head"].pop("layout")), "layer 'lm_head': .*missing"),
        (described(lambda c: c.update(embeddings=[UP])), EMBEDDINGS),
        (described(lambda c: c.update(embeddings={"model.embed_tokens": 5})), EMBEDDINGS),
        (described(lambda c: c.update(embeddings={"model.embed_tokens": "x"})), "'x' is not among the packed layers"),
        (described(lambda c: c["embeddings"].update({"model.norm": "lm_head"})), "has no embedding 'model.norm'"),
    ],
    "bitmask-int4": [
        (replaced(LEVELS, lambda levels: levels.flip(1)), rf"{LEVELS}: they do not increase"),
        (replaced(LEVELS, lambda levels: levels[:, :15]), rf"{LEVELS}: int8 \[1, 15\]; needs int8 \[1, 16\]"),
        (replaced(VALUES, lambda values: values.to(torch.int8)), rf"{VALUES}: int8 .* needs uint8"),
        (replaced(f"{UP}.mask", lambda mask: mask * 0), rf"{VALUES}: shape"),
    ],
    "semi-structured-int8": [
        (replaced(PATTERNS, lambda patterns: patterns * 0), rf"{PATTERNS}: \d+ {TWO_OF_FOUR}"),
        (replaced(PATTERNS, with_value(5, 255)), rf"{PATTERNS}: 16 {TWO_OF_FOUR}"),
        (replaced(PATTERNS, lambda patterns: patterns[:, 1:]), rf"{PATTERNS}: uint8 \[128, 5\]; needs .* \[128, 6\]"),
        (replaced(VALUES, lambda values: values[:-1]), rf"{VALUES}: shape .* take"),
        (of_layer(stored=4096), rf"layer '{UP}': .* unexpected keyword argument 'stored'"),
    ],
    "semi-structured-int4": [
        (replaced(PATTERNS, lambda patterns: patterns | 7), rf"{PATTERNS}: \d+ {TWO_OF_FOUR}"),
        (replaced(PATTERNS, lambda patterns: patterns.int()), rf"{PATTERNS}: int32 .* needs uint8"),
    ],
    "int8": [
        (replaced(VALUES, lambda values: values * 0 - 128), rf"{VALUES}: a level is below -127"),
        (replaced(VALUES, lambda values: values.T), rf"{VALUES}: int8 \[64, 128\]; needs int8 \[128, 64\]"),
        (replaced("lm_head.scales", lambda scales: scales * 0 - 1), r"lm_head\.scales: not all are finite"),
    ],
}


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [(format, damage, message) for format, damages in DAMAGES.items() for damage, message in damages],
)
def test_a_damaged_folder_is_refused_by_from_pretrained_itself(format, damage, message, exported, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported(format)[0].folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ModelError, match="model 'x': "):
        load_model(ModelSource("x", folder))
