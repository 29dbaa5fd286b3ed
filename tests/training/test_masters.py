"""Trained weights of a network: survivors alone in the masters, each on one process."""

import pytest
import torch
from torch.nn.utils import parametrize

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.training.weights import Survivors, Weights, owners


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (2, 40_000)])  # the last has columns that 16 bits do not number
@pytest.mark.parametrize("in_each_row", [None, 2, 0])
@pytest.mark.parametrize("piece", [10, 1 << 20])  # one row or two, or all
def test_survivors_are_those_of_the_mask(shape, in_each_row: int | None, piece: int, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.training.weights.PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    drawn, dense = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    places = drawn < 0.3 if in_each_row is None else drawn.argsort(-1).argsort(-1) < in_each_row
    if in_each_row is None:
        places[0] = False  # a row without survivors
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(dense.clone())
    parametrize.register_parametrization(module, "weight", Survivors(places), unsafe=True)
    (trained,) = module.parameters()
    assert torch.equal(trained, dense.masked_select(places))
    assert torch.equal(module.weight, dense * places)
    (module.weight * dense).sum().backward()
    assert torch.equal(trained.grad, trained)


def test_each_tensor_is_on_one_process_and_all_have_about_as_much() -> None:
    sizes = {"a": 10, "b": 7, "c": 6, "d": 3, "e": 2}
    owner = owners(sizes, 2)
    assert [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in (0, 1)] == [15, 13]
    layers = {name: torch.nn.Linear(size, 1) for name, size in sizes.items()}
    shares = [set(Weights(layers, {}, ranks=Ranks(rank, 2)).masters) for rank in (0, 1)]
    assert shares == [{name for name in sizes if owner[name] == rank} for rank in (0, 1)]
