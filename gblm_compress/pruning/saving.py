"""Write the output from the source and the finished blocks, and verify it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress.calibration.weights import verify_by_loading
from gblm_compress.errors import ModelError
from gblm_compress.methods.quantisation import rounded
from gblm_compress.methods.zeros import count_nonzeros, keep_only, positive_zeros
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.walk import Walked
from gblm_compress.storage import outputs


@dataclass(frozen=True)
class Written:
    """The folder to write."""

    source: ModelSource
    output: Path
    force: bool
    processor: Any  # tokenizer or image processor
    checkpoint: Checkpoint  # of the source


_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def stored(source: ModelSource, model: Any, layers: Iterable[str]) -> Checkpoint:
    """The files of the source, by the model's names.

    Raises:
        ModelError: the files do not hold a layer's weight as the model does.
    """
    checkpoint = Checkpoint(source.folder, model)
    for name in layers:
        if f"{name}.weight" not in checkpoint:
            raise ModelError(
                f"model {source.name!r}: its files hold no tensor {name + '.weight'!r}; save the model with "
                "save_pretrained first, or add the layer to --ignore"
            )
        if (dtype := checkpoint.read(f"{name}.weight").dtype) not in _STORED:
            raise ModelError(
                f"model {source.name!r}: its files hold {name + '.weight'!r} in {dtype}, not as floating-point "
                "numbers of 16 bits or more; the model is quantised or damaged: prune the original"
            )
    return checkpoint


def save(what: Written, run: RunFolder, walked: Walked, progress: Progress) -> dict[str, LayerResult]:
    layers, plan = walked.layers, walked.plan
    blocks = {name: index for index, pruned in run.record.blocks.items() for name in pruned}
    on = run.grids(plan.settings.columns_of_a_scale)
    results = dict(layers)

    def changed(name: str) -> Tensor | None:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            return None
        dense = what.checkpoint.read(name)
        computed = run.finished_layer(blocks[layer], layer)
        if grid := on.get(layer):
            matrix = computed.T if layers[layer].transposed else computed
            point = rounded(matrix.float(), matrix != 0, grid)  # to the last bit, whatever dtype it was computed in
            weight = positive_zeros((point.T if layers[layer].transposed else point).to(dense.dtype))
        elif plan.settings.updates:
            weight = positive_zeros(computed.to(dense.dtype))
        else:  # a survivor keeps its value to the last bit, whatever dtype it was judged in
            weight = keep_only(dense, computed != 0)
        results[layer] = replace(layers[layer], nonzeros=count_nonzeros(weight))
        return weight

    identity = run.record.identity
    with outputs.atomic_folder(what.output, force=what.force, inside=run.folder) as temporary:
        what.checkpoint.rewrite(temporary, changed)
        loading.copy_settings(what.source, temporary, what.processor)
        content = {
            "kind": "pruned",
            "prune": identity["settings"],
            "calibration": identity["calibration"],
            "compute": {key: identity[key] for key in ("dtype", "device", "threads")},
            "layers": {name: asdict(layer) for name, layer in results.items()},
            "left_dense": {name: asdict(dense) for name, dense in walked.left_dense.items()},
            "grids_sha256": grids.write(temporary, on),
        }
        manifest.write(temporary, what.source, content)
        progress.say("verifying …")
        written = ModelSource(str(what.output), temporary)
        grids.verify(written)
        nonzeros = {name: layer.nonzeros for name, layer in results.items()}
        verify_by_loading(written, nonzeros, plan.placement.offload)
    return results
