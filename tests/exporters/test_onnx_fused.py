"""Fused ONNX graphs: the same function as transformers', layer for layer found again, on the operators and in genai."""

import json
import math
import shutil
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters import onnx_builder, onnx_fused
from gblm_compress.measure.engines import GenaiRuntime
from gblm_compress.measure.onnx_runtime import OnnxRuntime
from gblm_compress.measure.runtimes import load_runtime
from gblm_compress.models import loading
from gblm_compress.models.architecture import cache_kinds, is_linear
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from tests.conftest import export, greedy_tokens, saved
from tests.exporters.test_onnx import assert_computes, needs_operator
from tests.exporters.test_onnx_slim import optimised, parsed, run
from tests.families.tiny import tiny_family
from tests.scripts import python

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": 257}
SIZES |= {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"sliding_window": 16}  # the texts that exports are verified on are longer
WINDOWS = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
BOTH = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
# {family: what its config has beside SIZES}
FAMILIES = {
    "Llama": {"attention_bias": True, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
    "Mistral": WINDOW,
    "Qwen2": WINDOWS,
    "Qwen3": {**WINDOWS, "head_dim": 32},
    "Gemma": {"head_dim": 32},
    "Gemma2": BOTH,
    "Gemma3": BOTH,
    "Granite": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "Ernie4_5": {"head_dim": 32},
    "HunYuanDenseV1": {"head_dim": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "Nemotron": {},
    "Phi": {},
    "Phi3": {**WINDOW, "original_max_position_embeddings": 512},
    "SmolLM3": {"no_rope_layers": [1, 0]},
}


def config(family: str, **more):
    return getattr(transformers, f"{family.replace('Gemma3', 'Gemma3Text')}Config")(**SIZES, **more)


def test_every_architecture_is_tried() -> None:
    assert {f"{family}ForCausalLM" for family in FAMILIES} == onnx_fused.ARCHITECTURES
    windowed = {name for name, more in FAMILIES.items() if cache_kinds(config(name, **more)) != {"DynamicLayer"}}
    assert {f"{family}ForCausalLM" for family in windowed | {"SmolLM3"}} == onnx_fused.WINDOWED


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in sorted(FAMILIES)), ("Gemma3", "float16")]
)
def test_the_graph_of_each_architecture_is_the_same_function(family, dtype, tmp_path) -> None:
    """`export` verifies logits of 64 tokens, 32 decoded ones, and the zeros of every layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = config(family, **FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.05))
    assert type(model).__name__ == f"{family}ForCausalLM"
    checks = export(saved(model, tmp_path / "model"), tmp_path / "out", format="onnx", dtype=dtype)[0].checks
    assert checks["graph"] == "fused" and checks["identical_greedy_tokens"] == 32
    assert checks["layers_checked"] == {"Phi3": 8, "Phi": 12, "Nemotron": 12}.get(family, 14)


HALF = {"dtype": "float16"}
WAYS = {"dense": {}, "kernels": {"kernels": True}, "half": {"kernels": True, **HALF}, "float16": HALF}


@pytest.fixture(scope="module")
def exported(pruned, tmp_path_factory):
    """A tiny Llama with a tied head, pruned 2:4, its graph fused in every way."""
    source, base = pruned("llama", "2:4"), tmp_path_factory.mktemp("fused")
    return source, {name: export(source, base / name, format="onnx", **options) for name, options in WAYS.items()}


def graph_of(folder: ModelSource) -> onnx.GraphProto:
    return onnx.load(folder.folder / "model.onnx", load_external_data=False).graph


def operators(folder: ModelSource) -> list[str]:
    return [node.op_type for node in graph_of(folder).node]


@needs_operator
def test_what_the_graphs_are_made_of(exported) -> None:
    _, results = exported
    assert all(result.checks["zeros"] == 36864 for result, _ in results.values())
    found = {name: operators(folder) for name, (_, folder) in results.items()}
    assert all(names.count("GroupQueryAttention") == 2 for names in found.values())
    assert found["dense"].count("MatMul") == 11  # q, k and v are one
    for name, dtype in (("kernels", onnx.TensorProto.FLOAT), ("half", onnx.TensorProto.FLOAT16)):
        assert "MatMul" not in found[name] and "Transpose" not in found[name]
        assert (found[name].count("BitmaskLinear"), found[name].count("DenseLinear")) == (8, 1)
        graph = graph_of(results[name][1])
        (table,) = [tensor for tensor in graph.initializer if list(tensor.dims) == [257, 64]]  # head and embedding
        assert table.data_type == dtype
        assert {node.op_type for node in graph.node if table.name in node.input} == {"Gather", "DenseLinear"}
    size = {name: (folder.folder / "model.onnx.data").stat().st_size for name, (_, folder) in results.items()}
    assert size["half"] < size["kernels"] < size["dense"]
    assert results["half"][1].config["dtype"] == "float16"


def test_the_graph_asks_for_no_newer_runtime_than_it_needs(exported) -> None:
    """ONNX Runtime 1.20 knows opset 21, and GroupQueryAttention with at most nine inputs. Nor does it name a commit."""
    model = onnx.load(exported[1]["dense"][1].folder / "model.onnx", load_external_data=False)
    assert "+" not in model.producer_version, "the builder adds that of the repository around its environment"
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert {len(node.input) for node in model.graph.node if node.op_type == "GroupQueryAttention"} == {9}


@needs_operator
@pytest.mark.parametrize("name", ["dense", "kernels", "half"])
def test_logits_of_prompts_and_steps_are_those_of_torch(exported, name) -> None:
    source, results = exported
    assert_computes(results[name][1], load_model(source, "float16" if name == "half" else "float32").float())


@needs_operator
@pytest.mark.parametrize("name", ["dense", "kernels", "half"])
def test_genai_runs_the_folder(exported, name) -> None:
    _, results = exported
    folder = results[name][1]
    runtime, reference = GenaiRuntime(folder, "cpu", 1), OnnxRuntime(folder, "cpu", 1)
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))
    for row in ids.unsqueeze(1):
        assert greedy_tokens(runtime, row, 12) == greedy_tokens(reference, row, 12)
    both, _ = runtime.next_token(ids, None)
    assert both.shape == (2, 1) and torch.equal(both, reference.next_token(ids, None)[0])
    assert runtime.kernels(1)["GroupQueryAttention (onnxruntime-genai)"] == 2
    runtime = load_runtime(folder, "auto", "cpu", 1, runtime="genai", generate=3)  # room for as many tokens
    token, cache = ids[:1], None
    for _ in range(3):
        token, cache = runtime.next_token(token, cache)
    assert cache.is_done()


@needs_operator
def test_a_model_that_was_never_pruned_runs_on_the_dense_operator(tiny, tmp_path) -> None:
    result, folder = export(tiny("llama"), tmp_path / "new" / "out", format="onnx", kernels=True, dtype="float16")
    names = operators(folder)
    assert names.count("DenseLinear") == 11 and "BitmaskLinear" not in names and "MatMul" not in names
    assert result.checks["layers_checked"] == 0
    assert (result.checks["dtype"], result.checks["arithmetic"]) == ("float16", "float32")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert all(path.is_file() for path in (tmp_path / "new" / "out").iterdir())


@needs_operator
def test_a_model_that_another_tool_pruned_runs_packed(tiny, tmp_path) -> None:
    """Layers with few zeros stay dense, and a zero's sign, which that tool leaves, takes no place."""
    model = load_model(tiny("llama"))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            prune.l1_unstructured(layer, "weight", amount=0.8 if "layers.0." in name else 0.2)
            prune.remove(layer, "weight")
    sparse = saved(model, tmp_path / "sparse")
    result, exported = export(sparse, tmp_path / "out", format="onnx", kernels=True)
    names = operators(exported)
    assert (names.count("BitmaskLinear"), names.count("DenseLinear")) == (4, 6)
    assert result.checks["layers_checked"] == 7
    stored = [each.dims[0] for each in graph_of(exported).initializer if each.name.endswith(".nonzeros")]
    nonzeros = sum(int(layer.weight.count_nonzero()) for layer in model.model.layers[0].modules() if is_linear(layer))
    assert sum(stored) == nonzeros + 64 * len(stored)
    assert_computes(exported, load_model(sparse))


def test_models_without_a_fused_graph(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_fused, "build", None)
    with pytest.raises(ModelError, match="no fused graph, .* plain; GPT2LMHeadModel: .*graphs exist for Ernie.*Llama"):
        export(tiny("gpt2"), tmp_path / "out", format="onnx", graph="fused")


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("Olmo", {}, "OlmoForCausalLM: fused graphs exist for"),
        ("Llama", FAMILIES["Granite"], "LlamaForCausalLM: a rotary embedding of type linear is not known"),
        ("Llama", WINDOW, "LlamaForCausalLM: a cache of DynamicSlidingWindowLayer would give wrong"),
    ],
)
def test_what_comes_out_wrong_is_refused(family, more, reason) -> None:
    with torch.device("meta"):
        found = onnx_fused.why_not(transformers.AutoModelForCausalLM.from_config(config(family, **more)))
    assert found.startswith(reason)


def test_what_the_builder_does_not_manage_is_said_in_its_words(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_fused, "_OPTIONS", ("hf_remote=maybe",))
    with pytest.raises(ModelError, match=r"builder does not manage LlamaForCausalLM \(.+\); export with --graph plain"):
        export(tiny("llama"), tmp_path / "out", format="onnx", graph="fused")
    assert not list(tmp_path.iterdir())


def test_the_builder_sees_numbers_in_place_of_weights(tiny, monkeypatch) -> None:
    """`parts_of` reads them back from what a graph may do with weights, and from nothing else."""
    monkeypatch.setattr(onnx_builder, "load_file", lambda path: {})
    monkeypatch.setattr(onnx_builder, "_layers", {})
    layers = onnx_builder.numbered(str(tiny("llama").folder)).model.layers
    query, key, down = (
        module.weight.float().numpy()
        for module in (layers[1].self_attn.q_proj, layers[1].self_attn.k_proj, layers[0].mlp.down_proj)
    )
    names = {f"model.layers.1.self_attn.{name}_proj": len(rows) for name, rows in (("q", query), ("k", key))}
    assert onnx_builder.parts_of(np.concatenate([query, key]).T) == {"turned": True, "rows": names}
    assert onnx_builder.parts_of(down) == {"turned": False, "rows": {"model.layers.0.mlp.down_proj": len(down)}}
    assert onnx_builder.parts_of(2 * down) is None and onnx_builder.parts_of(np.ones((3, 9))) is None


def test_a_plain_graph_takes_the_place_of_a_fused_one_that_does_not_run(tmp_path, monkeypatch) -> None:
    """As of a Phi whose heads have a rotary part of 8."""
    source = saved(tiny_family("phi"), tmp_path / "phi")
    with pytest.raises(ModelError, match="'phi': ONNX Runtime cannot run it .*cos_cache dimension 1 must be"):
        export(source, tmp_path / "out", format="onnx", graph="fused")
    monkeypatch.setattr(loading, "load_model", load := Mock(side_effect=load_model))
    checks = export(source, tmp_path / "out", format="onnx")[0].checks
    assert checks["graph"] == "plain" and "cos_cache dimension 1 must be" in checks["why_not_fused"]
    load.assert_called_once()
    weights = load_file(source.folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = math.inf
    save_file(weights, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of .* values of 'lm_head\.weight' are NaN or infinite"):
        export(source, tmp_path / "other", format="onnx")
    assert load.call_count == 1, "a plain graph would have the same fault"


@needs_operator
@pytest.mark.parametrize("runtime", ["onnxruntime", "genai"])
def test_operators_of_a_cpu_are_not_run_on_another_device(exported, runtime) -> None:
    with pytest.raises(UsageError, match="exported with --kernels, whose operators run only on a CPU, not on"):
        load_runtime(exported[1]["kernels"][1], "auto", "cuda", 1, runtime=runtime)


@needs_operator
def test_genai_runs_the_folder_alone_and_from_anywhere(exported, tmp_path) -> None:
    """The library lies in the folder for who loads it without this program."""
    folder = exported[1]["kernels"][1]
    expected = greedy_tokens(OnnxRuntime(folder, "cpu", 1), torch.arange(9).unsqueeze(0), 5)
    code = (
        "import numpy, onnxruntime_genai as genai\n"
        f"model = genai.Model({str(folder.folder)!r})\n"
        "options = genai.GeneratorParams(model)\noptions.set_search_options(max_length=14, do_sample=False)\n"
        "generator = genai.Generator(model, options)\ngenerator.append_tokens(numpy.arange(9, dtype='i4')[None])\n"
        "for _ in range(5): generator.generate_next_token()\nprint(generator.get_sequence(0)[9:].tolist())"
    )
    done = python("-c", code, folder=tmp_path)
    assert (done.stderr, json.loads(done.stdout)) == ("", expected)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"log_id"',
            '"custom_ops_library": "evil.so", "log_id"',
            r"options\.custom_ops_library .*exports have no text",
        ),
        ('"inputs"', '"pipeline": [{"filename": "a.onnx"}], "inputs"', r"decoder\.pipeline.*exports have no text"),
        ('"model.onnx"', '"../other.onnx"', r"filename '\.\./other\.onnx', but exports have 'model\.onnx'"),
        # the library would pass it to printf
        ("past_key_values.%d.key", "%s%n", "past_key_names '%s%n', but exports have 'past_key"),
        ('"present.%d.value"', '["%s"]', r"outputs\.present_value_names .*, but exports have"),
        ('"context_length": 512', '"context_length": Infinity', r"no genai_config\.json .*'float' object"),
        ('"top_k": 50', '"top_k": true', "onnxruntime-genai cannot load it"),
        ('"search": {', '"search": {}, "search": {', "has a key twice"),
        ('"model": {', '"other": {', r"no genai_config\.json"),
    ],
)
def test_of_a_folder_genai_loads_the_graph_alone(exported, tmp_path, old, new, said) -> None:
    shutil.copytree(exported[1]["dense"][1].folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "genai_config.json"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ModelError, match=said) as refused:
        GenaiRuntime(ModelSource("x", tmp_path), "cpu", 1)
    assert len(str(refused.value).splitlines()) == 1


POSITIONS, PAIRS = 8192, 32
TURNS = (1 / 10000 ** (np.arange(PAIRS) / PAIRS)).astype(np.float32)
ANGLES = np.outer(np.arange(POSITIONS, dtype=np.float32), TURNS)
"""In float32, as in transformers: beyond 4,096 radians each is rounded by up to 4.9e-4."""


def with_tables(**tables: np.ndarray) -> ir.Model:
    """A graph that gives its tables side by side, plus a number."""
    nodes = f"rows = Concat <axis = 1> ({', '.join(tables)}) wide = Cast <to = 1> (rows) y = Add (wide, x)"
    return parsed(nodes, tables, {"x": [1, 1]})


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 6e-4), (np.float16, 1.1e-3)])
def test_the_graph_makes_the_tables_and_a_session_holds_them(dtype, tolerance, tmp_path) -> None:
    cos, sin = np.cos(ANGLES).astype(dtype), np.sin(ANGLES).astype(dtype)
    made = with_tables(cos_cache=cos, sin_cache=sin, cos_cache_local=cos)
    onnx_fused.calculate_rotations_(made, [TURNS[:7], TURNS])
    assert max(one.const_value.size for one in made.graph.initializers.values()) == PAIRS
    assert sum(node.op_type == "Range" for node in made.graph) == 1
    assert optimised(ir.to_proto(made).SerializeToString(), tmp_path) == ["Add"]
    exact = np.outer(np.arange(POSITIONS), TURNS.astype(np.float64))
    expected = np.concatenate([np.cos(exact), np.sin(exact), np.cos(exact)], axis=1)
    assert np.abs(run(made, x=np.zeros((1, 1), np.float32)) - expected).max() < tolerance


@pytest.mark.parametrize("change", ["scaled", "other frequencies", "one number", "another name"])
def test_other_tables_stay(change) -> None:
    table, name = np.cos(ANGLES), "table" if change == "another name" else "cos_cache"
    table *= np.float32(1.2 if change == "scaled" else 1)
    table[4711, 0] += 0.01 * (change == "one number")
    made = with_tables(**{name: table})
    onnx_fused.calculate_rotations_(made, [TURNS * np.float32(1.001)] if change == "other frequencies" else [TURNS])
    assert list(made.graph.initializers) == [name] and len(made.graph) == 3
