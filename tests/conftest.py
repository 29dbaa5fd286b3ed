"""Shared fixtures: tiny random models on disk, a quiet progress, a cache folder of the test run's own."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

# Processes that share the cores: as many threads in each as there are cores would wait for those of the others.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gblm_compress import exporters
from gblm_compress.calibration.blocks import BlockReplay
from gblm_compress.calibration.calls import BlockCalls
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import ResidentWeights, StatePool
from gblm_compress.exporters import ExportResult, onnx_fused
from gblm_compress.machine import CACHE_VARIABLE
from gblm_compress.measure.runtimes import Runtime
from gblm_compress.models.experts import unfused
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import SIZES, VOCABULARY, byte_tokenizer, random_model
from gblm_compress.progress import Progress
from gblm_compress.pruning import stage
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.pruning.stage import PruneJob, PruneResult
from gblm_compress.settings import CalibrationSettings, ComputeSettings, ExportSettings, PruneSettings, ResourceSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.metrics import mean_kl
from gblm_compress.tasks.task import Sample, Task
from tests.forks import RANKS, Outcome, Server

# Files whose tests start processes, trace graphs, or run on the real model; the longest first.
SLOW = (
    "real_model", "first_model", "pipeline", "prune_script", "onnx_fused", "fuzz", "onnx", "onnx_rounding", "cli",
    "gpu", "resume", "baselines", "image_classification", "recovery", "families", "grids", "api",
    "zero_shot", "onnx_plain", "gpu_script", "sizes_script", "onnxruntime_op", "ranks", "sparse", "benchmarking",
    "exporters", "wheel", "comparison", "docs", "scripts", "action", "packaging", "page", "site",
)  # fmt: skip
CAUSAL_LM = TASKS["causal-lm"]
_LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
_TINY: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},  # as the model `tiny`
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gpt2": SIZES,
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 256},
}
ARCHITECTURES = tuple(_TINY)


def tiny_config(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**_TINY[kind])


def tiny_model(kind: str, seed: int = 0) -> Any:
    return random_model(tiny_config(kind), seed)


def build_tiny(kind: str, folder: Path, seed: int = 0) -> None:
    tiny_model(kind, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-fast` leaves the slow files out. In `make test` they start first: a long one would end alone."""
    places = {f"test_{name}": place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in places:
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True, scope="session")
def _quiet_libraries() -> None:
    silence_libraries()


@pytest.fixture(autouse=True, scope="module")
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and fixtures use the user's cache only for the real model, whose conversion takes long."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("real_model"):
            patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch) -> None:
    """`fsync` matters only after a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def progress() -> Progress:
    return Progress(quiet=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    """tiny("gpt2"): a tiny model of that architecture, written once."""

    def make(kind: str) -> ModelSource:
        folder = tmp_path_factory.getbasetemp() / f"tiny-{kind}"
        if not folder.exists():
            build_tiny(kind, folder)
        return ModelSource(str(folder), folder)

    return make


@pytest.fixture(scope="session")
def pruned(tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSource]:
    """pruned("gpt2", "2:4"): a tiny model pruned by magnitude, written once."""

    def make(kind: str = "llama", pattern: str = "unstructured", **settings: Any) -> ModelSource:
        folder = tmp_path_factory.mktemp("pruned") / "pruned"
        prune(tiny(kind), folder, PruneSettings(method="magnitude", fit="none", pattern=pattern, **settings))
        return ModelSource("pruned", folder)

    return cache(make)


@pytest.fixture(scope="session")
def server() -> Server:
    """Commands in processes of their own that need not import anything."""
    return Server()


@pytest.fixture(autouse=True)
def _builder(request: pytest.FixtureRequest, monkeypatch) -> None:
    """The builder of fused graphs as it is runs in tests/test_wheel.py."""

    def run(*command: Any, **more: Any) -> "CompletedProcess[str]":
        return request.getfixturevalue("server").build(*command, **more)

    monkeypatch.setattr(onnx_fused, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def program(server: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """program("prune", "tiny"): the command as a user gives it, in the test's own folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda *arguments: server.run(list(arguments), tmp_path, cache)


@pytest.fixture
def pair(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """pair("prune", …): the command as two ranks, as torchrun would start them, which nothing watches over.

    `change` is Python that each runs first, where `rank` is "0" or "1".
    """

    def run(*command: str, change: str = "") -> Outcome:
        cache = tmp_path_factory.mktemp("cache")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return server.run([str(port), change, *command], cache, cache, code=RANKS)

    return run


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A text file of the demo's prose, long enough for a few windows of bytes."""
    from gblm_compress.tasks.text import load_text

    path = tmp_path / "prose.txt"
    path.write_text(load_text("demo", "calibration")[:6000])
    return path


@pytest.fixture
def pruning(tiny, tmp_path: Path, prose: Path) -> Callable[..., PruneResult]:
    """pruning("out", "gpt2", method="wanda"): that tiny model, pruned on prose to that folder of the test's own.

    `kind` may be a source. There is no fit unless one is given.
    """

    def run(name="out", kind="llama", *, samples=3, offload=None, memory=None, **given) -> PruneResult:
        text = CalibrationSettings(dataset=str(prose), samples=samples, sequence_length=32)
        source = tiny(kind) if isinstance(kind, str) else kind
        settings = {key: given.pop(key) for key in PruneSettings.model_fields if key in given}
        given["resources"] = ResourceSettings.model_construct(offload=offload, memory=memory)  # any number of bytes
        return prune(source, tmp_path / name, PruneSettings(**{"fit": "none"} | settings), text, **given)

    return run


class Killed(BaseException):
    """Ends a run here and now; nothing in the program catches it."""


def prune(
    source: ModelSource,
    output: Path,
    settings: PruneSettings,
    calibration: CalibrationSettings = CalibrationSettings(),  # noqa: B008
    *,
    progress: Progress | None = None,
    resources: ResourceSettings = ResourceSettings(),  # noqa: B008
    resume: bool = False,
    force: bool = False,
    **compute: str,
) -> PruneResult:
    """`stage.prune` of a source to a folder, quiet unless told otherwise; dtype and device are `compute`."""
    job = PruneJob(source, settings, calibration, ComputeSettings(**compute), resources)
    return stage.prune(job, output, progress or Progress(quiet=True), resume=resume, force=force)


def prune_(model: nn.Module, samples: list[Sample], **settings: Any) -> dict[str, LayerResult]:
    """`stage.prune_` of a model and its experts, without a fit unless there is one in the settings: {layer: result}."""
    with unfused(model):
        return stage.prune_(model, samples, PruneSettings(**{"fit": "none"} | settings), Progress(quiet=True)).layers


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors in a folder's only file of weights, in place."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def flip_a_bit(path: Path) -> None:
    """Damage the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, **keys: Any) -> dict[str, Any]:
    """Change keys of a JSON file; its content."""
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps(content))
    return content


def export(source: ModelSource, folder: Path, **settings: Any) -> tuple[ExportResult, ModelSource]:
    """What `exporters.export` to a folder returns, and the folder; quiet."""
    result = exporters.export(source, folder, ExportSettings(**settings), progress=Progress(quiet=True))
    return result, ModelSource(folder.name, folder)


def saved(model: Any, folder: Path) -> ModelSource:
    """A folder of the model, with a tokenizer of bytes."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSource(folder.name, folder)


def replay(model: nn.Module, samples: list[Sample], task: Task = CAUSAL_LM) -> BlockReplay:
    """The samples before the first block of a model in memory."""
    weights = ResidentWeights(model)
    return BlockReplay(BlockCalls(weights, task, samples), weights, in_memory(), Ranks())


def in_memory() -> StatePool:
    """Room for any number of hidden states."""
    return StatePool(Path(), 1 << 40, torch.device("cpu"))


def samples(count: int = 3, length: int = 24, seed: int = 0) -> list[Sample]:
    """Random token ids for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (1, length), generator=generator)} for _ in range(count)]


@torch.no_grad()
def divergence(dense: nn.Module, pruned: nn.Module, texts: list[Sample]) -> float:
    """The sum of the mean divergences of the predictions for these texts."""
    return sum(mean_kl(dense(**sample).logits[0], pruned(**sample).logits[0]) for sample in texts)


def greedy_tokens(runtime: Runtime, ids: torch.Tensor, count: int) -> list[int]:
    """The `count` tokens that greedy decoding appends to the prompt `ids` [1, tokens]."""
    tokens, cache = [], None
    for _ in range(count):
        ids, cache = runtime.next_token(ids, cache)
        tokens.append(int(ids))
    return tokens
