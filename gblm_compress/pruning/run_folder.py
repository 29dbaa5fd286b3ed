"""The folder of an unfinished pruning: finished work stays here until the output is whole.

.OUTPUT.pruning/
    run.json                 identity: settings, text, model; hashes of the files; budgets, and results of the layers
    gradients-7.safetensors  gradient norms of block 7, until it is pruned
    block-7.safetensors      the pruned weights of block 7, in the dtype of computation, and their grids
    distilled-7.safetensors  the same after the distillation
    states/                  hidden states that did not fit in memory; useless after an interruption
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.quantisation import Grid
from gblm_compress.models import grids
from gblm_compress.models.checkpoint import read_tensor, read_tensors, save_durably
from gblm_compress.models.files import sha256_of
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.training.checkpoints import Record, Work


class PruningRecord(Record):
    budgets: dict[str, Budget] | None = None
    blocks: dict[int, dict[str, LayerResult]] = Field({})  # the finished ones


class RunFolder(Work):
    """Finished work of a run, which only the first process writes. Work that is `damaged` is done again."""

    record: PruningRecord
    needs_all = False

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool | None, ranks: Ranks) -> None:
        names = r"(gradients|block|distilled)-\d+"
        super().__init__(folder, PruningRecord(identity=identity), names, resume, ranks)
        if any(name.startswith("distilled") for name in self.damaged):
            for name in [name for name in self.record.files if name.startswith("distilled")]:
                del self.record.files[name]

    def save_gradients(self, block: int, norms: dict[str, Tensor]) -> None:
        self._save(f"gradients-{block}", norms)
        self.write()

    def gradients(self, block: int) -> dict[str, Tensor]:
        """{layer: G} of a block; empty unless its gradients were measured."""
        path = self._path(f"gradients-{block}")
        return read_tensors(path) if path.name in self.record.files else {}

    def has_gradients(self, block: int) -> bool:
        """Whether the gradients were measured, or are not needed any more."""
        return self._path(f"gradients-{block}").name in self.record.files or self.has_finished(block)

    def finish(
        self, block: int, weights: dict[str, Tensor], on: Mapping[str, Grid], results: dict[str, LayerResult]
    ) -> None:
        """Keep the final weights {layer: weight in its stored layout} of a block, their grids, and the results."""
        self._save(f"block-{block}", weights | grids.as_tensors(on))
        self.record.blocks[block] = results
        gradients = self._path(f"gradients-{block}")
        self.record.files.pop(gradients.name, None)
        self.write()
        if self.ranks.is_first:
            gradients.unlink(missing_ok=True)

    def finish_distilled(
        self, per_block: list[dict[str, Tensor]], on: Mapping[str, Grid], results: Mapping[str, LayerResult]
    ) -> None:
        """Keep the distilled weights of all blocks, and their grids: all of them, or none."""
        for block, weights in enumerate(per_block):
            own = {name: on[name] for name in weights if name in on}
            self._save(f"distilled-{block}", weights | grids.as_tensors(own))
            self.record.blocks[block] = {name: results[name] for name in weights}
        self.write()

    @property
    def is_distilled(self) -> bool:
        return any(name.startswith("distilled") for name in self.record.files)

    @property
    def results(self) -> dict[str, LayerResult]:
        """The results of all finished blocks, in the order of the model."""
        return {name: result for _, block in sorted(self.record.blocks.items()) for name, result in block.items()}

    def has_finished(self, block: int) -> bool:
        return self._finished(block).name in self.record.files

    def finished(self, block: int, layer: str) -> Tensor:
        return read_tensor(self._finished(block), layer)

    def grids(self, group: int | None) -> dict[str, Grid]:
        """The grids of all finished blocks, whose scales cover `group` columns (None: a row)."""
        found = [grids.read_from(self._finished(block), group) for block in sorted(self.record.blocks)]
        return {name: grid for block in found for name, grid in block.items()}

    def _finished(self, block: int) -> Path:
        return self._path(f"{'distilled' if self.is_distilled else 'block'}-{block}")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(name)
        if self.ranks.is_first:
            save_durably(path, tensors)
        self.record.files[path.name] = sha256_of(path) if self.ranks.is_first else ""
