"""Which channels of a block may lie in another order: those between layers, where nothing mixes them.

A layer reads what others give, channel by channel: the MLP's last layer what is made of its first ones, attention's
output what is made of the values. Reorder the rows of these and the columns of that alike, and nothing changes. Nothing
here knows a layer by name: which layers belong together is guessed from their shapes, and tried on the text.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.calibration.blocks import Block
from gblm_compress.models.architecture import is_transposed, weight_matrix

PARTS = (1, 2)
"""A first layer of an MLP may hold gate and values, one after the other."""


@dataclass(frozen=True)
class Heads:
    """The heads of attention: those of queries, and the fewer ones of keys and values that they share."""

    queries: int
    values: int


@dataclass(frozen=True)
class Link:
    """Channels that may be reordered, and the layers at their two ends.

    Channels change places within a run, such as the values of one head. A run lies in the consumer's columns as often
    as queries share it, and in the producers' rows once for each part.

    Attributes:
        consumer: the layer whose columns they are.
        producers: the layers whose rows they are.
        runs: how many there are.
        copies: of each run, side by side in the consumer's columns.
        parts: of the producers' rows, each with all runs.
    """

    consumer: str
    producers: tuple[str, ...]
    runs: int = 1
    copies: int = 1
    parts: int = 1

    def size(self, layers: Mapping[str, nn.Module]) -> int:
        """Channels in a run."""
        return weight_matrix(layers[self.consumer]).shape[1] // (self.runs * self.copies)

    def moves(self, layers: Mapping[str, nn.Module], order: Tensor) -> list[tuple[str, int, Tensor]]:
        """The tensors that change, as (name, dimension, what lies at each place of it).

        Args:
            order: [runs, size], the channel that lies at each place of its run.
        """
        channels = order + (torch.arange(self.runs) * order.shape[1])[:, None]
        shared = order[:, None] + (torch.arange(self.runs * self.copies) * order.shape[1]).view(self.runs, -1, 1)
        rows = torch.cat([channels.flatten() + part * channels.numel() for part in range(self.parts)])
        moves = [(f"{self.consumer}.weight", 1 - is_transposed(layers[self.consumer]), shared.flatten())]
        for name in self.producers:
            moves.append((f"{name}.weight", int(is_transposed(layers[name])), rows))
            if getattr(layers[name], "bias", None) is not None:
                moves.append((f"{name}.bias", 0, rows))
        return moves


def tolerance(dtype: torch.dtype) -> float:
    """How far what is computed may be from what it was, as a share of it: more than by rounding, less than by a wrong
    order."""
    return 0.05 if dtype.itemsize == 2 else 1e-3


def heads_of(config: Any) -> Heads | None:
    """The heads that a config tells of; None where it tells of none, or differently by layer."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    queries = getattr(text, "num_attention_heads", None)
    values = getattr(text, "num_key_value_heads", None) or queries
    if not isinstance(queries, int) or not isinstance(values, int) or queries % values:
        return None
    return Heads(queries, values)


def find_links(
    block: Block, layers: Mapping[str, nn.Module], heads: Heads | None, m: int, layer_done: Callable[[], None]
) -> list[Link]:
    """The channels of a block that may be reordered within runs that groups of M fit into.

    Args:
        layers: {full name: Linear or Conv1D} of the block.
        layer_done: called for every layer that reads no such channels, as soon as that is known.
    """
    before = _outputs(block, layers)
    found: list[Link] = []
    for consumer in layers:
        is_used = consumer in before and bool(before[consumer].any())
        guesses = guess_links(consumer, layers, heads, m) if is_used else []
        link = next((guess for guess in guesses if _holds(block, layers, guess, before)), None)
        if link is None:
            layer_done()
        else:
            found.append(link)
    return found


def guess_links(consumer: str, layers: Mapping[str, nn.Module], heads: Heads | None, m: int) -> list[Link]:
    """What could hold by the shapes alone, in the order in which it is tried; arguments as for `find_links`."""
    return [link for link in _guesses(consumer, layers, heads) if link.size(layers) % m == 0]


@contextmanager
def moved(layers: Mapping[str, nn.Module], moves: list[tuple[str, int, Tensor]]) -> Iterator[None]:
    """Let the layers compute with reordered tensors for the duration of a `with`."""
    before = []
    for name, dimension, order in moves:
        layer, _, leaf = name.rpartition(".")
        parameter = layers[layer].get_parameter(leaf)
        before.append((parameter, parameter.data))
        parameter.data = parameter.data.index_select(dimension, order.to(parameter.device))
    try:
        yield
    finally:
        for parameter, data in reversed(before):
            parameter.data = data


def _guesses(consumer: str, layers: Mapping[str, nn.Module], heads: Heads | None) -> Iterator[Link]:
    """What could belong together by its shapes: beside the consumer first, in the whole block then."""
    width = weight_matrix(layers[consumer]).shape[1]
    parent = consumer.rpartition(".")[0]
    beside = [name for name in layers if name != consumer and name.rpartition(".")[0] == parent]
    others = [name for name in layers if name != consumer and name not in beside]
    rows = {name: weight_matrix(layer).shape[0] for name, layer in layers.items()}
    for parts, some in product(PARTS, (beside, others)):
        if producers := tuple(name for name in some if rows[name] == parts * width):
            yield Link(consumer, producers, parts=parts)
    if heads is None or width % heads.queries:
        return
    size = width // heads.queries
    for name in beside:
        if rows[name] == heads.values * size:
            yield Link(consumer, (name,), runs=heads.values, copies=heads.queries // heads.values)


def _holds(block: Block, layers: Mapping[str, nn.Module], link: Link, before: dict[str, Tensor]) -> bool:
    """Whether the block and all of its layers but the producers give the same in another order, on the first sample.

    Args:
        before: what they give as they are.
    """
    generator, most = torch.Generator().manual_seed(0), tolerance(block.inputs[0].dtype)
    order = torch.stack([torch.randperm(link.size(layers), generator=generator) for _ in range(link.runs)])
    with moved(layers, link.moves(layers, order)):
        after = _outputs(block, layers)
    return after.keys() == before.keys() and all(
        after[name].shape == before[name].shape  # where a router has not chosen other tokens
        and float((after[name] - before[name]).norm()) <= most * float(before[name].norm())
        for name in before
        if name not in link.producers
    )


@torch.no_grad()
def _outputs(block: Block, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the layers give for the first sample, and under "" what the block adds to it; without those that it does not
    come through."""
    given: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        given[name] = output.detach().float()

    hooks = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        output, states = block.run(0).float(), block.inputs[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return given | {"": output - states if output.shape == states.shape else output}
