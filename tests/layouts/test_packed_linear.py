"""The packed layer of every layout: its product, what it holds, how it is moved, filled, compiled and refused."""

from typing import Any

import pytest
import torch
from torch import nn

from gblm_compress.errors import ModelError
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed_linear import PackedLinear
from tests.layouts.weights import sparse

LAYOUT_NAMES = pytest.mark.parametrize("layout", LAYOUTS)


def pair(
    layout: str = "bitmask", rows: int = 48, columns: int = 100, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A packed layer, and the dense layer of the weight that it holds."""
    dense = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    packed = PackedLinear.from_dense(layout, sparse(layout, rows, columns, dtype=dtype) / 8, dense.bias)
    dense.weight.data = packed.dense_weight()
    return dense, packed


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
def test_the_product_is_that_of_the_dense_layer(kernels: str, layout: str, dtype: torch.dtype, bias: bool) -> None:
    dense, packed = pair(layout, bias=bias, dtype=dtype)
    for shape in ((100,), (1, 1, 100), (2, 3, 100), (1, 8, 100), (2, 40, 100), (0, 100)):
        x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1))
        x[..., ::32] = 127  # so that 8 bits with a scale for 32 columns hold all inputs
        x = (x / 128).to(dtype)
        got = packed(x)
        assert got.dtype == dtype
        expected = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
        torch.testing.assert_close(got.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


@LAYOUT_NAMES
def test_only_packed_weights_are_held(layout: str) -> None:
    dense, packed = pair(layout, 512, 640)
    assert not [name for name, _ in packed.named_parameters() if "weight" in name]
    assert sum(buffer.nbytes for buffer in packed.buffers()) < 0.6 * dense.weight.nbytes
    empty = PackedLinear(layout, **packed.description(), dtype=torch.float32)
    assert [tensor.shape for tensor in packed.held.values()] == [tensor.shape for tensor in empty.held.values()]
    assert packed.state_dict().keys() == {"bias", *packed.kind.names}


def test_a_layout_that_rounds_restores_within_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = pair()
    weight = dense.weight.detach()
    assert packed.restores(weight) and not packed.restores(weight * 1.005)
    monkeypatch.setattr(packed.kind, "tolerance", 0.01)
    assert packed.restores(weight * 1.005) and not packed.restores(weight * 1.02)
    assert not packed.restores(weight[1:]) and not packed.restores(weight.double())
    assert not packed.restores(weight * float("nan"))


@LAYOUT_NAMES
def test_moved_to_another_dtype_it_is_ready_again(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = pair(layout)
    x, dtype = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)), torch.bfloat16
    prepared, prepare = [], PackedLinear.prepare
    monkeypatch.setattr(PackedLinear, "prepare", lambda self: prepared.append(self.dtype) or prepare(self))
    expected = dense.to(dtype)(x.to(dtype))
    torch.testing.assert_close(packed.to(dtype)(x.to(dtype)), expected, rtol=2e-2, atol=1e-2)
    assert prepared == [dtype]  # when it moved, not when it ran: compilers trace that
    assert packed.to("cpu") is packed and len(prepared) == 1  # nothing moved
    assert packed.to("meta").values.is_meta and len(prepared) == 1


@LAYOUT_NAMES
def test_gradients_of_the_input_are_not_lost_in_silence(layout: str) -> None:
    _, packed = pair(layout)
    with pytest.raises(UserWarning, match="autograd kernel was not registered"):
        packed(torch.randn(3, 100, requires_grad=True)).sum().backward()


@LAYOUT_NAMES
def test_the_operator_compiles_and_has_a_shape_without_data(layout: str) -> None:
    _, packed = pair(layout)
    x = torch.randn(2, 100)
    assert torch.equal(torch.compile(packed, backend="aot_eager", fullgraph=True)(x), packed(x))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert packed(mode.from_tensor(x)).shape == (2, 48)


@LAYOUT_NAMES
def test_an_empty_matrix(layout: str) -> None:
    packed = PackedLinear.from_dense(layout, torch.zeros(8, 64))
    assert torch.equal(packed(torch.ones(2, 64)), torch.zeros(2, 8))


@LAYOUT_NAMES
def test_a_layer_filled_by_hand_is_checked_before_a_kernel_reads_it(layout: str) -> None:
    _, packed = pair(layout)
    x, name = torch.ones(1, 100), packed.kind.names[0]
    packed(x)
    state = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    state[name].fill_(-1 if state[name].dtype.is_signed else 255)
    packed.load_state_dict(state)  # written in place
    for use in (packed, packed.kernel, lambda _: packed.weight):
        with pytest.raises(ModelError, match=f"^(values|{name}): "):
            use(x)
    _, packed = pair(layout)
    setattr(packed, name, state[name])
    with pytest.raises(ModelError, match=f"^(values|{name}): "):
        packed(x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({"shape": shape}, "not fit a matrix") for shape in ((0, 8), (8,), (8, 8, 8), (8.0, 8), (True, 8), "88")),
        *(({"nonzeros": count}, f"nonzeros {count} is impossible") for count in (-1, True, 32 * 8 + 1)),
        ({"scales": 2}, "it is described as .*arguments .'nonzeros', 'scales'. .*a newer gblm-compress may have"),
        ({"dtype": 2}, "it is described as .*multiple values for keyword argument 'dtype'"),
        ({"layout": "sparse24"}, "arguments .'nonzeros'. for the sparse24 layout, which takes "),
        ({"layout": "int8"}, "arguments .'group', 'nonzeros'. for the int8 layout, which takes .'group'"),
        ({"layout": "bitmask-int8"}, "arguments .'group', 'nonzeros'. for .*, which takes .'group', 'stored'"),
        ({"layout": "csr"}, "layout 'csr' is not known"),
    ],
)
def test_a_description_of_no_layer(changed: dict[str, Any], message: str) -> None:
    description = {"shape": [8, 32], "bias": False, "nonzeros": 5} | changed
    with pytest.raises(ModelError, match=message):
        PackedLinear.described("bitmask", description, torch.float32)


@LAYOUT_NAMES
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_can_be_read_as_the_dense_layer_stores_it(layout: str, transposed: bool) -> None:
    packed = pair(layout)[1]
    packed.transposed = transposed
    weight = packed.dense_weight().T if transposed else packed.dense_weight()
    assert torch.equal(packed.weight, weight)
    assert torch.equal(packed.to(torch.bfloat16).weight, weight.to(torch.bfloat16))
    with pytest.raises(AttributeError):
        packed.weight = weight


@LAYOUT_NAMES
def test_inputs_of_another_dtype_or_width_are_refused(kernels: str, layout: str) -> None:
    """As by a dense layer: the kernels would read past the end of a narrower one."""
    _, packed = pair(layout)
    dtypes = (torch.bfloat16, torch.int64, torch.float64)
    unfit = [torch.ones(tokens, 100, dtype=dtype) for tokens in (1, 50) for dtype in dtypes]
    unfit += [torch.ones(shape) for shape in ((4, 50), (2, 200), (100, 1), (3,), ())]
    on_kernels = kernels == "kernels" and "cpu" in LAYOUTS[layout].kernels
    for x in unfit:
        with pytest.raises(
            (RuntimeError, ValueError), match="the weight is torch.float32 with" if on_kernels else None
        ):
            packed(x)
