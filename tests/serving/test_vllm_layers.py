"""Packed layers in vLLM without vLLM: under a stand-in that merges and shards as vLLM does."""

import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.models.files import SPARSE_METHOD
from tests.layouts.weights import EXACT, sparse
from tests.scripts import ROOT, python
from tests.serving import fake_vllm

LAYOUT_NAMES = pytest.mark.parametrize("layout", EXACT)
ATTENTION, DOWN = "model.layers.0.self_attn", "model.layers.0.mlp.down_proj"
QKV_PROJ = f"{ATTENTION}.qkv_proj"
COLUMNS = 72  # more than one word of a mask, and halves that end inside one
QKV: list[tuple[Any, int, int]] = [("q", 32, 1), ("k", 16, 1), ("v", 16, 1)]


def matrix(rows: int, seed: int = 0, columns: int = COLUMNS) -> Tensor:
    return sparse("sparse24", rows, columns, seed)


WEIGHTS = {"q": matrix(32, 1), "k": matrix(16, 2), "v": matrix(16, 3)}
OUTLIERS = torch.tensor([1.0, *[0.0, 0.03] * 35, 0.0]).repeat(8, 1)


def packed(layout: str, weight: Tensor, **options: Any) -> dict[str, Tensor]:
    return PackedLinear.from_dense(layout, weight, **options).held


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """config("bitmask", {layer: weight}): what vLLM makes of a folder's config.json."""
    fake_vllm.install(monkeypatch)
    import_module("gblm_compress.serving.vllm_plugin").register()

    def make(layout: str, weights: dict[str, Tensor], damage: dict[str, Any] | None = None) -> Any:
        layers = {name: PackedLinear.from_dense(layout, weight).description() for name, weight in weights.items()}
        config = fake_vllm.METHODS[SPARSE_METHOD].from_config(
            {"quant_method": SPARSE_METHOD, "layout": layout, "layers": layers, **(damage or {})}
        )
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        return config

    yield make
    del sys.modules["gblm_compress.serving.vllm_layers"]


def attention(config: Any, layout: str, weights: dict[str, Tensor], parts: Any = QKV, **options: Any) -> Any:
    """q, k and v merged; tensors come one by one, those of a part not together."""
    names = {f"{ATTENTION}.{part}_proj": weight for part, weight in weights.items()}
    layer = fake_vllm.LinearBase(config(layout, names), QKV_PROJ, parts, COLUMNS, **options)
    for name in LAYOUTS[layout].kind.names:
        for part in reversed(weights):
            layer.load(part, **{name: packed(layout, weights[part])[name]})
    return layer


def down(config: Any, layout: str, weight: Tensor, rows: int | None = None, **options: Any) -> Any:
    """A layer whose inputs may be shared out over ranks, without its weight."""
    parts = [(None, rows or len(weight), 1)]
    return fake_vllm.LinearBase(config(layout, {DOWN: weight}), DOWN, parts, weight.shape[1], **options)


def finished(layer: Any) -> Tensor:
    layer.method.process_weights_after_loading(layer)
    return layer.packed.dense_weight()


def test_the_entry_point_is_declared_and_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["gblm_compress"].partition(":")
    assert callable(getattr(import_module(module), function))
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'vllm'}} & sys.modules.keys()"
    python("-c", code)


@LAYOUT_NAMES
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_q_k_and_v_in_one_layer_on_four_ranks(config, layout: str, rank: int) -> None:
    """k and v have two heads, each of which two ranks hold."""
    layer = attention(config, layout, WEIGHTS, [("q", 32, 1), ("k", 16, 2), ("v", 16, 2)], rank=rank, ranks=4)
    q, k, v = WEIGHTS.values()
    dense = torch.cat([q.chunk(4)[rank], k.chunk(2)[rank // 2], v.chunk(2)[rank // 2]])
    assert same_bits(finished(layer), dense)
    assert all(same_bits(layer.packed.held[name], tensor) for name, tensor in packed(layout, dense).items())
    assert not list(layer.parameters())
    x, bias = torch.randn(3, COLUMNS), torch.randn(len(dense))
    torch.testing.assert_close(layer(x, bias), nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense))


@LAYOUT_NAMES
@pytest.mark.parametrize("rank", [0, 1])
def test_inputs_shared_out_over_two_ranks(config, layout: str, rank: int) -> None:
    """A process holds a copy in its dtype."""
    layer = down(config, layout, matrix(16), rank=rank, ranks=2, row_parallel=True, dtype=torch.bfloat16)
    layer.load(None, **(tensors := packed(layout, matrix(16))))
    for tensor in tensors.values():
        tensor.zero_()  # as a file that changes while it is mapped
    assert same_bits(finished(layer), matrix(16).chunk(2, dim=1)[rank].contiguous().bfloat16())


@LAYOUT_NAMES
def test_one_part_of_which_a_rank_holds_several_pieces(config, layout: str) -> None:
    """Gate and up in one matrix of the folder: a rank holds a share of each."""
    weight, places = matrix(32), torch.tensor([*range(8, 16), *range(24, 32)])
    layer = down(config, layout, weight, rows=16)
    layer.method._place = lambda rows, part: places
    layer.load(None, **packed(layout, weight))
    assert same_bits(finished(layer), weight[places])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_parts_and_dense_ones_are_merged(config, layout: str, dtype: torch.dtype) -> None:
    """Each with scales and levels of its own."""
    layer = attention(config, layout, {part: WEIGHTS[part] for part in "qk"}, dtype=dtype)
    layer.load("v", weight=WEIGHTS["v"])
    parts = [PackedLinear.from_dense(layout, weight).dense_weight() for weight in WEIGHTS.values()]
    assert same_bits(finished(layer), torch.cat(parts).to(dtype))
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = x.double() @ torch.cat(parts).to(dtype).double().T
    torch.testing.assert_close(layer(x).double(), product, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(("layout", "group"), [("bitmask-int8", 64), ("bitmask-int4", 32)])
def test_a_dense_part_has_scales_for_as_many_columns_as_the_packed_ones(config, layout: str, group: int) -> None:
    made = config(layout, {f"{ATTENTION}.q_proj": WEIGHTS["q"]})
    made.layers[f"{ATTENTION}.q_proj"]["group"] = group
    layer: Any = fake_vllm.LinearBase(made, QKV_PROJ, QKV[:2], COLUMNS)
    layer.load("q", **packed(layout, WEIGHTS["q"], group=group))
    layer.load("k", weight=WEIGHTS["k"])
    pair = [PackedLinear.from_dense(layout, WEIGHTS[part], group=group).dense_weight() for part in "qk"]
    assert same_bits(finished(layer), torch.cat(pair))


@LAYOUT_NAMES
def test_a_damaged_part_is_refused_before_it_is_cut(config, layout: str) -> None:
    tensors, first = packed(layout, matrix(8)), LAYOUTS[layout].kind.names[0]
    for damage in ({"values": tensors["values"] * float("nan")}, {first: tensors[first].flatten()[0]}):
        with pytest.raises(ModelError):
            down(config, layout, matrix(8)).load(None, **tensors | damage)


@pytest.mark.parametrize(
    ("layout", "options", "dense", "message"),
    [
        ("bitmask-int4", {}, OUTLIERS, "was left dense, and the bitmask-int4 layout would change it by .* %"),
        ("bitmask", {}, matrix(8, columns=40), f"40 columns; the model's has {COLUMNS}"),
        ("sparse24", {}, torch.ones(8, COLUMNS), "not 2:4"),
        ("bitmask", {"rows": 12}, None, f"^{DOWN}: vLLM cannot slice 8 rows of the folder into 12 of its layer$"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(config, layout: str, options: Any, dense: Any, message: str) -> None:
    tensors = packed(layout, matrix(8)) if dense is None else {"weight": dense}
    with pytest.raises((ModelError, UsageError), match=message):
        down(config, layout, matrix(8), **options).load(None, **tensors)


def test_weights_too_large_for_the_dtype_are_refused(config) -> None:
    layer = down(config, "bitmask", matrix(8), dtype=torch.float16)
    layer.load(None, **packed("bitmask", matrix(8) * 1e6))
    with pytest.raises(ModelError, match=r"values: holds NaN or infinite values; .*float16 is too narrow"):
        finished(layer)


def test_layers_that_were_not_pruned_are_vllm_s_own_and_packed_experts_refused(config) -> None:
    made = config("bitmask", {f"{ATTENTION}.q_proj": WEIGHTS["q"]})
    layer = fake_vllm.LinearBase(made, DOWN, [(None, 8, 1)], COLUMNS)
    assert isinstance(layer.method, fake_vllm.UnquantizedLinearMethod)
    assert made.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    assert made.get_quant_method(nn.Module(), ATTENTION) is None
    name = "model.layers.0.mlp.experts.0.up_proj"
    with pytest.raises(ModelError, match=f"^'{name}' is packed; vLLM has it in a ModuleList, which stays dense$"):
        config("bitmask", {name: matrix(8)}).get_quant_method(nn.ModuleList(), "model.layers.0.mlp.experts")


def test_names_are_mapped_as_vllm_maps_those_of_the_model(config) -> None:
    made = config("bitmask", {"a": matrix(8)})
    made.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda given: {f"model.{name}": given[name] for name in given}))
    assert list(made.layers) == ["model.a"]


def test_a_config_of_a_newer_version_or_a_damaged_one_is_one_line(config) -> None:
    for damage, line in (
        ({"layout": "csr"}, "layout 'csr' is not known; this version reads bitmask, sparse24, "),
        ({"embeddings": {"embed": "a"}}, "head and embedding of the folder are packed, which vLLM does not read; "),
    ):
        with pytest.raises(ModelError, match=f"^{line}.*$"):
            config("bitmask", {"a": matrix(8)}, damage)


@LAYOUT_NAMES
def test_a_missing_tensor_is_one_line(config, layout: str) -> None:
    layer = attention(config, layout, {part: WEIGHTS[part] for part in "qk"})
    layer.load("v", values=packed(layout, WEIGHTS["v"])["values"])
    with pytest.raises(ModelError, match=f"^{QKV_PROJ}: a tensor of it is not in the folder, so it is incomplete"):
        finished(layer)


def test_weights_are_loaded_once(config) -> None:
    layer = attention(config, "bitmask", WEIGHTS)
    mask = layer.get_parameter("mask")
    for _ in range(2):
        finished(layer)
    with pytest.raises(ModelError, match="cannot be loaded a second time"):
        mask.weight_loader(mask, torch.zeros(1), "q")


def test_a_layer_in_a_layout_of_its_own_is_not_merged_with_others(config) -> None:
    """As where one of them would have been rounded too much."""
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    made = config("bitmask", dict.fromkeys([*names, DOWN], matrix(16)))
    made.layout, made.layers[DOWN]["layout"], made.layers[names[1]]["layout"] = "bitmask-int8", "bitmask", "bitmask"
    layer: Any = fake_vllm.LinearBase(made, DOWN, [(None, 16, 1)], COLUMNS)
    layer.load(None, **packed("bitmask", matrix(16)))
    assert same_bits(finished(layer), matrix(16))
    with pytest.raises(ModelError, match="qkv_proj: its parts are packed as bitmask and bitmask-int8; vLLM merges the"):
        fake_vllm.LinearBase(made, QKV_PROJ, QKV, COLUMNS)
