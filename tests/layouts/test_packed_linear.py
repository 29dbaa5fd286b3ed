import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS, bitmask, bitmask_cpu
from gblm_compress.layouts.bitmask import BitmaskLinear, pack
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.layouts.sparse24 import Sparse24Linear
from gblm_compress.machine import measurements
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.packed_checkpoint import pack_
from gblm_compress.models.tiny import tiny_model

LAYOUT_NAMES = pytest.mark.parametrize("layout", LAYOUTS)


def restored_(dense: nn.Module, packed: PackedLinear) -> None:
    """Give a dense layer the weight that the packed one holds: the same, or what it was rounded to."""
    if not LAYOUTS[packed.LAYOUT].width:
        assert torch.equal(packed.dense_weight(), weight_matrix(dense))
    with torch.no_grad():
        weight_matrix(dense).copy_(packed.dense_weight())


def pair(
    rows: int = 48, columns: int = 100, bias: bool = True, dtype: torch.dtype = torch.float32, layout: str = "bitmask"
):
    """A dense linear layer with zeros, and its packed form; where that rounds, of the rounded weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Linear(columns, rows, bias=bias).to(dtype)
        with torch.no_grad():
            importance = torch.rand(rows, columns)
            pattern = Pattern(LAYOUTS[layout].pattern or "unstructured")
            dense.weight.masked_fill_(~pattern.mask(importance, dense.weight, 0.5), 0.0)
    holder = nn.Module()
    holder.layer = dense
    holder.config = type("Config", (), {})()
    assert pack_(holder, ["layer"], layout) == ([], {})
    restored_(dense, holder.layer)
    return dense, holder.layer


@pytest.fixture(params=["kernels", "no compiler"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no compiler":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("the package was installed without a C compiler")
    return request.param


@LAYOUT_NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(100,), (1, 1, 100), (2, 3, 100), (1, 8, 100), (2, 40, 100), (0, 100)])
def test_the_product_is_that_of_the_dense_layer(kernels, layout, dtype, bias, shape) -> None:
    dense, sparse = pair(bias=bias, dtype=dtype, layout=layout)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = sparse(x)
    assert got.dtype == dtype
    expected = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


@LAYOUT_NAMES
def test_only_packed_weights_are_held(layout) -> None:
    dense, sparse = pair(512, 640, layout=layout)
    assert not [name for name, _ in sparse.named_parameters() if "weight" in name]
    held = sum(buffer.nbytes for buffer in sparse.buffers())
    assert held < 0.6 * dense.weight.nbytes
    assert sparse.packed_bytes < 0.55 * dense.weight.nbytes
    assert same_bits(sparse.dense_weight(), dense.weight.detach())
    empty = LAYOUTS[layout].layer(**sparse.description(), dtype=torch.float32)
    assert [sparse.get_buffer(name).shape for name in sparse.PACKED] == [
        empty.get_buffer(name).shape for name in empty.PACKED
    ]


def test_a_layout_that_rounds_restores_within_its_tolerance(monkeypatch) -> None:
    dense, packed = pair()
    weight = dense.weight.detach()
    assert packed.restores(weight) and not packed.restores(weight * 1.005)
    monkeypatch.setattr(BitmaskLinear, "TOLERANCE", 0.01)
    assert packed.restores(weight * 1.005) and not packed.restores(weight * 1.02)
    assert not packed.restores(weight[1:]) and not packed.restores(weight.double())
    assert not packed.restores(weight * float("nan"))


@LAYOUT_NAMES
def test_moved_to_another_dtype_it_is_ready_again(layout, monkeypatch) -> None:
    dense, sparse = pair(layout=layout)
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16
    prepared = []
    prepare = LAYOUTS[layout].layer.prepare
    monkeypatch.setattr(LAYOUTS[layout].layer, "prepare", lambda self: prepared.append(self.dtype) or prepare(self))
    expected = dense.to(dtype)(x.to(dtype))
    torch.testing.assert_close(sparse.to(dtype)(x.to(dtype)), expected, rtol=2e-2, atol=1e-2)
    assert prepared == [dtype]  # when it moved, not when it ran: compilers trace that
    moved = sparse.to("meta")
    assert moved.values.is_meta and len(prepared) == 1


@LAYOUT_NAMES
def test_gradients_of_the_input_are_not_lost_in_silence(layout) -> None:
    _, sparse = pair(layout=layout)
    x = torch.randn(3, 100, requires_grad=True)
    with pytest.raises(UserWarning, match="autograd kernel was not registered"):
        sparse(x).sum().backward()


def test_2_4_says_that_a_cpu_unpacks_it() -> None:
    _, sparse = pair(layout="sparse24")
    assert sparse.kernel(1) == sparse.kernel(1000) == "dense product of the unpacked weight"


def test_it_says_which_kernel_it_runs(kernels: str, monkeypatch) -> None:
    monkeypatch.setattr(bitmask, "crossover", lambda *_: 4)
    _, sparse = pair()
    if kernels == "no compiler":
        assert sparse.kernel(1) == "dense product of the unpacked weight"
    else:
        path = cpu.paths(torch.float32)[-1]
        assert sparse.kernel(1) == f"bitmask {path}"
        many = f"bitmask {path}, many tokens" if cpu.has_many(torch.float32, path) else "expanded tiles and dense GEMM"
        assert sparse.kernel(5) == many


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
def test_the_crossover_is_measured_once_and_kept(monkeypatch) -> None:
    measured = []
    monkeypatch.setattr(bitmask_cpu, "measure_crossover", lambda *_: measured.append(1) or 5)
    for _ in range(2):
        _, sparse = pair(40, 90)
        assert sparse.crossover == 5
        measurements.recorded.cache_clear()  # as in a new process
    assert len(measured) == 1


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
@pytest.mark.parametrize("remembered", [40, 0, -1, 2.0, True, None, "5", [5]], ids=repr)
def test_a_crossover_that_cannot_be_is_measured_again(remembered, monkeypatch) -> None:
    """40 tokens would be written beyond the sums of 8."""
    monkeypatch.setattr(bitmask_cpu, "measure_crossover", lambda *_: 5)
    monkeypatch.setattr(measurements, "recorded", lambda path, machine: {shape: remembered})
    shape = f"crossover 48x100 torch.float32 {torch.get_num_threads()} {cpu.path(torch.float32)}"
    _, sparse = pair()
    assert sparse.crossover == 5


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
def test_the_kernel_for_few_tokens_takes_no_more() -> None:
    _, sparse = pair()
    packed = (sparse.mask, sparse.values, sparse.starts)
    with pytest.raises(ValueError, match="for 9 tokens"):
        sparse.OPERATOR(torch.ones(9, 100), packed, None, 48, 100, 40, "")
    with pytest.raises(ValueError, match="for 9 tokens"):
        cpu.linear(torch.ones(9, 100), *packed)
    with pytest.raises(ValueError, match=r"no kernel portable for 9 tokens .*many=True"):
        cpu.linear(torch.ones(9, 100), *packed, "portable", many=True)


@LAYOUT_NAMES
def test_the_operator_compiles_and_has_a_shape_without_data(layout) -> None:
    _, sparse = pair(layout=layout)
    x = torch.randn(2, 100)
    torch.testing.assert_close(torch.compile(sparse, backend="aot_eager", fullgraph=True)(x), sparse(x))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert sparse(mode.from_tensor(x)).shape == (2, 48)


def test_an_empty_layer() -> None:
    sparse = BitmaskLinear((8, 64), bias=False, dtype=torch.float32, nonzeros=0)
    sparse.mask, sparse.values = pack(torch.zeros(8, 64))
    assert torch.equal(sparse(torch.ones(1, 64)), torch.zeros(1, 8))
    sparse24 = Sparse24Linear.from_dense(torch.zeros(8, 64), None)
    assert torch.equal(sparse24(torch.ones(1, 64)), torch.zeros(1, 8))


@LAYOUT_NAMES
def test_a_whole_model_generates_the_same_tokens(layout) -> None:
    from gblm_compress.models.architecture import prunable_layers, weight_matrix

    for kind in ("llama", "gpt2", "opt"):
        dense, sparse = tiny_model(kind), tiny_model(kind)
        names = [name for block in prunable_layers(dense) for name in block]
        for model in (dense, sparse):
            for name in names:
                weight = weight_matrix(model.get_submodule(name)).detach()
                weight[:, ::4] = weight[:, 1::4] = 0.0
        pack_(sparse, names, layout)
        for name in names:
            restored_(dense.get_submodule(name), sparse.get_submodule(name))
        ids = torch.arange(20).unsqueeze(0)
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
        assert torch.equal(dense.generate(ids, **options), sparse.generate(ids, **options))


DAMAGED = [
    ("bitmask", "mask", -1),
    ("bitmask", "values", float("nan")),
    ("sparse24", "positions", 0),
    ("sparse24", "values", float("inf")),
    ("bitmask-int8", "mask", -1),
    ("bitmask-int8", "values", -128),
    ("bitmask-int4", "levels", 3),
    ("bitmask-int4", "scales", 0x7C00),
    ("sparse24-int8", "patterns", 0),
    ("sparse24-int4", "patterns", 255),
    ("int8", "scales", -1),
]


@pytest.mark.parametrize(("layout", "name", "content"), DAMAGED)
def test_what_is_filled_by_hand_is_checked_before_a_kernel_reads_it(layout, name, content) -> None:
    _, sparse = pair(layout=layout)
    x = torch.ones(1, 100)
    sparse(x)
    state = {key: tensor.clone() for key, tensor in sparse.state_dict().items()}
    state[name].fill_(content)
    sparse.load_state_dict(state)  # written in place
    for use in (sparse, sparse.kernel, lambda _: sparse.weight):
        with pytest.raises(ModelError, match=f"^(values|{name}): "):
            use(x)
    _, sparse = pair(layout=layout)
    setattr(sparse, name, state[name])
    with pytest.raises(ModelError, match=f"^(values|{name}): "):
        sparse(x)


@LAYOUT_NAMES
def test_a_layer_that_nobody_filled_is_refused(layout) -> None:
    _, sparse = pair(layout=layout)
    empty = LAYOUTS[layout].layer(**sparse.description(), dtype=torch.float32)
    for name in empty.PACKED:
        empty.get_buffer(name).fill_(-1)  # any content: it comes uninitialized
    with pytest.raises(ModelError, match=r"^(mask|values|positions|patterns|levels|scales): "):
        empty(torch.ones(1, 100))


@LAYOUT_NAMES
@pytest.mark.parametrize("shape", [(0, 8), (8, -8), (8,), (8, 8, 8), (8.0, 8), (True, 8), "88"], ids=str)
def test_a_shape_that_no_layer_has(layout, shape) -> None:
    options = {"bitmask": {"nonzeros": 0}, "bitmask-int8": {"stored": 0}, "bitmask-int4": {"stored": 0}}.get(layout, {})
    with pytest.raises(ModelError, match="is not one of a matrix"):
        LAYOUTS[layout].layer(shape, False, torch.float32, **options)


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.pattern])
def test_2_4_needs_groups_of_four(layout) -> None:
    with pytest.raises(ModelError, match=f"6 columns are not a multiple of 4, which the {layout} layout needs"):
        LAYOUTS[layout].layer((8, 6), False, torch.float32)
    with pytest.raises(UsageError, match="the matrix is not 2:4: row 0, columns 0 to 3: 4 nonzeros, at most 2"):
        LAYOUTS[layout].layer.from_dense(torch.ones(8, 8), None)


@LAYOUT_NAMES
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_can_be_read_as_the_dense_layer_stores_it(layout, transposed) -> None:
    dense = Conv1D(48, 100) if transposed else nn.Linear(100, 48)
    with torch.no_grad():
        matrix = weight_matrix(dense)
        matrix.mul_(Pattern("2:4").mask(torch.rand(48, 100), matrix, 0.5)).add_(0.0)
    holder = nn.Module()
    holder.layer, holder.config = dense, type("Config", (), {})()
    pack_(holder, ["layer"], layout)
    restored_(dense, holder.layer)
    assert torch.equal(holder.layer.weight, dense.weight)
    assert torch.equal(holder.layer.to(torch.bfloat16).weight, dense.weight.to(torch.bfloat16))
    with pytest.raises(AttributeError):
        holder.layer.weight = dense.weight.detach()


@LAYOUT_NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 50])
def test_inputs_of_another_dtype_are_refused(kernels, layout, dtype, tokens) -> None:
    """As by a dense layer: the kernels would read past the end of one that is narrower."""
    _, sparse = pair(layout=layout)
    with pytest.raises((RuntimeError, ValueError)):
        sparse(torch.ones(tokens, 100, dtype=dtype))


@LAYOUT_NAMES
def test_inputs_of_another_width_are_refused(kernels, layout) -> None:
    _, sparse = pair(layout=layout)
    for shape in ((4, 50), (2, 200), (100, 1), (3,), ()):
        with pytest.raises((RuntimeError, ValueError)):
            sparse(torch.ones(shape))
