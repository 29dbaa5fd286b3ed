"""Parts of a layer, merged and sharded: bit for bit the packed form of what an engine would hold dense."""

from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.methods.patterns import Pattern
from gblm_compress.serving.parts import DENSE, Parts

EXACT = [name for name, layout in LAYOUTS.items() if layout.exact is None]
LAYOUT_NAMES = pytest.mark.parametrize("layout", EXACT)
COLUMNS = 72  # more than one word of a mask, and halves that end inside one
Weights = dict[Hashable, Tensor]


def matrix(rows: int, seed: int, columns: int = COLUMNS) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight * Pattern("2:4").mask(weight.abs(), weight, 0.5)).add(0.0)


def packed(layout: str, weight: Tensor) -> dict[str, Tensor]:
    layer = LAYOUTS[layout].layer.from_dense(weight, None)
    return {name: layer.get_buffer(name) for name in layer.PACKED}


def parts(layout: str, held: dict[Hashable, range], columns: range = range(COLUMNS)) -> Parts:
    """A layer that holds some rows of each part, in order."""
    total = sum(map(len, held.values()))

    def place(rows: int, part: Hashable) -> Tensor:
        places = torch.full((total,), -1)
        first = 0
        for name, kept in held.items():
            if name == part:
                places[first : first + len(kept)] = torch.arange(rows)[kept.start : kept.stop]
            first += len(kept)
        return places

    return Parts(LAYOUTS[layout].layer, total, columns, COLUMNS, place)


def read(layer: Parts, layout: str, weights: Weights) -> None:
    """As files give them: tensor by tensor, those of one part not together."""
    tensors = {part: packed(layout, weight) for part, weight in weights.items()}
    for name in LAYOUTS[layout].layer.PACKED:
        for part in reversed(tensors):
            layer.take(name, tensors[part][name], part)


def whole(layer: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
    made = layer.whole(torch.device("cpu"), dtype)
    expected = type(made).from_dense(made.dense_weight(), None)
    assert all(same_bits(made.get_buffer(name), expected.get_buffer(name)) for name in made.PACKED)
    return made.dense_weight()


@LAYOUT_NAMES
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_merged_and_sharded_with_heads_that_two_ranks_share(layout: str, rank: int) -> None:
    """q over four ranks; k and v have two heads, each of which two ranks hold."""
    weights: Weights = {"q": matrix(32, 0), "k": matrix(8, 1), "v": matrix(8, 2)}
    shared = range(4 * (rank // 2), 4 * (rank // 2) + 4)
    held: dict[Hashable, range] = {"q": range(8 * rank, 8 * rank + 8), "k": shared, "v": shared}
    layer = parts(layout, held)
    read(layer, layout, weights)
    assert same_bits(whole(layer), torch.cat([weights[part][kept.start : kept.stop] for part, kept in held.items()]))


@LAYOUT_NAMES
@pytest.mark.parametrize("columns", [range(0, 36), range(36, 72), range(COLUMNS)], ids=str)
def test_columns_of_a_layer_whose_inputs_are_shared_out(layout: str, columns: range) -> None:
    weight = matrix(16, 3)
    layer = parts(layout, {None: range(16)}, columns)
    read(layer, layout, {None: weight})
    assert same_bits(whole(layer), weight[:, columns.start : columns.stop].contiguous())


@pytest.mark.parametrize(("layout", "group"), [("bitmask-int8", 64), ("bitmask-int4", 32)])
def test_a_dense_part_has_scales_for_as_many_columns_as_the_packed_ones(layout: str, group: int) -> None:
    kind, dense = LAYOUTS[layout].layer, [matrix(8, 0), matrix(8, 1)]
    packed_one = kind.from_dense(dense[0], None, group=group)
    places = (torch.tensor([*range(8), *[-1] * 8]), torch.tensor([*[-1] * 8, *range(8)]))
    layer = Parts(kind, 16, range(COLUMNS), COLUMNS, lambda rows, part: places[part], group)
    for name in kind.PACKED:
        layer.take(name, getattr(packed_one, name), 0)
    layer.take(DENSE, dense[1], 1)
    expected = torch.cat([packed_one.dense_weight(), kind.from_dense(dense[1], None, group=group).dense_weight()])
    made = layer.whole(torch.device("cpu"), torch.float32)
    assert same_bits(made.dense_weight(), expected)


@LAYOUT_NAMES
def test_one_part_of_which_an_engine_holds_several_pieces(layout: str) -> None:
    """Gate and up in one matrix of the folder: a rank holds a share of each."""
    weight = matrix(32, 4)
    places = torch.tensor([*range(8, 16), *range(24, 32)])
    layer = Parts(LAYOUTS[layout].layer, 16, range(COLUMNS), COLUMNS, lambda rows, part: places)
    read(layer, layout, {None: weight})
    assert same_bits(whole(layer), weight[places])


@LAYOUT_NAMES
def test_a_part_that_was_left_dense_is_packed(layout: str) -> None:
    gate, up = matrix(8, 5), matrix(8, 6)
    layer = parts(layout, {0: range(8), 1: range(8)})
    read(layer, layout, {0: gate})
    layer.take(DENSE, up, 1)
    assert same_bits(whole(layer), torch.cat([gate, up]))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXACT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_parts_stay_as_they_were_rounded(layout: str, dtype: torch.dtype) -> None:
    """Each with scales and levels of its own, a part that was left dense among them."""
    kind = LAYOUTS[layout].layer
    weights: Weights = {part: matrix(8, seed) for seed, part in enumerate("qkv")}
    layer = parts(layout, {"q": range(2, 6), "k": range(8), "v": range(4)})
    read(layer, layout, {part: weights[part] for part in "qk"})
    layer.take(DENSE, weights["v"], "v")
    made = layer.whole(torch.device("cpu"), dtype)
    q, k, v = (kind.from_dense(weight, None).dense_weight() for weight in weights.values())
    assert same_bits(made.dense_weight(), torch.cat([q[2:6], k, v[:4]]).to(dtype))
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double() @ made.dense_weight().double().T
    torch.testing.assert_close(made(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_a_dense_part_that_rounding_would_change_much_is_refused() -> None:
    outlier = torch.full((8, COLUMNS), 0.03)
    outlier[:, ::64] = 1.0
    outlier[:, 1::2] = 0
    with pytest.raises(ModelError, match="was left dense, and the bitmask-int4 layout would change it by .* %"):
        parts("bitmask-int4", {None: range(8)}).take(DENSE, outlier)


def test_parts_with_other_groups_are_not_merged() -> None:
    kind, weight = LAYOUTS["bitmask-int8"].layer, matrix(8, 5)
    layer = parts("bitmask-int8", {0: range(8), 1: range(8)})
    for part, group in ((0, None), (1, 32)):
        made = kind.from_dense(weight, None, group=group)
        for name in kind.PACKED:
            layer.take(name, made.get_buffer(name), part)
    with pytest.raises(UsageError, match="have scales for different numbers of columns"):
        layer.whole(torch.device("cpu"), torch.float32)


def test_a_dense_part_of_any_pattern_fits_into_bitmask_only() -> None:
    dense = torch.ones(8, COLUMNS)
    layer = parts("bitmask", {None: range(8)})
    layer.take(DENSE, dense)
    assert same_bits(whole(layer), dense)
    with pytest.raises(UsageError, match="not 2:4"):
        parts("sparse24", {None: range(8)}).take(DENSE, dense)


@LAYOUT_NAMES
def test_what_a_process_holds_is_a_copy_in_its_dtype(layout: str) -> None:
    weight = matrix(8, 7)
    tensors = packed(layout, weight)
    layer = parts(layout, {None: range(8)})
    for name, tensor in tensors.items():
        layer.take(name, tensor)
    for tensor in tensors.values():
        tensor.zero_()  # as a file that changes while it is mapped
    assert same_bits(layer.whole(torch.device("cpu"), torch.bfloat16).dense_weight(), weight.bfloat16())


@LAYOUT_NAMES
def test_an_incomplete_layer_is_refused(layout: str) -> None:
    layer = parts(layout, {0: range(8), 1: range(8)})
    read(layer, layout, {0: matrix(8, 8)})
    first = LAYOUTS[layout].layer.PACKED[0]
    layer.take(first, packed(layout, matrix(8, 9))[first], 1)
    with pytest.raises(ModelError, match="a tensor of it is not in the folder, so it is incomplete"):
        layer.whole(torch.device("cpu"), torch.float32)


@LAYOUT_NAMES
def test_a_damaged_part_is_refused_before_it_is_cut(layout: str) -> None:
    tensors = packed(layout, matrix(8, 10))
    for name, damage in [
        ("values", lambda t: t * float("nan")),
        ("values", lambda t: t[:-1]),
        (LAYOUTS[layout].layer.PACKED[0], lambda t: t.flatten()[:0]),
        (LAYOUTS[layout].layer.PACKED[0], lambda t: t.flatten()[0]),
    ]:
        layer = parts(layout, {None: range(8)})
        with pytest.raises(ModelError):
            for tensor_name, tensor in {**tensors, name: damage(tensors[name])}.items():
                layer.take(tensor_name, tensor)


def test_weights_too_large_for_the_dtype_are_refused() -> None:
    layer = parts("bitmask", {None: range(8)})
    read(layer, "bitmask", {None: matrix(8, 11) * 1e6})
    with pytest.raises(ModelError, match=r"values: holds NaN or infinite values; .*float16 is too narrow"):
        layer.whole(torch.device("cpu"), torch.float16)


def test_a_part_of_another_width_is_refused() -> None:
    layer = parts("bitmask", {None: range(8)})
    with pytest.raises(ModelError, match=f"40 columns; the model's has {COLUMNS}"):
        layer.take(DENSE, matrix(8, 12, columns=40))
