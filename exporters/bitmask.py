"""Export to sparse PyTorch in the bitmask layout: any pattern, smaller on disk and in memory, faster on a CPU.

After `import gblm_compress` the folder loads with `AutoModelForCausalLM.from_pretrained`.
"""

import time
from pathlib import Path

from torch import nn

from gblm_compress import artifact, manifest, sources
from gblm_compress.architecture import as_matrix
from gblm_compress.bitmask import same_bits
from gblm_compress.errors import UsageError, VerificationError
from gblm_compress.exporters import ExportResult
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.sources import ModelSource
from gblm_compress.sparse_checkpoint import sparsify_
from gblm_compress.sparse_linear import SparseLinear

FORMAT = "bitmask"


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> ExportResult:
    """Write a sparse checkpoint of a pruned model.

    Raises:
        UsageError: the model has no zeros to save bytes with, or the output is in the way.
        VerificationError: the reloaded weights are not the dense ones bit for bit.
    """
    start = time.perf_counter()
    artifact.check_output(output, force)
    dtype = sources.stored_dtype(source) if settings.dtype == "auto" else settings.dtype
    model = sources.load_model(source, dtype)
    names = manifest.pruned_layers(source, model)
    dense = {name: model.get_submodule(name) for name in names}
    dense_bytes = sum(_weight_bytes(module) for module in dense.values())
    progress.say("packing …")
    sparsify_(model, names)
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in names)
    if packed_bytes >= dense_bytes:
        raise UsageError(
            f"packed, the {len(names)} layers would take {packed_bytes:,} bytes instead of {dense_bytes:,}: "
            "the model is dense; prune it first"
        )
    with artifact.atomic_folder(output) as temporary:
        model.save_pretrained(temporary)
        sources.save_tokenizer(sources.load_tokenizer(source), temporary)
        progress.say("verifying …")
        _verify(ModelSource(str(output), temporary), dense)
    return ExportResult(
        format=FORMAT,
        folder=str(output),
        bytes=ModelSource("", output).bytes_on_disk,
        source_bytes=source.bytes_on_disk,
        seconds=time.perf_counter() - start,
        checks={
            "packed_layers": len(names),
            "packed_bytes": packed_bytes,
            "same_layers_dense_bytes": dense_bytes,
            "restored_bit_for_bit": True,
        },
    )


def _weight_bytes(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.nbytes


def _verify(exported: ModelSource, dense: dict[str, nn.Module]) -> None:
    """Reload the folder as a user would and compare every packed weight with the original, bit for bit."""
    model = sources.load_model(exported)
    for name, original in dense.items():
        sparse = model.get_submodule(name)
        assert isinstance(original.weight, nn.Parameter)
        weight = as_matrix(original, original.weight.detach())
        if not isinstance(sparse, SparseLinear) or not same_bits(sparse.dense_weight(), weight):
            raise VerificationError(f"{name}: the reloaded folder does not restore its weight bit for bit")
