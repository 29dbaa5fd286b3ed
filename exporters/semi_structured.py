"""Export to sparse PyTorch: 2:4 weights as plain packed tensors, rebuilt as semi-structured tensors on CUDA.

A semi-structured tensor itself cannot be stored (safetensors does not know it, `torch.load(weights_only=True)`
refuses it), and its metadata differs between CUTLASS and cuSPARSELt. So the folder holds the `sparse24` layout,
and `load_sparse` builds what the device at hand can use.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gblm_compress import artifact, manifest, sources
from gblm_compress.architecture import is_transposed, weight_matrix
from gblm_compress.bitmask import same_bits
from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.exporters import ExportResult
from gblm_compress.patterns import Pattern
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.sources import PACKED_CONFIG, ModelSource
from gblm_compress.sparse24 import pack, unpack

FORMAT = "semi-structured"
# Not model.safetensors: transformers must not take a packed folder for a dense one with missing weights.
WEIGHTS = "gblm_sparse.safetensors"
VALUES, POSITIONS = ".sparse24_values", ".sparse24_positions"
_PATTERN = Pattern("2:4")


@dataclass(frozen=True)
class LayerPlacement:
    """How `load_sparse` placed one layer: its backend, and where that is "dense", why."""

    backend: str
    reason: str = ""


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> ExportResult:
    """Write the packed folder of a model whose pruned layers are all 2:4.

    Raises:
        UsageError: a pruned layer is not 2:4, or the output is in the way.
        VerificationError: the packed weights do not restore the dense ones bit for bit.
    """
    start = time.perf_counter()
    artifact.check_output(output, force)
    dtype = sources.stored_dtype(source) if settings.dtype == "auto" else settings.dtype
    model = sources.load_model(source, dtype)
    packed, dense = split_packed(model, manifest.pruned_layers(source, model))
    with artifact.atomic_folder(output) as temporary:
        progress.say("packing …")
        save_file(dense | packed, temporary / WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        sources.save_tokenizer(sources.load_tokenizer(source), temporary)
        layers = [name.removesuffix(VALUES) for name in packed if name.endswith(VALUES)]
        transposed = [name for name in layers if is_transposed(model.get_submodule(name))]
        content = {"layout": "sparse24", "layers": layers, "transposed": transposed}
        (temporary / PACKED_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        progress.say("verifying …")
        _verify(temporary, model)
    dense_bytes = sum(2 * packed[name + VALUES].nbytes for name in layers)
    return ExportResult(
        format=FORMAT,
        folder=str(output),
        bytes=(output / WEIGHTS).stat().st_size,
        source_bytes=source.bytes_on_disk,
        seconds=time.perf_counter() - start,
        checks={
            "packed_layers": len(layers),
            "packed_bytes": sum(tensor.nbytes for tensor in packed.values()),
            "same_layers_dense_bytes": dense_bytes,
            "restored_bit_for_bit": True,
        },
    )


def load_sparse(folder: str | Path, device: str = "cpu") -> Any:
    """Load a folder that `export --format semi-structured` wrote.

    On CUDA the packed layers become torch's semi-structured tensors; a layer whose shape or dtype the kernels
    do not take stays dense, and says so: `model.gblm_placement` maps each packed layer to a `LayerPlacement`. On a
    CPU, which has no such kernels, the dense weights are restored bit for bit.

    Args:
        folder: the export.
        device: "cpu" or "cuda[:N]".

    Returns:
        The transformers model, in eval mode on `device`.

    Raises:
        ModelError: the folder is no such export, or is damaged.
        MissingDependencyError: CUDA is asked for and not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    config_path = folder / PACKED_CONFIG
    if not config_path.is_file():
        raise ModelError(
            f"{str(folder)!r} has no {PACKED_CONFIG}: it was not made by `export --format semi-structured`"
        )
    device = sources.choose_device(device)
    try:
        content = json.loads(config_path.read_text())
        layers, transposed = content["layers"], content["transposed"]
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # json and safetensors raise their own kinds for damaged files
        raise ModelError(f"{str(folder)!r}: damaged export ({error})") from error
    config = AutoConfig.from_pretrained(folder)
    for name in layers:
        state[name + ".weight"] = unpack(state.pop(name + VALUES), state.pop(name + POSITIONS))
    for name in transposed:
        state[name + ".weight"] = state[name + ".weight"].T.contiguous()
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ModelError(f"{str(folder)!r}: the export lacks {sorted(info['missing_keys'])[0]!r}; it is damaged")
    model.eval().to(device)
    model.gblm_placement = {name: _place_(model.get_submodule(name), device) for name in layers}
    return model


def split_packed(model: nn.Module, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The packed tensors of the named layers, and every other tensor of the model as it is.

    Raises:
        UsageError: layers are not 2:4; the message names them.
    """
    broken = {
        name: violation
        for name in names
        if (violation := _PATTERN.first_violation(weight_matrix(model.get_submodule(name)).detach()))
    }
    if broken:
        listed = "\n".join(f"  {name}: {violation}" for name, violation in list(broken.items())[:5])
        more = f"\n  … and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UsageError(
            f"{len(broken)} of {len(names)} layers are not 2:4, which {FORMAT} needs:\n{listed}{more}\n"
            "prune with `--pattern 2:4` first"
        )
    packed: dict[str, Tensor] = {}
    for name in names:
        values, positions = pack(weight_matrix(model.get_submodule(name)).detach())
        packed |= {name + VALUES: values, name + POSITIONS: positions}
    dense: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in names and tensor.data_ptr() not in seen:
            dense[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())  # a tied weight is stored once, under its first name
    return packed, dense


def _place_(module: nn.Module, device: str) -> LayerPlacement:
    """Make the weight semi-structured where the device has kernels for it, and say what was done."""
    if not device.startswith("cuda"):
        return LayerPlacement("dense", "torch has no semi-structured kernels for the CPU")
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    if is_transposed(module):
        return LayerPlacement("dense", "Conv1D multiplies by the transpose, which the kernels do not take")
    weight = weight_matrix(module).detach()
    reasons = []
    for backend in (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS):
        try:
            sparse = backend.from_dense(weight)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reasons.append(f"{backend.BACKEND}: {str(error).splitlines()[0]}")
            continue
        module.weight = nn.Parameter(sparse, requires_grad=False)
        return LayerPlacement(backend.BACKEND)
    return LayerPlacement("dense", "; ".join(reasons))


def _verify(folder: Path, original: nn.Module) -> None:
    """Reload the folder on the CPU and compare every tensor with the original, bit for bit."""
    restored = load_sparse(folder, "cpu").state_dict()
    for name, tensor in original.state_dict().items():
        if name not in restored or not same_bits(tensor, restored[name]):
            raise VerificationError(f"{name}: the packed folder does not restore it bit for bit")
