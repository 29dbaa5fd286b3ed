"""Export to sparse PyTorch: packed weights, smaller on disk and in memory, on kernels that exploit the zeros.

Format "bitmask" takes any pattern, "semi-structured" 2:4 alone. After `import gblm_compress` the folder loads with
`AutoModelForCausalLM.from_pretrained`.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm_compress import artifact, manifest, sources
from gblm_compress.architecture import weight_matrix
from gblm_compress.bitmask import same_bits
from gblm_compress.errors import UsageError, VerificationError
from gblm_compress.exporters import ExportResult
from gblm_compress.patterns import Pattern
from gblm_compress.progress import Progress
from gblm_compress.settings import ExportSettings
from gblm_compress.sources import ModelSource
from gblm_compress.sparse_checkpoint import save_packed, sparsify_
from gblm_compress.sparse_linear import SparseLinear

_LOADING = """\
import gblm_compress  # teaches transformers the packed layout; without it this folder does not load
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""
LAYOUT_OF = {"bitmask": "bitmask", "semi-structured": "sparse24"}


def check(source: ModelSource | None, settings: ExportSettings, patterns: Mapping[str, Pattern] | None) -> None:
    """Raises:
    UsageError: a layer that is yet to be pruned will not be 2:4, which semi-structured needs.
    """
    if settings.format == "semi-structured":
        for name, pattern in (patterns or {}).items():
            if not _is_2_4(pattern):
                raise UsageError(f"{name}: pattern {pattern.name} is not 2:4, which export to semi-structured needs")


def _is_2_4(pattern: Pattern) -> bool:
    """Whether what has the pattern has at most two nonzeros in every aligned group of four."""
    n, m = pattern.n_m or (1, 1)
    return (n, m) == (1, 2) or (n <= 2 and m % 4 == 0)


def export(
    source: ModelSource, output: Path, settings: ExportSettings, *, force: bool, progress: Progress
) -> ExportResult:
    """Write a sparse checkpoint of a pruned model.

    Raises:
        UsageError: the layout cannot hold a pruned layer or would not save bytes, or the output is in the way.
        VerificationError: the reloaded weights are not the dense ones bit for bit.
    """
    start = time.perf_counter()
    dtype = sources.stored_dtype(source) if settings.dtype == "auto" else settings.dtype
    model = sources.load_model(source, dtype)
    names = manifest.pruned_layers(source, model)
    dense = {name: weight_matrix(model.get_submodule(name)).detach() for name in names}
    layout = LAYOUT_OF[settings.format]
    if layout == "sparse24":
        _check_2_4(dense)
    progress.say("packing …")
    sparsify_(model, names, layout)
    dense_bytes = sum(weight.nbytes for weight in dense.values())
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in names)
    if packed_bytes >= dense_bytes:
        raise UsageError(
            f"packed, the {len(names)} layers would take {packed_bytes:,} bytes instead of {dense_bytes:,}: "
            "the model is dense; prune it first"
        )
    artifact.check_space(output, source.bytes_on_disk, "the export")
    checks = {
        "packed_layers": len(names),
        "packed_bytes": packed_bytes,
        "same_layers_dense_bytes": dense_bytes,
        "restored_bit_for_bit": True,
    }
    with artifact.atomic_folder(output, force=force) as temporary:
        save_packed(model, temporary)
        sources.save_tokenizer(sources.load_tokenizer(source), temporary)
        progress.say("verifying …")
        _verify(ModelSource(str(output), temporary), model, dense)
        manifest.write_export(
            temporary, source=source, format=settings.format, dtype=dtype, loading=_LOADING, checks=checks
        )
    return ExportResult(
        format=settings.format,
        folder=str(output),
        bytes=ModelSource("", output).bytes_on_disk,
        source_bytes=source.bytes_on_disk,
        seconds=time.perf_counter() - start,
        checks=checks,
    )


def _check_2_4(dense: dict[str, Tensor]) -> None:
    pattern = Pattern("2:4")
    broken = {name: violation for name, weight in dense.items() if (violation := pattern.first_violation(weight))}
    if broken:
        listed = "\n".join(f"  {name}: {violation}" for name, violation in list(broken.items())[:5])
        more = f"\n  … and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UsageError(
            f"{len(broken)} of {len(dense)} layers are not 2:4, which semi-structured needs:\n{listed}{more}\n"
            "prune with `--pattern 2:4` first"
        )


def _verify(exported: ModelSource, written: Any, dense: dict[str, Tensor]) -> None:
    """Reload the folder as a user would; compare every tensor with what was written, and every packed weight with the
    dense one, bit for bit."""
    model = sources.load_model(exported)
    for name, weight in dense.items():
        sparse = model.get_submodule(name)
        if not isinstance(sparse, SparseLinear) or not same_bits(sparse.dense_weight(), weight):
            raise VerificationError(f"{name}: the reloaded folder does not restore its weight bit for bit")
    restored = model.state_dict()
    for name, tensor in written.state_dict().items():
        if name not in restored or not same_bits(restored[name], tensor):
            raise VerificationError(f"{name}: the reloaded folder does not restore it bit for bit")
