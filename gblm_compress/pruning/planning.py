"""Decisions before a pruning: budgets, dtypes, placement in memory or on disk, and the cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gblm_compress.calibration import ranks
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.machine import cost
from gblm_compress.machine.memory import free_memory
from gblm_compress.methods.allocation import Budget
from gblm_compress.methods.choices import Need
from gblm_compress.methods.fits import BLOCK_EPOCHS, MODEL_EPOCHS, ROWS, most_steps
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.files import EXPERTS, HEADS, LAYERS, WIDTHS, first_of
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.storage import records
from gblm_compress.tasks.causal_lm import LOSS_TOKENS
from gblm_compress.tasks.task import Sample, Task

FIT_BYTES = 14  # per weight that Adam fits: survivors as master, gradient, moments, best so far (12 measured)
GRID_BYTES = 12  # more if it is rounded: gradients before rounding, and temporaries of the scales' gradients
ROUND_BYTES = 18  # more with several rounds: values of pruned weights, start of the round, the best so far
SELECTION_BYTES = 24  # per weight of a layer: in float32, scores, and copies that are sorted (23.1 measured)
SOLVING_BYTES = 32  # per weight of the rows that least squares solves at once
FACTOR_BYTES = 24  # per entry of a Gram matrix that is factorised in float64, beside the matrix (22.7 measured)
LOGIT_BYTES = 36  # per logit of a sample in distillation: both models', with gradients, in float32 and behind a cap
LIBRARY_BYTES = 2 * 10**8  # that libraries take from their first use on (0.17 GB measured)
STEPS = 20  # that a row takes in a least squares fit, on average (20.1 on SmolLM2 at 50 %, 8,192 tokens)
READS = 400  # reads of the float32 weights in blocks by a CPU while it ranks, saves and verifies them, for any text
SMALL = {"samples": 16, "sequence_length": 512}  # the text that is offered for a long run


@dataclass(frozen=True)
class Placement:
    offload: bool  # the model stays on disk
    states: int  # bytes of host memory for hidden states
    by_sample: bool  # room to measure gradients sample by sample, which is faster
    room: int = 0  # bytes of the device's memory for all of the work


@dataclass(frozen=True)
class Plan:
    settings: PruneSettings
    task: Task
    samples: Sequence[Sample]  # of this process; empty for a method that needs no text
    budgets: dict[str, Budget]  # before an allocation
    device: torch.device  # where blocks run
    dtype: str  # of the arithmetic
    products: str  # the dtype of products in fits by Adam, float32 or bfloat16
    placement: Placement
    ranks: Ranks


def uniform_budgets(model: nn.Module, settings: PruneSettings) -> dict[str, Budget]:
    """The budget of each layer before an allocation, exceptions included.

    `UsageError` if an exception matches no layer, all layers would stay dense, or M does not divide a width.
    """
    layers = {name: layer for block in prunable_layers(model, settings.ignore) for name, layer in block.items()}
    result = settings.budgets(list(layers))
    if not any(settings.changes(budget.pattern) for budget in result.values()):
        raise UsageError("the exceptions in 'overrides' leave every layer dense: there is nothing to prune")
    for name, layer in layers.items():
        pattern, width = result[name].pattern, weight_matrix(layer).shape[1]
        if pattern.n_m and width % pattern.n_m[1]:
            raise UsageError(
                f"{name}: in_features={width} is not a multiple of {pattern.n_m[1]}, which pattern {pattern.name} "
                "needs; add it to --ignore, or choose another pattern"
            )
    return result


def choose_dtypes(
    requested: str, source: ModelSource, settings: PruneSettings, device: str, group: Ranks
) -> tuple[str, str]:
    """The dtype of the computation, and the dtype of products in fits.

    On a CPU a bfloat16 checkpoint is computed in bfloat16 if the CPUs have instructions for it.
    """
    fast = ranks.faster_dtype(device, group)
    products = "float32" if requested == "float32" else fast
    if requested == "auto" and device == "cpu" and loading.stored_dtype(source) == "bfloat16":
        return fast, products
    dtype = loading.choose_dtype(requested, source, device)
    if requested == "auto" and dtype == "float16" and settings.fits.fits_block and products != "bfloat16":
        dtype = "float32"
    return dtype, products


def check_float16(dtype: str, settings: PruneSettings, device: str) -> None:
    """Refuse fits in float16, which loses gradients of 1e-8 and less."""
    if dtype == "float16" and settings.fits.fits_block and ranks.faster_dtype(device, Ranks()) != "bfloat16":
        raise UsageError(
            f"fits in float16 lose gradients that are too small for it, and {device} has no bfloat16; give --fit fast, "
            "or compute in float32"
        )


class Size:
    """Bytes of a model, its statistics and its fits, estimated from its files and its config."""

    def __init__(
        self, source: ModelSource, dtype: str, settings: PruneSettings, calibration: CalibrationSettings
    ) -> None:
        itemsize, stored = (getattr(torch, name).itemsize for name in (dtype, loading.stored_dtype(source)))
        config = loading.config_of(source).get_text_config()  # of a multimodal model, the part that is pruned
        blocks, hidden = first_of(config, LAYERS) or 1, first_of(config, WIDTHS) or 0
        # Some families give these layer by layer.
        heads = int(np.max(first_of(config, HEADS) or 0))
        inner = int(np.max(first_of(config, ("intermediate_size",)) or 4 * hidden))
        experts = int(np.max(first_of(config, EXPERTS) or 1))
        of_expert = inner if experts == 1 else int(np.max(first_of(config, ("moe_intermediate_size",)) or inner))
        chosen = min(experts, int(np.max(first_of(config, ("num_experts_per_tok", "moe_k")) or experts)))  # by a token
        attended = heads * int(np.max(first_of(config, ("head_dim",)) or 0)) or hidden
        tokens, length = first_of(config, ("vocab_size",)) or 0, calibration.sequence_length
        vocabulary = tokens if loading.task_of(source).generates else 0  # other models have few logits
        self.checkpoint = source.bytes_on_disk
        weights = source.bytes_on_disk // stored
        embeddings = tokens * hidden * (1 if getattr(config, "tie_word_embeddings", True) else 2)
        self.in_blocks, self.head = max(0, weights - embeddings), vocabulary * hidden  # weights, not bytes
        block = self.in_blocks // blocks
        # Weights that a token does not meet. Not every block may have experts.
        self.idle = min(3 * of_expert * hidden * experts * blocks, self.in_blocks) * (experts - chosen) // experts
        self.weights, self.block = weights * itemsize, block * itemsize
        self.gradients = 4 * weights if settings.needs_gradients else 0
        self.activations = blocks * length * (16 * hidden + 4 * inner + 2 * heads * length) * itemsize
        place = calibration.samples * length * hidden * itemsize if settings.needs_text else 0
        self._states_of_gradients = (blocks + 1) * place if settings.needs_gradients else 0
        self._states_of_pruning = (2 + settings.fits.fits_block) * place
        read = calibration.samples * length
        routed = read * chosen // experts  # tokens that an expert gets
        # A block's Gram matrices: inputs, rows of the layers that share one, how many such matrices, tokens
        alike = [(hidden, 3 * attended, 1, read), (attended, hidden, 1, read)]
        alike += [(hidden, 2 * of_expert, experts, routed), (of_expert, hidden, experts, routed)]
        # Each is multiplied in every step, to begin with, and for the errors.
        fitted = sum(n * rows * inputs**2 * (3 + min(STEPS, most_steps(t, inputs))) for inputs, rows, n, t in alike)
        self.solving = 2 * blocks * fitted if Need.GRAM in settings.needs else 0  # operations, in float32
        fit_bytes = FIT_BYTES + (GRID_BYTES if settings.grid else 0)
        layer = hidden * inner  # the largest one, which is worked on alone
        solution = 12 * layer + SOLVING_BYTES * min(ROWS, hidden) * inner if Need.GRAM in settings.needs else 0
        logits = 12 * min(length, LOSS_TOKENS) * vocabulary if settings.needs_gradients else 0  # with their gradients
        a_sample = self.activations // blocks + logits
        self.outside_blocks = embeddings * itemsize + a_sample
        # Gradient norms, Gram matrices, and the weights before, for the error of each layer
        norms = 4 * block * (settings.needs_gradients + (Need.REGIONAL in settings.needs))
        before = self.block if settings.fits.fits_block else itemsize * layer
        grams = 4 * sum(inputs**2 * n for inputs, _, n, _ in alike) + before if Need.GRAM in settings.block_needs else 0
        factor = FACTOR_BYTES * inner**2 if Need.FACTOR in settings.needs else 0
        at_a_layer = norms + grams + factor + max(SELECTION_BYTES * layer, solution)
        in_a_fit = fit_bytes * block + (ROUND_BYTES * block + norms + grams if settings.rounds > 1 else 0)
        in_a_fit *= settings.fits.fits_block
        at_a_block = a_sample + max(at_a_layer, in_a_fit)
        at_the_end = fit_bytes * weights + LOGIT_BYTES * length * vocabulary + self.activations
        self.working = max(at_a_block, at_the_end if settings.fits.fits_model else 0)
        self._put_away = grams * settings.fits.fits_block
        self._room = self.working - a_sample - in_a_fit  # for what is put away, while Adam fits
        # A mixture's experts are saved together: as they were, changed, and as they are written (2.4 copies measured).
        self.saving = 5 * 3 * of_expert * hidden * experts * itemsize // 2 if experts > 1 else 0

    def held(self, offload: bool) -> int:
        """Bytes of memory for weights and work, beside hidden states."""
        at_work = self.block + max(self.outside_blocks, self.working) if offload else self.weights + self.working
        return max(at_work, self.saving)

    def _states(self, placement: Placement) -> int:
        return max(0 if placement.by_sample else self._states_of_gradients, self._states_of_pruning)

    def peak(self, placement: Placement) -> int:
        """The most bytes of memory, hidden states included, without what the program holds before."""
        states = self._states(placement)
        away = self._put_away if states + self._put_away <= placement.states else 0
        held = self.held(placement.offload) + max(0, away - self._room) + min(states, placement.states)
        of_gradients = self.weights + self.gradients + self.activations if placement.by_sample and self.gradients else 0
        return LIBRARY_BYTES + max(held, of_gradients)

    def on_disk(self, settings: PruneSettings, placement: Placement, finished: int) -> int:
        """Bytes on disk for output, gradients, blocks and hidden states, less those that are `finished`."""
        kept = self.weights * (2 if settings.fits.fits_model else 1) + self.gradients  # until the output is whole
        states = self._states(placement) + self._put_away
        return self.checkpoint + max(0, kept - finished) + max(0, states - placement.states)


def choose_placement(
    size: Size, resources: ResourceSettings, settings: PruneSettings, device: str, group: Ranks
) -> Placement:
    host = free_memory("cpu") // ranks.processes_here() if resources.memory is None else int(resources.memory)
    on_cpu = device == "cpu"
    room = host if on_cpu else free_memory(device)
    needed = size.held(offload=False)
    offload = needed > room if resources.offload is None else resources.offload
    if offload and settings.fits.fits_model:
        raise UsageError(
            f"distillation works on the whole model, which takes about {needed / 1e9:.1f} GB; {room / 1e9:.1f} GB may "
            f"be used; {'give more --memory, or ' if on_cpu else ''}leave the distillation out (--fit balanced)"
        )
    by_sample = not offload and size.activations > 0 and needed + size.gradients + size.activations <= room
    return Placement(
        offload=offload,
        states=max(0, host - size.held(offload)) if on_cpu else host,
        by_sample=group.every(by_sample),  # else some would wait for the others' first sums
        room=room,
    )


def passes(settings: PruneSettings) -> float:
    """The cost of the settings in forward passes over the text, roughly; a backward pass counts as two.

    Gram matrices and their solutions count as one each, as in a block whose width is a few times smaller than the text.
    """
    if not settings.needs_text:
        return 0.0
    count = 1.0 + 3.0 * settings.needs_gradients  # loading and saving; gradients
    count += _measuring(settings.block_needs) + _measuring(settings.allocates.needs)
    count += sum(choice.passes for choice in settings.choices)
    count += settings.fits.fits_block + settings.fits.fits_model  # what the fits shall imitate
    return count + sum(passes_of_fits(settings))


def passes_of_fits(settings: PruneSettings) -> tuple[float, float]:
    """Those of the `passes` that are fits by Adam: of blocks, and of the model. Their products have their own dtype."""
    of_blocks = 3.0 * BLOCK_EPOCHS + 4.0 * (settings.rounds - 1)  # further rounds stop early
    return of_blocks * settings.fits.fits_block, 4.0 * MODEL_EPOCHS * settings.fits.fits_model


def _measuring(needs: Need) -> float:
    """Passes of a walk over the blocks that measures these needs."""
    return 2.0 * bool(needs & Need.BLOCKS) + 3.0 * (Need.REGIONAL in needs) + 1.0 * (Need.GRAM in needs)


@dataclass(frozen=True)
class PlanResult(records.Result):
    model: str
    weights: int
    dtype: str  # of the arithmetic
    device: str
    from_disk: bool  # a block at a time
    passes: float  # over the calibration text
    seconds: float
    memory_bytes: int
    disk_bytes: int  # until the output is whole


def cost_of(
    source: ModelSource, plan: Plan, size: Size, calibration: CalibrationSettings, writing: tuple[float, float] = (0, 0)
) -> tuple[PlanResult, str]:
    """The time, memory and disk of a pruning on this machine, and a sentence of them.

    `writing`: seconds and bytes to generate the text, if the model writes it.
    """
    settings, times, (of_blocks, of_model) = plan.settings, passes(plan.settings), passes_of_fits(plan.settings)
    fitted = of_blocks + of_model
    dtypes = {plan.dtype, plan.products, "float32"}
    rates = {name: cost.operations_per_second(plan.device, getattr(torch, name)) for name in dtypes}
    rate = rates[plan.dtype]
    in_fits = 1 / (0.75 / rates[plan.products] + 0.25 / rate)  # a quarter of the time is not in products
    handling = READS * 4 * size.in_blocks / cost.bytes_per_second("cpu")
    solving = size.solving / plan.ranks.size / rates["float32"]

    def seconds(text: CalibrationSettings) -> float:
        a_weight = 2 * text.samples * text.sequence_length / plan.ranks.size  # operations of a pass
        one = a_weight * (size.in_blocks - size.idle)
        in_blocks = one * ((times - fitted) / rate + fitted / in_fits)
        # The head is read for the loss alone; its weights get no gradients.
        of_head = 2.0 * settings.needs_gradients / rate + of_model / in_fits
        solved = max(0.0, solving - one / rate)  # one is counted for the solution
        return handling + in_blocks + a_weight * size.head * of_head + solved

    takes, memory = seconds(calibration) + writing[0], max(int(writing[1]), size.peak(plan.placement))
    smaller = seconds(calibration.model_copy(update=SMALL))
    result = PlanResult(
        model=source.name,
        weights=int(loading.count_weights(source)),
        dtype=plan.dtype,
        device=str(plan.device),
        from_disk=plan.placement.offload,
        passes=times,
        seconds=takes,
        memory_bytes=cost.with_program(memory),
        disk_bytes=size.on_disk(settings, plan.placement, finished=0),
    )
    return result, cost.sentence(takes, memory, ("--samples 16 --sequence-length 512", smaller))
