"""Write a trained student as the pruned folder that it was, and verify it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm_compress.methods.zeros import count_nonzeros, positive_zeros
from gblm_compress.models import grids, manifest
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.saving import copy_settings, verify_by_loading
from gblm_compress.recovery.texts import Windows
from gblm_compress.recovery.training import Training
from gblm_compress.settings import RecoverSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks.task import fingerprint


def save(
    source: ModelSource,
    output: Path,
    student: Any,
    training: Training,
    processor: Any,
    settings: RecoverSettings,
    windows: Windows,
    force: bool,
) -> None:
    """Write the folder, reopen it, and hold it against pattern, manifest and what transformers loads.

    Raises:
        OutputError: it cannot be written.
        VerificationError: what was written is not what was trained.
    """
    checkpoint = Checkpoint(source.folder, student)

    def changed(name: str) -> Tensor | None:
        trained = training.result(name)
        return None if trained is None else positive_zeros(trained.cpu().to(checkpoint.read(name).dtype))

    on = {name.removesuffix(".weight"): grid for name, grid in training.grids.items()}
    with outputs.atomic_folder(output, force=force) as temporary:
        checkpoint.rewrite(temporary, changed)
        copy_settings(source, temporary, processor)
        written = Checkpoint(temporary, student)
        layers, state = manifest.read(source.folder)["layers"], training.progress
        nonzeros = {name: count_nonzeros(written.read(f"{name}.weight")) for name in layers}
        content = {
            "kind": "pruned",
            "layers": {name: layers[name] | {"nonzeros": nonzeros[name], "output_error": None} for name in layers},
            "grids_sha256": grids.write(temporary, on),
            "recovery": {
                "settings": settings.model_dump(mode="json"),
                "text": fingerprint(windows.samples),
                "overlap": windows.overlap,
                "curve": [asdict(look) for look in state.curve],
                "best": state.best,
            },
        }
        manifest.write(temporary, source, content)
        whole = ModelSource(str(output), temporary)
        grids.verify(whole)
        verify_by_loading(whole, nonzeros)
