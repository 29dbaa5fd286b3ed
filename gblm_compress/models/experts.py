"""Mixtures of experts: fused experts as linear layers of each expert, which share their memory.

transformers keeps the experts of a mixture in parameters [experts, …]. Here an equivalent module has `Linear`
layers with views of them: `experts.3.down_proj`. So each layer sees the tokens routed to its expert.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A layer of every expert: weights [experts, …] or [experts · …, …], biases [experts, out_features]."""

    layer: str
    weight: str
    transposed: bool = False
    bias: str | None = None

    def view(self, fused: Tensor, expert: int, experts: int) -> Tensor:
        """The weight of one expert [out_features, in_features], in the memory of the fused one."""
        own = fused[expert] if fused.dim() == 3 else fused.view(experts, -1, fused.shape[-1])[expert]
        return own.T if self.transposed else own


class Experts(nn.Module):
    """The experts of a mixture, each under its number; `rest` is the fused module without parameters."""

    rest: Any

    def __init__(self, fused: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.parts = parts
        last = fused.get_parameter(parts[-1].weight)
        self.count = len(last) if last.dim() == 3 else int(fused.num_experts)  # type: ignore[arg-type]
        for expert in range(self.count):
            layers = {part.layer: _linear(fused, part, expert, self.count) for part in parts}
            self.add_module(str(expert), nn.ModuleDict(layers))
        for name, module in fused.named_children():  # a norm after the experts, say
            if not any(part.weight.startswith(f"{name}.") for part in parts):
                self.add_module(name, module)
        rest = copy(fused)
        rest._parameters = {}
        object.__setattr__(self, "rest", rest)  # not as a submodule

    def layers(self, expert: int) -> list[nn.Module]:
        return list(getattr(self, str(expert)).values())

    def run(self, expert: int, x: Tensor) -> Tensor:
        """The output of one expert for tokens [tokens, width]."""
        into, out = self.layers(expert)
        hidden = into(x)
        if not getattr(self.rest, "has_gate", True):
            hidden = self.rest.act_fn(hidden)
        elif hasattr(self.rest, "_apply_gate"):
            hidden = self.rest._apply_gate(hidden)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.rest.act_fn(gate) * up
        output: Tensor = out(hidden)
        return self.rest.post_expert_norm(output) if getattr(self.rest, "has_post_expert_norm", False) else output


class RoutedExperts(Experts):
    """Every token goes to some experts, with weights; experts beyond `count` return their input."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden [tokens, width], index [tokens, k] and weights [tokens, k]; a batch may come first."""
        x, index, weights = hidden.reshape(-1, hidden.shape[-1]), index.flatten(0, -2), weights.flatten(0, -2)
        output = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
        if torch.compiler.is_compiling():  # a traced graph cannot depend on the routing: all experts run on all tokens
            total = max(self.count, getattr(self.rest, "total_experts", 0))
            chosen = index[:, :, None] == torch.arange(total, device=index.device)
            shares = (weights[:, :, None] * chosen).sum(1)
            for expert in range(self.count):
                output = output + self.run(expert, x) * shares[:, expert, None]
            if total > self.count:
                output = output + x * shares[:, self.count :].sum(-1, keepdim=True)
        else:
            for expert in torch.unique(index).tolist():
                token, choice = torch.where(index == expert)
                own = self.run(expert, x[token]) if expert < self.count else x[token]
                output.index_add_(0, token, (own * weights[token, choice, None]).to(output.dtype))
        return output.to(hidden.dtype).view(hidden.shape)


class TripleExperts(RoutedExperts):
    """Experts of three layers: act(first) · second, then the third (DBRX)."""

    def run(self, expert: int, x: Tensor) -> Tensor:
        first, second, third = self.layers(expert)
        return third(self.rest.mlp.activation_fn(first(x)) * second(x))


class StackedExperts(Experts):
    """Tokens come sorted by expert, as many for each, zeros where a token is not routed to it (Llama 4)."""

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = []
        for expert, x in enumerate(hidden.view(self.count, -1, hidden.shape[-1])):
            if torch.compiler.is_compiling():
                outputs.append(self.run(expert, x))
            else:
                routed = x.ne(0).any(-1)
                own = self.run(expert, x[routed])
                outputs.append(own.new_zeros(x.shape).index_put((routed,), own))
        return torch.cat(outputs)


class SortedExperts(Experts):
    """One layer for each expert; tokens come sorted by expert, with a count for each (JetMoe)."""

    def forward(self, inputs: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([self.layers(expert)[0](x) for expert, x in enumerate(torch.split(inputs, sizes))])


class SharedExperts(Experts):
    """All tokens go to all experts, weighted between their layers (Inkling)."""

    def forward(self, hidden: Tensor, gammas: Tensor) -> Tensor:
        x, weights = hidden.reshape(-1, hidden.shape[-1]), gammas.reshape(-1, self.count)
        output = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(self.count):
            gate, up, down = self.layers(expert)
            output = output + down(self.rest.act_fn(gate(x)) * up(x) * weights[:, expert, None]).float()
        return output.to(hidden.dtype).view(hidden.shape)


Form = tuple[type[Experts], tuple[Part, ...]]

_GATED = (Part("gate_up_proj", "gate_up_proj"), Part("down_proj", "down_proj"))
# {class of fused experts in transformers that has a form of its own: its replacement}
FORMS: dict[str, Form] = {
    "DbrxExperts": (TripleExperts, (Part("w1", "mlp.w1"), Part("v1", "mlp.v1"), Part("w2", "mlp.w2", transposed=True))),
    "InklingSharedExperts": (SharedExperts, tuple(Part(name, name) for name in ("gate_proj", "up_proj", "down_proj"))),
    "JetMoeParallelExperts": (SortedExperts, (Part("linear", "weight"),)),
    "Llama4TextExperts": (StackedExperts, tuple(Part(p.layer, p.weight, transposed=True) for p in _GATED)),
    "LongcatFlashExperts": (RoutedExperts, _GATED),
}


def form_of(module: nn.Module) -> Form | None:
    """The replacement for fused experts, by `FORMS` or transformers' `use_experts_implementation`; else None."""
    if type(module).__name__ in FORMS:
        return FORMS[type(module).__name__]
    if isinstance(module, Experts) or not hasattr(module, "is_concatenated"):
        return None
    return RoutedExperts, tuple(
        Part(name, name, bool(module.is_transposed), f"{name}_bias" if module.has_bias else None)
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    )


def unfuse_(model: nn.Module, only: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Replace fused experts in place, all or those at the paths `only`; {path: the module that was there}."""
    forms = {name: (module, form) for name, module in model.named_modules() if (form := form_of(module))}
    replaced = {}
    for name, (module, (kind, parts)) in forms.items():
        if only is None or name in only:
            model.set_submodule(name, kind(module, parts))
            replaced[name] = module
    return replaced


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Replace fused experts within a `with`; changes of their weights stay."""
    replaced = unfuse_(model)
    try:
        yield
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)


def fused_weights(model: nn.Module) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """{name of a tensor of an expert: (name of the fused tensor, function that views its part)}."""
    found: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for path, module in experts_of(model).items():
        for expert in range(module.count):
            for part in module.parts:
                name, view = f"{path}.{expert}.{part.layer}", partial(part.view, expert=expert, experts=module.count)
                found[f"{name}.weight"] = f"{path}.{part.weight}", view
                if part.bias:
                    found[f"{name}.bias"] = f"{path}.{part.bias}", itemgetter(expert)
    return found


def experts_of(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def _linear(fused: nn.Module, part: Part, expert: int, experts: int) -> nn.Linear:
    stored = fused.get_parameter(part.weight)
    weight = part.view(stored.detach(), expert, experts)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=part.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=stored.requires_grad)
    if part.bias is not None:
        bias = fused.get_parameter(part.bias)
        layer.bias = nn.Parameter(bias.detach()[expert], requires_grad=bias.requires_grad)
    return layer
