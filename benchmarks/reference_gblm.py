"""GBLM as its paper describes it, step by step and without thrift: what `gblm-compress prune` is measured against.

    python benchmarks/reference_gblm.py demo --samples 32 --sequence-length 512 --json cost.json

Written from arXiv 2311.04902, Algorithm 1. The whole model is in memory and every parameter of it gets a gradient. Each
sample runs forwards and backwards, after which its gradients are added to two accumulators of all weights, Σ|g| and
Σg²: the published script fills both, whichever is used. (There the first is in half precision, 2 bytes a weight less
than here; half precision would not let the masks be compared. Nor would norms of columns that are squared again, as
there: they round to 2e-6 where sums of squares round to 4e-7, and one weight that changes places in an early block
changes thousands in the last.) Then, as in Wanda, block by block: a forward pass of all samples measures activation
norms, |W|·(A + α·G) is scored, the lowest are set to zero, and a second forward pass gives the next block's inputs.

Models and text come from `gblm_compress`; nothing else does.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from ending import exit_after
from safetensors.torch import save_file
from torch import Tensor, nn

from gblm_compress.models.finding import resolve_model
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.progress import Progress
from gblm_compress.tasks.text import drawn_windows


def gradient_norms(model: Any, samples: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"l1": {layer: Σ|g|}, "l2": {layer: √Σg²}} over the samples' gradients of the mean next-token cross-entropy."""
    layers = linear_layers(model.model.layers, "model.layers.")
    sums = {norm: {name: torch.zeros_like(layer.weight) for name, layer in layers.items()} for norm in ("l1", "l2")}
    model.requires_grad_(True)
    for ids in samples:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad.detach().clone()
            sums["l1"][name] = sums["l1"][name] + gradient.abs()
            sums["l2"][name] = sums["l2"][name] + gradient.square()
        model.zero_grad()
    sums["l2"] = {name: total.sqrt() for name, total in sums["l2"].items()}
    return sums


@torch.no_grad()
def prune_(model: Any, samples: list[Tensor], gradients: dict[str, Tensor], pattern: str, alpha: float) -> dict:
    """Prune the blocks one after the other, in place; {layer: mask, True = keep}."""
    inputs, arguments = inputs_of_first_block(model, samples)
    masks = {}
    for index, block in enumerate(model.model.layers):
        layers = linear_layers(block, "")
        squares = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

        def measure(name: str, x: Tensor, squares: dict[str, Tensor] = squares) -> None:
            squares[name] += x.reshape(-1, x.shape[-1]).float().square().sum(dim=0)

        hooks = [
            layer.register_forward_hook(lambda _, x, __, name=name: measure(name, x[0]))
            for name, layer in layers.items()
        ]
        for x in inputs:
            block(x, **arguments)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            activations = (squares[name] / len(samples)).sqrt()
            full_name = f"model.layers.{index}.{name}"
            score = layer.weight.abs() * (activations + alpha * gradients[full_name])
            mask = masks[full_name] = survivors(score, layer.weight.abs(), pattern)
            layer.weight[~mask] = 0
        inputs = [hidden(block(x, **arguments)) for x in inputs]
    return masks


def survivors(score: Tensor, magnitude: Tensor, pattern: str) -> Tensor:
    """Which to keep of [rows, columns]: N of every M neighbours in a row, or half of each row.

    The order is by score, then by magnitude, then the lower index comes first: sorting by the lesser key first and
    stably by the greater one second.
    """
    rows, columns = score.shape
    keep, group = map(int, pattern.split(":")) if ":" in pattern else (columns - columns // 2, columns)
    score, magnitude = score.reshape(-1, group), magnitude.reshape(-1, group)
    order = magnitude.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, score.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(1, order[:, :keep], True)
    return mask.reshape(rows, columns)


def inputs_of_first_block(model: Any, samples: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """The hidden states of every sample before the first block, and the arguments that blocks get beside them."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(block: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)
        raise StopIteration

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in samples:
        try:
            model(input_ids=ids, use_cache=False)
        except StopIteration:
            continue
    hook.remove()
    return inputs, arguments


def linear_layers(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """{prefixed name: layer} of all linear layers in a module."""
    return {prefix + name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def hidden(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of several."""
    return output[0] if isinstance(output, tuple) else output


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Prune, and write what it took and which weights survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `gblm-compress prune`; a Llama")
    parser.add_argument("--calibration", default="demo", metavar="SRC")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pattern", default="2:4", help="N:M, or unstructured: half of each row")
    parser.add_argument("--gradient-norm", choices=("l1", "l2"), default="l1")
    parser.add_argument("--alpha", type=float, default=100.0)
    parser.add_argument("--masks", type=Path, metavar="FILE", help="safetensors of the masks, True = keep")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args()
    before, start = resident_bytes(), time.perf_counter()
    quiet = Progress(quiet=True)
    source = resolve_model(options.model, quiet)
    size = (options.samples, options.sequence_length, options.seed)
    samples = drawn_windows(load_processor(source), source.config["vocab_size"], options.calibration, *size)
    model = load_model(source, "float32")
    gradients = gradient_norms(model, samples)
    middle = time.perf_counter()
    masks = prune_(model, samples, gradients[options.gradient_norm], options.pattern, options.alpha)
    figures = {
        "seconds": time.perf_counter() - start,
        "gradient_seconds": middle - start,
        "peak_rss_beyond_imports_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }
    if options.masks:
        save_file(masks, options.masks)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    exit_after(main)
