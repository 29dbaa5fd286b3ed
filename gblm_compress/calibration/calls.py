"""A model's calls of its blocks, recorded sample by sample, and its work before and after them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gblm_compress.calibration.weights import ResidentWeights, Weights
from gblm_compress.errors import ModelError, first_line, is_out_of_memory
from gblm_compress.tasks.task import Sample, Task


class NoChainError(ModelError):
    """Blocks that cannot run one by one: they pass on more than hidden states."""


class BlockCalls:
    """The arguments of every block (masks, position embeddings, …) for every sample, from a forward pass of it.

    The first sample is recorded twice, with other hidden states, to refuse a model whose block arguments depend on
    them. `NoChainError` if the blocks cannot be replayed.
    """

    def __init__(self, weights: Weights, task: Task, samples: Sequence[Sample]) -> None:
        shapes = {tuple(tensor.shape for tensor in sample.values()) for sample in samples}
        assert len(shapes) == 1, "the samples of a task have one shape: it pads the shorter ones"
        self._weights, self.task, self.samples = weights, task, samples
        self.counted = [_counted(sample) for sample in samples]  # False for padding; None if all tokens are counted
        _check_own_weights(weights)
        with weights.outer(), weights.block(0) as first_block:
            first, self._returned = _record_calls(weights, task.arguments(samples[0]), first_block)
            again, _ = _record_calls(weights, task.arguments(samples[0]), first_block, negate=True)
            _check_same_arguments(first, again)
            # A tensor that the first block returns beside the hidden states may be an argument of the others.
            beside = () if isinstance(self._returned, Tensor) else self._returned[1:]
            returned = None if _holds_tensor(beside) else self._returned
            recorded = [first]
            for sample in samples[1:]:
                calls, _ = _record_calls(weights, task.arguments(sample), first_block, returned)
                recorded.append([_shared(call, of_first) for call, of_first in zip(calls, first, strict=True)])
            # [block][sample]; samples share the first one's object if they are equal.
            self.calls = [list(of_block) for of_block in zip(*recorded, strict=True)]
            self.tokens = counted_tokens(self.counted, self.embed(0))  # of all samples

    @torch.no_grad()
    def embed(self, sample: int) -> Tensor:
        """The input of the first block [1, tokens, hidden size]; needs `weights.outer()`."""
        reached: list[Tensor] = []

        def stop(hidden: Tensor) -> Tensor:
            reached.append(hidden)
            raise ForwardEnded

        with suppress(ForwardEnded):
            self._without_blocks(self.samples[sample], stop)
        return reached[0]

    def loss_gradient(self, sample: int, hidden: Tensor) -> Tensor:
        """The gradient of a sample's loss by `hidden`, the last block's output; needs `weights.outer()`."""

        def predict(sample: Sample, hidden: Tensor) -> Tensor:
            prediction: Tensor = getattr(self._without_blocks(sample, lambda first: hidden), self.task.output)
            if self.task.generates and prediction.shape[:2] != hidden.shape[:2]:
                raise ModelError(
                    f"{type(self._weights.model).__name__} gives {list(prediction.shape)} for hidden states "
                    f"{list(hidden.shape)}, not a prediction for each token, so there is no gradient to measure; "
                    "choose a method without gradients, such as --method wanda"
                )
            return prediction

        return self.task.loss_gradient(predict, self.samples[sample], hidden)

    def _without_blocks(self, sample: Sample, instead: Callable[[Tensor], Tensor]) -> Any:
        """A forward pass of the model with `instead` in place of all blocks."""

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = self._hidden(args, kwargs)
            return _with_states(self._returned, hidden if index else instead(hidden))

        with ExitStack() as within:
            for index, block in enumerate(self._weights.blocks):
                within.enter_context(forward_replaced(block, partial(stand_in, index)))
            return run_model(self._weights.model, self.task.arguments(sample))

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return _split_call(args, kwargs)[0]


def run_model(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """A forward pass of the model; raises ModelError for its errors."""
    try:
        return model(**arguments)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run on text alone as a causal language model does ({first_line(error)}); "
            "prune it with a method that reads no text: --method magnitude"
        ) from error


def _counted(sample: Sample) -> Tensor | None:
    mask = sample.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def counted_tokens(counted: Sequence[Tensor | None], hidden: Tensor) -> int:
    """How many tokens of all samples are counted; `hidden` [1, tokens, hidden size] are of one."""
    return sum(hidden.shape[1] if mask is None else int(mask.sum()) for mask in counted)


@dataclass
class Call:
    arguments: dict[int | str, Any]  # by place or name
    hidden: int | str | None  # place or name of the hidden states, which `arguments` lack; None if they hold them

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        return _states(self.returned(block, hidden))

    def returned(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        arguments = self.arguments if self.hidden is None else {self.hidden: hidden, **self.arguments}
        args = [value for place, value in arguments.items() if isinstance(place, int)]
        return block(*args, **{name: value for name, value in arguments.items() if isinstance(name, str)})


class ForwardEnded(Exception):
    """Ends a forward pass once its purpose is served."""


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    arguments, hidden = dict(enumerate(args)) | kwargs, 0 if args else "hidden_states"
    return arguments.pop(hidden), Call(arguments, hidden)


def _states(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _with_states(output: Any, states: Tensor) -> Any:
    """What a module returned, with other hidden states."""
    if isinstance(output, Tensor):
        return states
    if isinstance(output, tuple | list):
        return (states, *output[1:])
    made = copy(output)
    made[next(iter(made))] = states
    return made


@torch.no_grad()
def _record_calls(
    weights: Weights, arguments: dict[str, Any], first_block: nn.Module, returned: Any = None, negate: bool = False
) -> tuple[list[Call], Any]:
    """The model's calls of its blocks, and what the first returned; `NoChainError` if they form no chain.

    Only the first block computes, unless `returned` is given. The others return the negative of their input; the next
    block must take it.
    """
    model, blocks = weights.model, weights.blocks
    calls: list[Call] = []
    ran: list[nn.Module] = []
    latest: list[Tensor] = []
    computes = returned is None
    with ExitStack() as within, suppress(ForwardEnded):
        compute = first_block.forward

        def record(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal returned
            hidden, call = _split_call(args, kwargs)
            if block in ran:
                raise NoChainError(f"block {ran.index(block)} runs more than once")
            if latest and hidden is not latest[0] and not torch.allclose(hidden, latest[0], 0, 0, equal_nan=True):
                raise NoChainError(f"block {len(calls)} does not take the output of the block before it as its input")
            if any(isinstance(value, MutableMapping) and not value for value in call.arguments.values()):
                raise NoChainError(
                    f"block {len(calls)} gets an empty mapping, through which blocks pass something on beside the "
                    "hidden states"
                )
            if not computes:
                output = hidden
            elif calls:
                output = -hidden
            else:
                returned = call.returned(compute, -hidden if negate else hidden)
                output = _states(returned)
                if output.shape != hidden.shape:
                    shapes = f"{list(output.shape)} of {list(hidden.shape)}"
                    raise NoChainError(f"block 0 makes hidden states {shapes}")
            latest[:] = [output]
            calls.append(call)
            ran.append(block)
            if not computes and block is blocks[-1]:
                raise ForwardEnded
            return _with_states(returned, output)

        for block in blocks:
            within.enter_context(forward_replaced(block, partial(record, block)))
        run_model(model, arguments)
    if len(calls) != len(blocks):
        raise NoChainError(f"a forward pass ran {len(calls)} blocks of {len(blocks)}")
    return calls, returned


def _check_own_weights(weights: Weights) -> None:
    first: dict[int, int] = {}  # the block that a parameter is in
    for index, block in enumerate(weights.blocks):
        for parameter in block.parameters():
            if (other := first.setdefault(id(parameter), index)) != index:
                raise NoChainError(f"blocks {other} and {index} share weights")


def _check_same_arguments(first: list[Call], second: list[Call]) -> None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        for name, value in one.arguments.items():
            if not _same(value, other.arguments.get(name)):
                raise NoChainError(f"block {index}: its argument {name!r} depends on the results of blocks before it")


def _shared(call: Call, first: Call) -> Call:
    """The call, sharing equal arguments with the first sample's; `first` itself if all are equal."""
    theirs = first.arguments
    arguments = {name: b if _same(a, b := theirs.get(name)) else a for name, a in call.arguments.items()}
    same = all(value is theirs.get(name) for name, value in arguments.items())
    return first if same else Call(arguments, call.hidden)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


@contextmanager
def forward_replaced(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Compute something else in a module while the `with` runs; its hooks stay."""
    own = vars(module).get("forward")
    module.forward = instead
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class WholeCalls(BlockCalls):
    """As `BlockCalls`, with the module around the blocks as the only block."""

    def __init__(self, weights: ResidentWeights, task: Task, samples: Sequence[Sample]) -> None:
        self._weights, self.task, self.samples = weights, task, samples
        self.counted = [_counted(sample) for sample in samples]
        self.calls = [[self._record(sample) for sample in samples]]
        with torch.no_grad():
            self._returned = self.calls[0][0].returned(weights.blocks[0], torch.empty(0))
        self.tokens = counted_tokens(self.counted, self.embed(0))

    def embed(self, sample: int) -> Tensor:
        """A placeholder for hidden states; nothing reads it."""
        return torch.zeros_like(_states(self._returned))

    def _record(self, sample: Sample) -> Call:
        found: list[Call] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(Call(dict(enumerate(args)) | kwargs, None))
            raise ForwardEnded

        with forward_replaced(self._weights.blocks[0], stop), torch.no_grad(), suppress(ForwardEnded):
            run_model(self._weights.model, self.task.arguments(sample))
        return found[0]

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return _states(self._returned)


@torch.no_grad()
def _around_blocks(weights: Weights, arguments: dict[str, Any]) -> nn.Module | None:
    """The innermost module around the blocks that runs once in a forward pass; None if it is the model."""
    runs: Counter[nn.Module] = Counter()
    around, path = [], weights.prefix
    with ExitStack() as within:
        while path := path.rpartition(".")[0]:
            around.append(weights.model.get_submodule(path))
            within.callback(around[-1].register_forward_pre_hook(lambda module, _: runs.update([module])).remove)
        run_model(weights.model, arguments)
    return next((module for module in around if runs[module] == 1), None)


def calls_of(
    weights: Weights, task: Task, samples: Sequence[Sample], layers: list[dict[str, nn.Module]]
) -> tuple[Weights, BlockCalls, list[dict[str, nn.Module]]]:
    """A model's weights, calls and prunable layers by block: its own blocks, or all of them as one.

    Some architectures pass on more than hidden states, change their size, repeat blocks or share weights between them.
    Then the only block is the module around them: all layers are measured in the dense model at once.
    """
    try:
        return weights, BlockCalls(weights, task, samples), layers
    except NoChainError as error:
        reason = f"{type(weights.model).__name__}: {error}"
        if not isinstance(weights, ResidentWeights):
            raise ModelError(f"{reason}; such a model is pruned in memory as a whole, give more --memory") from error
        around = _around_blocks(weights, task.arguments(samples[0]))
        if around is None:
            raise ModelError(f"{reason}, and the model has no decoder beside its head; it cannot be pruned") from error
        whole = ResidentWeights(weights.model)
        whole.blocks = [around]
        together = {name: layer for block in layers for name, layer in block.items()}
        return whole, WholeCalls(whole, task, samples), [together]
