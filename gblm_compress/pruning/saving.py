"""Write the output from the source and the finished blocks."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm_compress.errors import ModelError
from gblm_compress.methods.quantisation import rounded
from gblm_compress.methods.zeros import count_nonzeros, keep_only, positive_zeros
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.walk import Walked

_STORED = ("F64", "F32", "F16", "BF16")


def stored(source: ModelSource, model: Any, layers: Iterable[str]) -> Checkpoint:
    """The files of the source, by the model's names; `ModelError` if they do not hold the weights of the layers."""
    checkpoint = Checkpoint(source.folder, model)
    for name in layers:
        if f"{name}.weight" not in checkpoint:
            raise ModelError(
                f"model {source.name!r}: its files hold no tensor {name + '.weight'!r}; save the model with "
                "save_pretrained first, or add the layer to --ignore"
            )
        if (dtype := checkpoint.stored_as(f"{name}.weight")) not in _STORED:
            raise ModelError(
                f"model {source.name!r}: its files hold {name + '.weight'!r} in {dtype}, not as floating-point "
                "numbers of 16 bits or more; the model is quantised or damaged: prune the original"
            )
    return checkpoint


def save(
    folder: Path, source: ModelSource, checkpoint: Checkpoint, processor: Any, run: RunFolder, walked: Walked
) -> dict[str, LayerResult]:
    """Write the folder. Returns the results of its layers as stored."""
    layers, settings = walked.layers, walked.plan.settings
    blocks = {name: index for index, pruned in run.record.blocks.items() for name in pruned}
    on = run.grids(settings.columns_of_a_scale)
    results = dict(layers)

    def changed(name: str) -> Tensor | None:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            return None
        dense = checkpoint.read(name)
        computed = run.finished(blocks[layer], layer)
        if grid := on.get(layer):
            matrix = computed.T if layers[layer].transposed else computed
            point = rounded(matrix.float(), matrix != 0, grid)  # to the last bit, whatever dtype it was computed in
            weight = positive_zeros((point.T if layers[layer].transposed else point).to(dense.dtype))
        elif settings.fits.moves:
            weight = positive_zeros(computed.to(dense.dtype))
        else:  # a survivor keeps its value to the last bit, whatever dtype it was judged in
            weight = keep_only(dense, computed != 0)
        results[layer] = replace(layers[layer], nonzeros=count_nonzeros(weight))
        return weight

    checkpoint.rewrite(folder, changed)
    loading.copy_settings(source, folder, processor)
    identity = run.record.identity
    content = {
        "kind": "pruned",
        "prune": identity["settings"],
        "calibration": identity["calibration"],
        "compute": {key: identity[key] for key in ("dtype", "device", "threads")},
        "layers": {name: asdict(layer) for name, layer in results.items()},
        "left_dense": {name: asdict(dense) for name, dense in walked.left_dense.items()},
        "grids_sha256": grids.write(folder, on),
    }
    manifest.write(folder, source, content)
    return results
