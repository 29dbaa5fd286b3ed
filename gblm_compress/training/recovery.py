"""Recovery: train a pruned model to predict what the dense one does, with the same pattern; resumable."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gblm_compress import errors
from gblm_compress.calibration import ranks
from gblm_compress.calibration.attention import chunked_attention
from gblm_compress.calibration.generation import Author
from gblm_compress.calibration.ranks import Ranks, faster_dtype
from gblm_compress.calibration.weights import StatePool, verify
from gblm_compress.errors import ModelError, UsageError, VerificationError
from gblm_compress.machine import cost
from gblm_compress.machine.memory import free_memory, freed_memory_kept, peak_memory
from gblm_compress.methods.patterns import DENSE
from gblm_compress.methods.quantisation import Grid
from gblm_compress.methods.zeros import count_nonzeros, positive_zeros
from gblm_compress.models import grids, loading, manifest
from gblm_compress.models.architecture import head_and_embedding
from gblm_compress.models.checkpoint import Checkpoint
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import RecoverSettings
from gblm_compress.storage import outputs, records
from gblm_compress.tasks import files_of
from gblm_compress.tasks.task import fingerprint
from gblm_compress.training.checkpoints import Checkpoints
from gblm_compress.training.imitation import Imitation, Teacher, check_same_head
from gblm_compress.training.texts import Windows, windows_of
from gblm_compress.training.trainer import Look, Plan, Progressed, Trainer
from gblm_compress.training.weights import Weights

LOOKS = 10
PATIENCE = 3
LARGEST_NORM = 1.0
TOGETHER = 1024  # tokens in a forward pass: enough for fast products, few enough for small logits
SHARE_FOR_STATES = 0.3  # the dense model's predictions take at most this share of the free memory
SLACK = 1.33  # the allocator keeps freed memory: 22.7 bytes a weight were measured for 17 counted
ACTIVATIONS = 8  # bytes that autograd keeps per token, for each input and output of a pruned layer
LOGITS = 5  # tensors of the size of the logits: of both models, their gradients, and a temporary
RATE, RATE_AFTER_A_FIT = 0.002, 0.0007  # after a fit smaller steps are better: .325 nats per token against .339
# MiniLM at 80 %, 200 steps of 32 texts: cosine .827 at .002, .845 at .005, .856 at .01. At 50 %, .01 is too large.
ALMOST_ZERO = 1e-30  # a weight that is trained, unlike a pruned one
RATE_OF_OTHERS = 0.003  # models that do not generate


@dataclass(frozen=True)
class RecoverResult(records.Result):
    folder: str
    rate: float
    tokens: int
    best: int  # number of the look in `curve` whose weights were kept
    curve: tuple[Look, ...]
    passes: float  # how often a window was read, on average
    overlap: dict[str, float]  # {text of `disjoint_from`: share of its 13-grams that the data holds}
    trained: int  # weights
    loss_unit: str
    seconds: float  # of all runs
    peak_memory_bytes: int
    before: float  # validation loss at the start
    after: float  # validation loss of the kept weights


def check_kind(source: ModelSource, settings: RecoverSettings) -> None:
    """Refuse options that are for language models alone."""
    task = loading.task_of(source)
    if settings.disjoint_from and not task.generates:
        raise UsageError(f"disjoint_from is for causal language models; {source.name!r} is {task.help}; leave it out")


def checkpoint_bytes(pruned: ModelSource) -> int:
    """16 times the model in 16 bits: at most two checkpoints of weights and both moments, and two of best weights."""
    return 16 * 2 * int(loading.count_weights(pruned))


def rate_of(settings: RecoverSettings, source: ModelSource) -> float:
    if settings.rate is not None:
        return settings.rate
    if not loading.task_of(source).generates:
        return RATE_OF_OTHERS
    return RATE_AFTER_A_FIT if manifest.read(source.folder)["prune"].get("fit") in ("balanced", "best") else RATE


def bytes_a_weight(compute: torch.dtype, density: float, processes: int) -> float:
    """Memory of a pruned weight on one process, without the dense model's."""
    # Of a survivor every process has the column (2) and gradient (4). They divide masters (4) and Adam's moments (8).
    return compute.itemsize + density * (2 + 4 + (4 + 8) / processes)


def memory_needed(source: ModelSource, teacher: ModelSource, settings: RecoverSettings, compute: torch.dtype) -> float:
    """Bytes on one process: weights of both models, activations and logits."""
    layers = manifest.read(source.folder)["layers"].values()
    shapes = [layer["shape"] for layer in layers]
    count = sum(map(math.prod, shapes))
    density = sum(layer["nonzeros"] for layer in layers) / count
    dense = loading.count_weights(teacher)
    weights = SLACK * (bytes_a_weight(compute, density, ranks.processes_here()) * count + compute.itemsize * dense)
    rest = 4 * max(0.0, dense - count)  # head, embedding and norms of the student, in float32
    passing = 2 * 4 * max(map(math.prod, shapes))  # a weight and its gradient, dense
    task, config = loading.task_of(teacher), loading.config_of(teacher)
    tokens = max(TOGETHER, task.tokens_of(config, settings.sequence_length))
    activations = ACTIVATIONS * tokens * sum(map(sum, shapes))
    vocabulary = config.get_text_config().vocab_size if task.generates else 0
    logits = LOGITS * compute.itemsize * tokens * vocabulary
    return weights + rest + passing + activations + logits


def recover(what: "Recovery", progress: Progress, resume: bool | None = False) -> RecoverResult:
    """Train, write and verify a new folder; `resume` as for `Work`."""
    inputs = [what.source.folder, what.teacher.folder, *files_of(*what.settings.datasets)]
    with outputs.reserved(what.output, what.force, inputs, ranks.is_first_started()):
        looks: list[Callable[[], object]] = [
            partial(_check_models, what),
            partial(check_kind, what.source, what.settings),
            *(partial(loading.task_of(what.source).data_files, name) for name in what.settings.datasets),
            partial(loading.check_length, what.source, what.settings.sequence_length),
        ]
        errors.raise_all(errors.collect(looks))
        length = loading.task_of(what.source).tokens_of(loading.config_of(what.source), what.settings.sequence_length)
        chosen = {"rate": rate_of(what.settings, what.source), "sequence_length": length}
        settings = what.settings.model_copy(update=chosen)
        device = ranks.device_of_rank(loading.choose_device(what.device))
        what = replace(what, settings=settings, device=device)
        with freed_memory_kept(), peak_memory(device) as memory, ranks.joined(device, what.given) as group:
            result = replace(what, group=group).run(resume, progress)
        return replace(result, peak_memory_bytes=memory.peak_bytes)


@dataclass(frozen=True)
class Recovery:
    """Train `source`, a pruned folder, towards `teacher`."""

    source: ModelSource
    teacher: ModelSource
    output: Path
    settings: RecoverSettings
    device: str = "auto"
    force: bool = False
    group: Ranks = field(default_factory=Ranks)

    @property
    def given(self) -> dict[str, Any]:
        """What is the same for all processes, and when resumed."""
        return {
            "model": self.source.fingerprint,
            "teacher": self.teacher.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
        }

    def run(self, resume: bool | None, progress: Progress) -> RecoverResult:
        """The part of this process; rate and device are chosen."""
        start, settings, group, rate = time.monotonic(), self.settings, self.group, self.settings.rate
        assert rate is not None
        tokens = settings.batch * settings.sequence_length  # of a step
        if settings.batch < group.size:
            raise UsageError(
                f"a step of {settings.batch} windows cannot be split over {group.size} processes; give more"
            )
        compute = faster_dtype(self.device, group)
        task, processor = loading.task_of(self.source), loading.load_processor(self.source)
        room = free_memory(self.device) // (ranks.processes_here() if self.device == "cpu" else 1)
        windows = windows_of(Author(self.teacher, self.device, room, group, progress), processor, settings)
        identity = self.given | {
            "compute": compute,
            "text": fingerprint(windows.samples[index] for index in range(len(windows.samples))),
            "held_out": windows.held_out,
            "device": self.device.partition(":")[0],
        }
        store = Checkpoints(self.output, identity, resume, group)
        before = store.record.progress or Progressed()
        if not progress.quiet:
            progress.say(self._estimate(windows, getattr(torch, compute), settings.steps - before.step))
        with store.kept("checkpoints", resume, progress):
            student = loading.load_model(self.source, "float32", self.device)
            dense = loading.load_model(self.teacher, compute, self.device)
            check_same_head(dense, student, self.teacher.name)
            pool = self._pool(windows, dense.config, compute, store)
            weights = self._weights(student, getattr(torch, compute))
            voice = Teacher(dense, task, windows.samples, windows.used, compute, pool)
            loss = Imitation(student, task, windows.samples, voice.predictions, compute)
            progress.say(
                f"{'going on with' if before.step else 'training'} {self.source.name} on {self.device}: "
                f"{settings.steps:,} steps of {settings.batch} × {settings.sequence_length} tokens, rate "
                f"{rate:g}, {len(windows.held_out)} {task.sample}s held out …"
            )
            plan = Plan(
                windows.steps,
                windows.held_out,
                rate,
                look_every=max(1, round(settings.tokens / LOOKS / tokens)),
                patience=PATIENCE,
                together=max(1, TOGETHER // settings.sequence_length),
                largest_norm=LARGEST_NORM,
                tokens=tokens,
            )
            trainer = Trainer(student, weights, loss, plan, store)
            left = settings.steps - before.step
            with chunked_attention(), progress.counter("training", "steps", left, left * tokens) as advance:
                state = trainer.run(
                    advance,
                    lambda look: progress.say(f"{look.tokens:,} tokens: loss {look.held_out:.4f} on held-out text"),
                )
            del trainer, voice, loss, dense
            for name in weights.layers:
                weights.parameters[name].data = weights.parameters[name].data.float()
            fitted = weights.finish()
            # Now, so that the others do not wait for the first, which may save for longer than they may wait.
            trained = group.total(weights.count)
            if group.is_first:
                progress.say("saving …")
                known = {key: store.record.identity[key] for key in ("settings", "text", "threads")}
                curve = [asdict(look) for look in state.curve]
                known |= {"overlap": windows.overlap, "curve": curve, "best": state.best}
                self._save(student, weights, fitted, processor, known)
            store.remove()
        return RecoverResult(
            folder=str(self.output),
            rate=rate,
            tokens=state.curve[-1].tokens,
            best=state.best,
            curve=tuple(state.curve),
            passes=windows.passes(state.step),
            overlap=windows.overlap,
            trained=trained,
            loss_unit=task.loss_unit,
            seconds=before.seconds + time.monotonic() - start,
            peak_memory_bytes=0,  # known at the end
            before=state.curve[0].held_out,
            after=state.curve[state.best].held_out,
        )

    def _estimate(self, windows: Windows, compute: torch.dtype, steps: int) -> str:
        """A weight takes eight operations a token, six in the student; where the loss is only measured, two."""
        settings = self.settings
        trained = steps * settings.batch * settings.sequence_length
        looked = (LOOKS + 1) * len(windows.held_out) * settings.sequence_length
        operations = loading.count_weights(self.teacher) * (8 * trained + 2 * looked) / self.group.size
        seconds = operations / cost.operations_per_second(self.device, compute)
        return cost.sentence(seconds, memory_needed(self.source, self.teacher, settings, compute))

    def _pool(self, windows: Windows, config: Any, compute: str, store: Checkpoints) -> StatePool | None:
        """Storage for the dense model's predictions; None if no window is read twice. Checks the disk space."""
        pool, in_files = None, 0
        if windows.passes() > 1:
            task, length = loading.task_of(self.source), self.settings.sequence_length
            hidden = length * config.get_text_config().hidden_size
            values = hidden if task.generates else task.judged_values(config, length)
            states = len(windows.used) * values * getattr(torch, compute).itemsize
            room = int(SHARE_FOR_STATES * psutil.virtual_memory().available) // ranks.processes_here()
            pool = StatePool(store.states, room, torch.device(self.device))
            in_files = states * self.group.size if states > room else 0
        needed = self.source.bytes_on_disk + checkpoint_bytes(self.source) + in_files - store.bytes
        outputs.check_space(self.output, needed, "the output, its checkpoints and the dense model's predictions")
        return pool

    def _weights(self, student: Any, compute: torch.dtype) -> Weights:
        """All weights but head and embedding. The pruned layers become the dtype of products."""
        layers = {f"{name}.weight": student.get_submodule(name) for name in manifest.read(self.source.folder)["layers"]}
        on = {f"{name}.weight": grid.to(self.device) for name, grid in grids.read_grids(self.source).items()}
        tables = {id(getattr(module, "weight", None)) for module in head_and_embedding(student)}
        others = {name: one for name, one in student.named_parameters() if name not in layers and id(one) not in tables}
        start = {}
        if manifest.read(self.source.folder)["prune"]["pattern"] == DENSE:  # there zero is a level like the others
            values = ((name, layer.get_parameter("weight").detach()) for name, layer in layers.items())
            start = {name: (one.where(one != 0, ALMOST_ZERO), None) for name, one in values}
        weights = Weights(layers, on, others, start=start, ranks=self.group)
        for name, parameter in weights.parameters.items():
            # Experts are views of one tensor, some transposed; sent tensors must be contiguous.
            parameter.data = parameter.data.to(compute if name in layers else torch.float32).contiguous()
        return weights

    def _save(self, student: Any, weights: Weights, on: dict[str, Grid], processor: Any, known: dict[str, Any]) -> None:
        source = self.source
        checkpoint = Checkpoint(source.folder, student)

        def changed(name: str) -> Tensor | None:
            if name not in weights.parameters:
                return None
            return positive_zeros(weights.parameters[name].detach().cpu().to(checkpoint.read(name).dtype))

        with outputs.atomic_folder(self.output, force=self.force) as temporary:
            checkpoint.rewrite(temporary, changed)
            loading.copy_settings(source, temporary, processor)
            written = Checkpoint(temporary, student)
            layers = manifest.read(source.folder)["layers"]
            nonzeros = {name: count_nonzeros(written.read(f"{name}.weight")) for name in layers}
            content = {
                "kind": "pruned",
                "layers": {name: layers[name] | {"nonzeros": nonzeros[name], "output_error": None} for name in layers},
                "grids_sha256": grids.write(temporary, {name.removesuffix(".weight"): on[name] for name in on}),
                "recovery": known,
            }
            manifest.write(temporary, source, content)
            verify(ModelSource(str(self.output), temporary))


def _check_models(what: Recovery) -> None:
    source, teacher = what.source, what.teacher
    loading.check_model(source, "recover")
    if not manifest.is_pruned(source.folder):
        raise ModelError(
            f"model {source.name!r} was not made by `gblm-compress prune`, so that nothing says which zeros must stay; "
            "give a pruned folder"
        )
    loading.check_model(teacher, "learn from")
    if manifest.is_pruned(teacher.folder):
        raise UsageError(f"teacher {teacher.name!r} is pruned itself; give the dense model that it was pruned from")
    own, theirs = (getattr(loading.config_of(each).get_text_config(), "vocab_size", 0) for each in (source, teacher))
    if own != theirs:
        raise UsageError(
            f"teacher {teacher.name!r} has {theirs} tokens, and the pruned model {own}; give the dense model that it "
            "was pruned from"
        )
    device, free = loading.choose_device(what.device), psutil.virtual_memory().available
    compute = getattr(torch, faster_dtype(device, Ranks()))
    needed = ranks.processes_here() * memory_needed(source, teacher, what.settings, compute)
    if device == "cpu" and needed > free:
        raise UsageError(
            f"the training takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; give a "
            "smaller model, or prune with --fit balanced, which works on one block at a time"
        )
    try:
        grids.verify(source)
    except VerificationError as error:
        raise ModelError(f"model {source.name!r} is not what `prune` wrote: {error}; prune again") from error
