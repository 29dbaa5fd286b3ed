"""What a pruning run needs of memory and disk, and what therefore goes where."""

from dataclasses import dataclass

import psutil
import torch

from gblm_compress.calibration import ranks
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.methods.choices import Need
from gblm_compress.models import loading
from gblm_compress.models.files import HEADS, LAYERS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import outputs
from gblm_compress.tasks.causal_lm import LOSS_TOKENS

SHARE_OF_FREE_MEMORY = 0.8
"""What a run takes of the memory that is free when it starts, unless it is told."""

FIT_BYTES = 24
"""For each weight that Adam fits: master, gradient, two moments, best so far, and a copy for the products."""

GRID_BYTES = 12
"""And where it is rounded meanwhile: gradients before they pass through, and what the scales' gradients need."""

ROUND_BYTES = 12
"""And where rounds follow each other: what pruned weights gather, the start of the round, the best of those before."""

FACTOR_BYTES = 24
"""For each entry of a Gram matrix while its inverse is factorised in float64, beside the matrix itself (22.7 seen)."""

LOGIT_BYTES = 36
"""For each logit of a sample in distillation: both models', with their gradients, in float32 and behind a cap."""


class Size:
    """How large a model and what is measured on it are, in bytes, as far as its files and its config tell.

    Attributes:
        activations: what autograd keeps of all blocks for one sample, counted generously; 0 if the config is silent.
    """

    def __init__(
        self, source: ModelSource, dtype: str, settings: PruneSettings, calibration: CalibrationSettings
    ) -> None:
        itemsize, stored = (getattr(torch, name).itemsize for name in (dtype, loading.stored_dtype(source)))
        config = loading.config_of(source).get_text_config()  # of a multimodal model, the part that is pruned
        blocks, hidden = first_of(config, LAYERS) or 1, first_of(config, WIDTHS) or 0
        heads = _largest(first_of(config, HEADS) or 0)
        inner = _largest(first_of(config, ("intermediate_size",)) or 4 * hidden)
        tokens, length = first_of(config, ("vocab_size",)) or 0, calibration.sequence_length
        vocabulary = tokens if loading.task_of(source).generates else 0  # of whose logits there are many
        self.checkpoint = source.bytes_on_disk
        self.weights = source.bytes_on_disk // stored * itemsize
        self.outside_blocks = 2 * tokens * hidden * itemsize
        self.block = self.weights // blocks
        self.gradients = 4 * self.weights // itemsize if settings.needs_gradients else 0
        self.activations = blocks * length * (16 * hidden + 4 * inner + 2 * heads * length) * itemsize
        place = calibration.samples * length * hidden * itemsize if settings.needs_text else 0
        self._states_of_gradients = (blocks + 1) * place if settings.runs_backward else 0
        self._states_of_pruning = (2 + settings.fits_blocks) * place
        weights, block = self.weights // itemsize, self.block // itemsize
        fit_bytes = FIT_BYTES + (GRID_BYTES if settings.grid else 0)
        rounds = ROUND_BYTES if settings.reconstruction_rounds > 1 else 0
        at_a_block = (
            12 * block  # accumulators, gradients, a layer's scores and masks
            + (4 * ((6 if settings.guidance else 3) * hidden**2 + inner**2) if Need.GRAM in settings.needs else 0)
            + (self.block if Need.GRAM in settings.block_needs else 0)  # as it was, for the errors of its layers
            + (FACTOR_BYTES * inner**2 if Need.FACTOR in settings.needs else 0)
            + ((fit_bytes + rounds) * block if settings.fits_blocks else 0)
            + 12 * min(length, LOSS_TOKENS) * vocabulary  # logits and their gradients
            + self.activations // blocks
        )
        at_the_end = fit_bytes * weights + LOGIT_BYTES * length * vocabulary + self.activations
        self.working = max(at_a_block, at_the_end if settings.distillation_epochs else 0)

    def kept(self, settings: PruneSettings) -> int:
        """What a run keeps on disk until its output is whole: finished blocks and gradients."""
        return self.weights * (2 if settings.distillation_epochs else 1) + self.gradients

    def in_files(self, placement: "Placement") -> int:
        """Hidden states at the places where they are kept at the same time, as far as memory has no room for them."""
        states = max(0 if placement.by_sample else self._states_of_gradients, self._states_of_pruning)
        return max(0, states - placement.states)


def _largest(value: int | list[int]) -> int:
    """A key of config.json that some families give layer by layer."""
    return max(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Placement:
    """What goes where.

    Attributes:
        offload: whether the model stays on disk.
        states: bytes of host memory that hidden states may take.
        by_sample: whether there is room to measure gradients sample by sample (see `gradients`), which is faster.
    """

    offload: bool
    states: int
    by_sample: bool


def choose_placement(
    size: Size, resources: ResourceSettings, settings: PruneSettings, device: str, group: Ranks
) -> Placement:
    """Raises:
    UsageError: it must stay on disk, and distillation needs it in memory.
    """
    free = psutil.virtual_memory().available // ranks.processes_here()
    host = int(SHARE_OF_FREE_MEMORY * free) if resources.memory is None else int(resources.memory)
    on_cpu = device == "cpu"
    room = host if on_cpu else int(SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0])
    needed = size.weights + size.working
    offload = needed > room if resources.offload is None else resources.offload
    if offload and settings.distillation_epochs:
        raise UsageError(
            f"distillation works on the whole model, which takes about {needed / 1e9:.1f} GB; {room / 1e9:.1f} GB may "
            f"be used; {'give more --memory, or ' if on_cpu else ''}leave the distillation out (--fit balanced)"
        )
    by_sample = not offload and size.activations > 0 and needed + size.gradients + size.activations <= room
    held = (size.outside_blocks + size.block if offload else size.weights) + size.working
    return Placement(
        offload=offload,
        states=max(0, host - held) if on_cpu else host,
        by_sample=group.every(by_sample, torch.device(device)),  # else some would wait for the others' first sums
    )


def check_disk(run: RunFolder, size: Size, settings: PruneSettings, placement: Placement) -> None:
    """Raises:
    OutputError: less is free than output, gradients, blocks and hidden states may need beyond what is finished.
    """
    kept = max(0, size.kept(settings) - run.bytes)
    needed = size.checkpoint + kept + size.in_files(placement)
    outputs.check_space(run.folder.parent, needed, "the output, and for finished blocks until it is whole")
