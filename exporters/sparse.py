"""Export to sparse PyTorch: packed weights on kernels that use the zeros. One format for each layout in `LAYOUTS`.

After `import gblm_compress` the folder loads with its source's class and `from_pretrained`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm_compress.errors import UsageError, VerificationError
from gblm_compress.exporters import (
    check_is_pruned,
    check_nonzeros,
    drop_signs_of_zeros_,
    dtype_of,
    zeros_of_rounding,
)
from gblm_compress.formats import FORMATS
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits, share_moved
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.measure.runtimes import TorchRuntime
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.zeros import count_nonzeros
from gblm_compress.models import loading, manifest
from gblm_compress.models.architecture import weight_matrix
from gblm_compress.models.grids import read_grids
from gblm_compress.models.packed_checkpoint import is_tied, linear_layer, pack_, save_packed
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks.task import Sample

_LOADING = """\
import gblm_compress  # teaches transformers the packed layout; without it this folder does not load
from transformers import {auto_class}, {processor_class}

model = {auto_class}.from_pretrained("THIS FOLDER")
{processor} = {processor_class}.from_pretrained("THIS FOLDER")"""
# Largest difference of a logit, relative to the largest logit: sums run in another order, and 16-bit results are
# rounded after every layer.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_Ran = tuple[Tensor, dict[str, Tensor]]  # the prediction, and the buffers after it that a folder does not hold


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Refuse patterns other than the N:M that the layout needs."""
    needed = LAYOUTS[FORMATS[settings.format].layout or ""].pattern
    most, group = (Pattern(needed).n_m if needed else None) or (1, 1)
    for name, pattern in (patterns or {}).items() if needed else ():
        n, m = pattern.n_m or (1, 1)
        if not (n * (group // m) <= most if group % m == 0 else n <= most and m % group == 0):
            raise UsageError(f"{name}: pattern {pattern.name} is not {needed}, which export to {settings.format} needs")


def bytes_a_weight(source: ModelSource, skeleton: Any, settings: ExportSettings) -> float:
    """Peak memory: the packed model, and the dense one if it is converted; else its pages are those of its files."""
    dtype, width = dtype_of(source, settings), LAYOUTS[FORMATS[settings.format].layout or ""].width
    itemsize = getattr(torch, dtype).itemsize
    return (width / 8 if width else itemsize) + (itemsize if dtype != loading.stored_dtype(source) else 0)


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Write a sparse checkpoint of a pruned model, and verify it. Weights that several blocks share stay dense."""
    dtype = dtype_of(source, settings)
    model, processor = loading.load_model(source, dtype), loading.load_processor(source)
    task = loading.task_of(source)
    layers = manifest.pruned_layers(source, model)
    drop_signs_of_zeros_(model, layers)
    shared = [name for name in layers if is_tied(model, name)]
    pruned = {name: linear_layer(model, name) for name in layers if name not in shared}
    sample = task.probe(processor, model.config)
    reference = _run(model, sample)
    dense = {name: weight_matrix(layer).detach() for name, layer in pruned.items()}
    layout_name = FORMATS[settings.format].layout or ""
    layout = LAYOUTS[layout_name]
    kind = layout.kind
    kept = {name: count_nonzeros(weight) for name, weight in dense.items()}
    check_nonzeros(source, kept)
    if kind.counts and not layout.width:
        check_is_pruned(kept, sum(weight.numel() for weight in dense.values()), getattr(torch, dtype).itemsize)
    progress.say("packing …")
    options: dict[str, Any] = {"grids": read_grids(source), "group": settings.group} if layout.width else {}
    tables = None if settings.keep_head else layout.tables
    exact, dense_tables = pack_(model, list(pruned), layout_name, tables, **options)
    dense |= dense_tables
    outputs.check_space(output, source.bytes_on_disk, "the export")
    with outputs.atomic_folder(output, force=force) as temporary:
        save_packed(model, temporary)
        loading.save_processor(processor, temporary, source)
        progress.say("verifying …")
        reference = _run(model, sample) if kind.tolerance else reference
        moved, left, difference = _verify(ModelSource(str(output), temporary), model, dense, sample, reference)
        had = {name: count_nonzeros(dense[name]) for name in left}
        zeros = zeros_of_rounding(had, left, {name: dense[name].numel() for name in pruned if name in left})
        checks = {
            "packed_layers": len(dense),
            **({"layers_left_dense": shared} if shared else {}),
            **({"layers_not_rounded": exact} if exact else {}),
            "packed_bytes": sum(model.get_submodule(name).packed_bytes for name in dense),
            "same_layers_dense_bytes": sum(weight.nbytes for weight in dense.values()),
            **({"restored_within": kind.tolerance, "largest_rounding_error": moved} if left else {}),
            **zeros,
            **({} if left else {"restored_bit_for_bit": True}),
            "logits_relative_difference": difference,
            "logits_tolerance": TOLERANCE[dtype],
        }
        content = {"kind": "export", "format": settings.format, "dtype": dtype, "checks": checks}
        loading_code = _LOADING.format(
            auto_class=task.auto_class,
            processor=task.processor.name.replace(" ", "_"),
            processor_class=task.processor.auto_class,
        )
        manifest.write(temporary, source, content, loading=loading_code)
    return checks


def _run(model: Any, sample: Sample) -> _Ran:
    prediction = TorchRuntime(model).predict(sample)
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLinear))
    kept = model.state_dict()
    named = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
    return prediction, {name: buffer for name, buffer in named.items() if not name.startswith(packed)}


def _verify(
    exported: ModelSource, written: Any, dense: dict[str, Tensor], sample: Sample, reference: _Ran
) -> tuple[float, dict[str, int], float]:
    """Reload the folder. Compare each tensor, rounded weights within the layout's tolerance, and the prediction.

    Returns the largest share of a weight that rounding moved, {rounded layer: its nonzeros}, and the prediction's
    difference.
    """
    model = loading.load_model(exported)
    moved, left = 0.0, {}
    for name, weight in dense.items():
        packed = model.get_submodule(name)
        stored = packed.dense_weight() if isinstance(packed, PackedLinear) else None
        if stored is None or not packed.restores(weight, stored):
            within = written.get_submodule(name).kind.tolerance
            how = f"within {within:.0e} of the largest" if within else "bit for bit"
            raise VerificationError(f"{name}: the reloaded folder does not restore its weight {how}")
        if packed.kind.tolerance:
            _check_products(name, packed, stored)
            moved, left[name] = max(moved, share_moved(stored, weight)), count_nonzeros(stored)
    restored = model.state_dict()
    for name, tensor in written.state_dict().items():
        if name not in restored or not same_bits(restored[name], tensor):
            raise VerificationError(f"{name}: the reloaded folder does not restore it bit for bit")
    expected, buffers = reference
    prediction, computed = _run(model, sample)
    for name in sorted(computed.keys() | buffers.keys()):
        pair = computed.get(name), buffers.get(name)
        if pair[0] is None or pair[1] is None or not same_bits(pair[0], pair[1]):
            raise VerificationError(f"{name}: the reloaded folder and its source compute different buffers")
    difference = float((prediction - expected).abs().max() / expected.abs().max())
    tolerance = TOLERANCE[loading.stored_dtype(exported)]
    if not difference <= tolerance:
        raise VerificationError(
            f"predictions of the reloaded folder and its source differ by {difference:.2e} of the largest value "
            f"on real data; {tolerance:.0e} is allowed"
        )
    return moved, left, difference


def _check_products(name: str, packed: PackedLinear, stored: Tensor) -> None:
    weight, allowed = stored.float(), 1e-3 if packed.dtype == torch.float32 else 1e-2
    for tokens in (1, 64):
        x = torch.randint(-127, 128, (tokens, packed.in_features), generator=torch.Generator().manual_seed(tokens))
        x[:, ::32] = 127  # so that 8 bits with a scale for 32 columns hold all inputs
        x = (x / 128).to(packed.dtype)
        expected = x.float() @ weight.T
        difference = (packed.product(x, None).float() - expected).abs().max()
        if not difference <= allowed * expected.abs().max():
            raise VerificationError(f"{name}: its {packed.kernel(tokens)} is not the product of its weight")
