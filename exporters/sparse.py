"""Export to sparse PyTorch: packed weights, smaller on disk and in memory, on kernels that exploit the zeros.

One format for each layout in `LAYOUTS`. After `import gblm_compress` the folder loads with
`from_pretrained` of the class that loads its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gblm_compress.errors import VerificationError
from gblm_compress.exporters import check_is_pruned, check_patterns, check_weights, dtype_of, quantised
from gblm_compress.formats import FORMATS
from gblm_compress.layouts import LAYOUTS
from gblm_compress.layouts.packed import same_bits
from gblm_compress.layouts.packed_linear import PackedLinear
from gblm_compress.layouts.values import Floats
from gblm_compress.measure.torch_runtime import TorchRuntime
from gblm_compress.methods.patterns import Pattern
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
# Largest difference of a logit, relative to the largest logit: the same products are summed in another order and, in
# 16 bit, rounded to it after every layer.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Raises:
    UsageError: a layer that is yet to be pruned will not have the pattern that the format's layout needs, or as for
        `quantised.check`.
    """
    quantised.check(source, settings)
    if (needed := LAYOUTS[_layout(settings)].pattern) is None:
        return
    check_patterns(patterns or {}, needed, f"export to {settings.format}")


def _layout(settings: ExportSettings) -> str:
    name = FORMATS[settings.format].layout
    assert name is not None
    return name


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Write a sparse checkpoint of a pruned model.

    A layer whose weight the model uses in several blocks stays dense.

    Raises:
        UsageError: the layout cannot hold a pruned layer or would not save bytes, or the output is in the way.
        ModelError: the model does not load, or its manifest names what is no linear layer.
        VerificationError: the reloaded folder has not the source's weights and buffers bit for bit, or computes other
            logits.
    """
    dtype = dtype_of(source, settings)
    model, processor = loading.load_model(source, dtype), loading.load_processor(source)
    task = loading.task_of(source)
    layers = manifest.pruned_layers(source, model)
    shared = [name for name in layers if is_tied(model, name)]
    pruned = {name: linear_layer(model, name) for name in layers if name not in shared}
    reference = _Run.of(model, task.probe(processor, model.config))
    dense = {name: weight_matrix(layer).detach() for name, layer in pruned.items()}
    layout = _layout(settings)
    kind = LAYOUTS[layout].kind
    if (needed := LAYOUTS[layout].pattern) is not None:
        check_weights(dense, needed, settings.format)
    check_is_pruned(dense, kind)
    progress.say("packing …")
    grids = read_grids(source) if LAYOUTS[layout].width else {}
    options: dict[str, Any] = {"grids": grids, "group": settings.group} if LAYOUTS[layout].width else {}
    tables = None if settings.keep_head else LAYOUTS[layout].tables
    exact, dense_tables = pack_(model, list(pruned), layout, tables, **options)
    dense |= dense_tables
    dense_bytes = sum(weight.nbytes for weight in dense.values())
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in dense)
    outputs.check_space(output, source.bytes_on_disk, "the export")
    with outputs.atomic_folder(output, force=force) as temporary:
        save_packed(model, temporary)
        loading.save_processor(processor, temporary, source)
        progress.say("verifying …")
        difference = _verify(ModelSource(str(output), temporary), model, kind, dense, reference)
        checks = {
            "packed_layers": len(dense),
            **({"layers_left_dense": shared} if shared else {}),
            **({"layers_not_rounded": exact} if exact else {}),
            "packed_bytes": packed_bytes,
            "same_layers_dense_bytes": dense_bytes,
            **(_rounding(model, dense, kind) if kind.tolerance else {"restored_bit_for_bit": True}),
            "logits_relative_difference": difference,
            "logits_tolerance": TOLERANCE[dtype],
        }
        manifest.write_export(
            temporary,
            source=source,
            format=settings.format,
            dtype=dtype,
            library="transformers",
            loading=_LOADING.format(
                auto_class=task.auto_class,
                processor=task.processor.name.replace(" ", "_"),
                processor_class=task.processor.auto_class,
            ),
            checks=checks,
        )
    return checks


def _rounding(model: Any, dense: dict[str, Tensor], kind: Floats) -> dict[str, float]:
    errors = [model.get_submodule(name).error(weight) for name, weight in dense.items()]
    return {"restored_within": kind.tolerance, "largest_rounding_error": max(errors)}


@dataclass(frozen=True)
class _Run:
    """What a model makes of a sample.

    Attributes:
        prediction: of its task; logits [1, tokens, vocabulary], say.
        buffers: those that its folder does not hold, as they are after the run.
    """

    sample: Sample
    prediction: Tensor
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, sample: Sample) -> Self:
        prediction = TorchRuntime(model).predict(sample)
        packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLinear))
        kept = model.state_dict()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
        return cls(
            sample, prediction, {name: buffer for name, buffer in buffers.items() if not name.startswith(packed)}
        )


def _check_products(name: str, packed: PackedLinear) -> None:
    """Raises:
    VerificationError: for a token, or for many, the layer computes another product than its restored weight.
    """
    weight, allowed = packed.dense_weight().float(), 1e-3 if packed.dtype == torch.float32 else 1e-2
    for tokens in (1, 64):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, packed.in_features, generator=generator).to(packed.dtype)
        expected = x.float() @ weight.T
        difference = (packed.product(x, None).float() - expected).abs().max()
        if not difference <= allowed * expected.abs().max():
            raise VerificationError(f"{name}: its {packed.kernel(tokens)} is not the product of its weight")


def _verify(exported: ModelSource, written: Any, kind: Floats, dense: dict[str, Tensor], reference: _Run) -> float:
    """Reload the folder as a user would. Compare every tensor with what was written, every packed weight with the dense
    one, and every buffer that is computed with the source's, all bit for bit; run it on what the source was run on.

    Where the layout rounds, weights are compared within its tolerance, every layer multiplies numbers as its restored
    weight does, and the logits are held against those of the model that was written: rounded weights have logits of
    their own.

    Returns:
        The largest difference of a logit, relative to the largest logit.
    """
    model = loading.load_model(exported)
    for name, weight in dense.items():
        packed = model.get_submodule(name)
        if not isinstance(packed, PackedLinear) or not packed.restores(weight):
            how = f"within {kind.tolerance:.0e} of the largest" if kind.tolerance else "bit for bit"
            raise VerificationError(f"{name}: the reloaded folder does not restore its weight {how}")
        if kind.tolerance:
            _check_products(name, packed)
    restored = model.state_dict()
    for name, tensor in written.state_dict().items():
        if name not in restored or not same_bits(restored[name], tensor):
            raise VerificationError(f"{name}: the reloaded folder does not restore it bit for bit")
    if kind.tolerance:
        reference = _Run.of(written, reference.sample)
    run = _Run.of(model, reference.sample)
    for name in sorted(run.buffers.keys() | reference.buffers.keys()):
        pair = [buffers.get(name) for buffers in (run.buffers, reference.buffers)]
        if pair[0] is None or pair[1] is None or not same_bits(pair[0], pair[1]):
            raise VerificationError(f"{name}: the reloaded folder computes another buffer than its source")
    difference = float((run.prediction - reference.prediction).abs().max() / reference.prediction.abs().max())
    tolerance = TOLERANCE[loading.stored_dtype(exported)]
    if not difference <= tolerance:
        raise VerificationError(
            f"predictions of the reloaded folder and its source differ by {difference:.2e} of the largest value "
            f"on real data; {tolerance:.0e} is allowed"
        )
    return difference
