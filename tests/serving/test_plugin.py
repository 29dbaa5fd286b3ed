"""The plugin without vLLM: its entry point, and its layers under a stand-in that merges and shards as vLLM does."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models.files import SPARSE_METHOD
from tests.serving import fake_vllm

ROOT = Path(__file__).parents[2]
EXACT = [name for name, layout in LAYOUTS.items() if layout.exact is None]
LAYOUT_NAMES = pytest.mark.parametrize("layout", EXACT)
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
COLUMNS = 64
QKV: list[tuple[Any, int, int]] = [("q", 32, 1), ("k", 16, 1), ("v", 16, 1)]


def matrix(rows: int, seed: int = 0, columns: int = COLUMNS) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight * Pattern("2:4").mask(weight.abs(), weight, 0.5)).add(0.0)


def packed(layout: str, weight: Tensor) -> dict[str, Tensor]:
    layer = LAYOUTS[layout].layer.from_dense(weight, None)
    return {name: layer.get_buffer(name) for name in layer.PACKED}


def description(layout: str, weight: Tensor) -> dict[str, Any]:
    return LAYOUTS[layout].layer.from_dense(weight, None).description()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """config("bitmask", {layer: weight}): what vLLM makes of a folder's config.json."""
    fake_vllm.install(monkeypatch)
    import_module("gblm_compress.serving.vllm_plugin").register()

    def make(layout: str, weights: dict[str, Tensor], damage: dict[str, Any] | None = None) -> Any:
        layers = {name: description(layout, weight) for name, weight in weights.items()}
        config = fake_vllm.METHODS[SPARSE_METHOD].from_config(
            {"quant_method": SPARSE_METHOD, "layout": layout, "layers": layers, **(damage or {})}
        )
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        return config

    yield make
    del sys.modules["gblm_compress.serving.vllm_layers"]


def attention(config: Any, layout: str, weights: dict[str, Tensor], **options: Any) -> fake_vllm.LinearBase:
    names = {f"{ATTENTION}.{part}_proj": weight for part, weight in weights.items()}
    layer = fake_vllm.LinearBase(config(layout, names), f"{ATTENTION}.qkv_proj", QKV, COLUMNS, **options)
    for part, weight in weights.items():
        layer.load(part, **packed(layout, weight))
    return layer


WEIGHTS = {"q": matrix(32, 1), "k": matrix(16, 2), "v": matrix(16, 3)}


def test_the_entry_point_is_declared_and_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["gblm_compress"].partition(":")
    assert callable(getattr(import_module(module), function))
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'vllm'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_the_method_that_folders_name(config) -> None:
    assert list(fake_vllm.METHODS) == [SPARSE_METHOD]
    assert config("bitmask", {"a": matrix(4)}).get_name() == SPARSE_METHOD


@LAYOUT_NAMES
@pytest.mark.parametrize("rank", [0, 1])
def test_q_k_and_v_in_one_layer_on_two_ranks(config, layout: str, rank: int) -> None:
    layer = attention(config, layout, WEIGHTS, rank=rank, ranks=2)
    layer.method.process_weights_after_loading(layer)
    dense = torch.cat([weight.chunk(2)[rank] for weight in WEIGHTS.values()])
    assert same_bits(layer.packed.dense_weight(), dense)
    assert not list(layer.parameters())
    x, bias = torch.randn(3, COLUMNS), torch.randn(len(dense))
    torch.testing.assert_close(layer(x, bias), nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense))


@LAYOUT_NAMES
@pytest.mark.parametrize("rank", [0, 1])
def test_inputs_shared_out_over_two_ranks(config, layout: str, rank: int) -> None:
    weight, name = matrix(16, 4, columns=72), f"{MLP}.down_proj"
    layer = fake_vllm.LinearBase(
        config(layout, {name: weight}), name, [(None, 16, 1)], 72, rank=rank, ranks=2, row_parallel=True
    )
    layer.load(None, **packed(layout, weight))
    layer.method.process_weights_after_loading(layer)
    assert same_bits(layer.packed.dense_weight(), weight.chunk(2, dim=1)[rank].contiguous())


def test_groups_of_2_4_that_ranks_would_share_are_one_line(config) -> None:
    weight, name = matrix(8, 5, columns=72), f"{MLP}.down_proj"
    layer = fake_vllm.LinearBase(
        config("sparse24", {name: weight}), name, [(None, 8, 1)], 72, rank=1, ranks=4, row_parallel=True
    )
    with pytest.raises(UsageError) as caught:
        layer.load(None, **packed("sparse24", weight))
    assert str(caught.value) == f"{name}: columns 18 to 35: the sparse24 layout can be cut at multiples of 4 only"


def test_compiled_it_is_one_operator(config) -> None:
    layer = attention(config, "bitmask", WEIGHTS)
    layer.method.process_weights_after_loading(layer)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.gblm_compress.bitmask_linear.default]


@LAYOUT_NAMES
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_on_cuda_the_same_operator_runs_the_plan_of_the_merged_shape(config, layout: str, monkeypatch) -> None:
    from gblm_compress.kernels import gpu
    from gblm_compress.layouts import bitmask, cuda_linear, sparse24

    planned, ran = [], []
    tiling = gpu.FORMS[layout].tilings[4]
    monkeypatch.setattr(PackedLinear, "cuda_kernels", lambda layer: cuda_linear)
    monkeypatch.setattr(cpu, "available", lambda: False)  # a GPU's layer is what is tested
    monkeypatch.setattr(cuda_linear, "plan", lambda weight: planned.append(weight.shape) or plan)
    monkeypatch.setattr(gpu, "linear", lambda x, weight, *_: ran.append(weight.shape) or x @ dense.T)
    plan = " ".join([str(cuda_linear.Candidate("triton", tuple(map(int, tiling))))] * len(cuda_linear.TOKENS))
    dense = torch.cat(list(WEIGHTS.values())).bfloat16()
    layer = attention(config, layout, WEIGHTS, dtype=torch.bfloat16)
    layer.method.process_weights_after_loading(layer)
    assert planned[-1] == (64, COLUMNS) and layer.packed.kernel(1) == f"{layout} Triton"
    on_cuda = {"bitmask": bitmask.linear_cuda, "sparse24": sparse24.linear_cuda}[layout]
    monkeypatch.setattr(type(layer.packed), "OPERATOR", staticmethod(on_cuda))
    x = torch.randn(2, COLUMNS).bfloat16()
    if layout == "bitmask":
        layer.packed._on_cpu = False
    assert torch.equal(layer(x), x @ dense.T) and ran == [(64, COLUMNS)]


def test_layers_that_were_not_pruned_are_vllm_s_own(config) -> None:
    made = config("bitmask", {f"{ATTENTION}.q_proj": WEIGHTS["q"]})
    layer = fake_vllm.LinearBase(made, f"{MLP}.down_proj", [(None, 8, 1)], COLUMNS)
    assert isinstance(layer.method, fake_vllm.UnquantizedLinearMethod)
    assert made.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    assert made.get_quant_method(nn.Module(), ATTENTION) is None


def test_packed_layers_inside_what_is_no_linear_layer_are_refused(config) -> None:
    name = f"{MLP}.experts.0.up_proj"
    with pytest.raises(ModelError, match=f"^'{name}' is packed; vLLM has it in a ModuleList, which stays dense$"):
        config("bitmask", {name: matrix(8)}).get_quant_method(nn.ModuleList(), f"{MLP}.experts")


def test_names_are_mapped_as_vllm_maps_those_of_the_model(config) -> None:
    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {f"model.{name}": value for name, value in values.items()}

    made = config("bitmask", {"a": matrix(8)})
    made.apply_vllm_mapper(Mapper())
    assert list(made.layers) == ["model.a"]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            {"layout": "csr"},
            "layout 'csr' is not known; this version reads bitmask, sparse24, ",
        ),
        ({"layout": None}, "layout None is not known"),
        ({"layers": {}}, "quantization_config names no packed layers, so it is damaged"),
        ({"layers": ["a"]}, "quantization_config names no packed layers, so it is damaged"),
    ],
    ids=str,
)
def test_a_folder_of_a_newer_version_or_a_damaged_one_is_one_line(config, damage: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelError) as caught:
        config("bitmask", {"a": matrix(8)}, damage)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "described",
    [{"shape": [8, 64], "bias": False, "nonzeros": 9, "scales": 2}, {"shape": [8, 64], "bias": False}, {}],
    ids=str,
)
def test_a_description_with_other_keys_is_one_line(config, described: dict[str, Any]) -> None:
    made = config("bitmask", {"a": matrix(8)})
    made.layers["a"] = described
    with pytest.raises(ModelError) as caught:
        fake_vllm.LinearBase(made, "a", [(None, 8, 1)], COLUMNS)
    line = str(caught.value)
    assert line.startswith("a: it is described as") and "a newer gblm-compress may have packed it" in line
    assert "\n" not in line


def test_rows_that_do_not_fill_the_model_s_layer_are_one_line(config) -> None:
    weight = matrix(8)
    layer = fake_vllm.LinearBase(config("bitmask", {"a": weight}), "a", [(None, 12, 1)], COLUMNS)
    with pytest.raises(ModelError, match="^a: vLLM cannot slice 8 rows of the folder into 12 of its layer$"):
        layer.load(None, **packed("bitmask", weight))


def test_a_missing_tensor_is_one_line(config) -> None:
    layer = attention(config, "bitmask", {"q": WEIGHTS["q"], "k": WEIGHTS["k"]})
    with pytest.raises(
        ModelError, match=r"^model\.layers\.0\.self_attn\.qkv_proj: a tensor of it is not in the folder"
    ):
        layer.method.process_weights_after_loading(layer)


def test_weights_are_loaded_once(config) -> None:
    layer = attention(config, "bitmask", WEIGHTS)
    mask = layer.get_parameter("mask")
    layer.method.process_weights_after_loading(layer)
    layer.method.process_weights_after_loading(layer)
    with pytest.raises(ModelError, match="cannot be loaded a second time"):
        mask.weight_loader(mask, torch.zeros(1), "q")  # type: ignore[attr-defined]


def test_a_packed_embedding_is_one_line(config) -> None:
    with pytest.raises(ModelError, match="which vLLM does not read; export with `--keep-head`"):
        config("bitmask-int8", {"lm_head": matrix(8)}, {"embeddings": {"model.embed_tokens": "lm_head"}})


def test_parts_in_other_layouts_are_one_line(config) -> None:
    """As where one of them would have been rounded too much."""
    names = {f"{ATTENTION}.{part}_proj": weight for part, weight in WEIGHTS.items()}
    made = config("bitmask-int8", names)
    made.layers[f"{ATTENTION}.k_proj"]["layout"] = "bitmask"
    with pytest.raises(ModelError, match=r"qkv_proj: its parts are packed as bitmask and bitmask-int8; vLLM has them"):
        fake_vllm.LinearBase(made, f"{ATTENTION}.qkv_proj", QKV, COLUMNS)


def test_a_layer_in_a_layout_of_its_own(config) -> None:
    weight, name = matrix(16, 4), f"{MLP}.down_proj"
    made = config("bitmask", {name: weight})
    made.layout, made.layers[name]["layout"] = "bitmask-int8", "bitmask"
    layer = fake_vllm.LinearBase(made, name, [(None, 16, 1)], COLUMNS)
    layer.load(None, **packed("bitmask", weight))
    layer.method.process_weights_after_loading(layer)
    assert same_bits(layer.packed.dense_weight(), weight)


def test_rounded_weights_run_too(config) -> None:
    layer = attention(config, "bitmask-int8", WEIGHTS)
    layer.method.process_weights_after_loading(layer)
    held = [LAYOUTS["bitmask-int8"].layer.from_dense(weight, None).dense_weight() for weight in WEIGHTS.values()]
    assert same_bits(layer.packed.dense_weight(), torch.cat(held))
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, torch.cat(held)), rtol=1e-3, atol=1e-3)
