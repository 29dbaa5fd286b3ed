"""Shared fixtures: tiny random models on disk, a quiet progress, a cache folder of the test run's own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gblm_compress.calibration.block_calls import BlockCalls
from gblm_compress.calibration.block_weights import ResidentWeights
from gblm_compress.calibration.blocks import BlockReplay
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, build_tiny
from gblm_compress.progress import Progress
from gblm_compress.storage.cache import CACHE_VARIABLE
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.task import Sample, Task

# Files whose tests start processes, trace graphs, or run on the real model.
SLOW = (
    "api", "benchmark_worker", "benchmarking", "cli", "comparison", "docs", "exporters", "fuzz", "gpu", "gpu_script",
    "onnx", "pipeline", "prune_script", "ranks", "real_model", "resume", "sparse", "wheel", "zero_shot",
)  # fmt: skip
CAUSAL_LM = TASKS["causal-lm"]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-fast` leaves the slow files out. The real model's tests take longest: they start first."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: "real_model" not in item.keywords)


@pytest.fixture(autouse=True, scope="session")
def _quiet_libraries() -> None:
    silence_libraries()


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Tests never touch the user's cache; the real model's conversion is shared within the run."""
    if "real_model" not in request.keywords:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch) -> None:
    """What `fsync` adds is seen after a loss of power only, which no test can cause."""
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


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A text file of the demo's prose, long enough for a few windows of bytes."""
    from gblm_compress.tasks.text import load_text

    path = tmp_path / "prose.txt"
    path.write_text(load_text("demo", "calibration")[:6000])
    return path


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
