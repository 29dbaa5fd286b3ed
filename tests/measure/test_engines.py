"""vLLM's engine stepped by hand, under a stand-in that reads prompts one after the other, as a scheduler may."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gblm_compress.errors import MissingDependencyError, ModelError, UsageError
from gblm_compress.measure.runtimes import check_installed, load_runtime
from gblm_compress.models.source import ModelSource


class Engine:
    """Answers a sequence with its last id plus 1, 2, …; one prompt is read at each step."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}  # {sequence: its last id}
        self.said: dict[str, list[int]] = {}
        self.steps = 0
        self.most = 100  # tokens of a sequence

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.temperature == 0.0 and params.ignore_eos
        self.requests[name] = prompt["prompt_token_ids"][-1]

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.requests[name], self.said[name]

    def has_unfinished_requests(self) -> bool:
        return all(len(said) < self.most for said in self.said.values())

    def step(self) -> list[Any]:
        self.steps += 1
        waiting = [name for name in self.requests if name not in self.said]
        self.said |= {name: [] for name in waiting[:1]}
        for name, said in self.said.items():
            said.append(self.requests[name] + len(said) + 1)
        ended = {name: [SimpleNamespace(token_ids=tuple(said))] for name, said in self.said.items()}
        return [SimpleNamespace(request_id=name, outputs=outputs) for name, outputs in ended.items()]


@pytest.fixture
def engine(monkeypatch) -> Engine:
    made = Engine()

    def llm(folder: str, **options: Any) -> Any:
        if options["dtype"] == "float16":
            raise ValueError("no such dtype here\nand more")
        return SimpleNamespace(llm_engine=made)

    package, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    package.__version__, package.LLM, package.SamplingParams = "0", llm, SimpleNamespace
    package.__spec__ = SimpleNamespace()
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    for module in (package, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return made


def vllm(source: ModelSource, dtype: str = "float32", device: str = "cpu") -> Any:
    return load_runtime(source, dtype, device, 1, runtime="vllm")


def test_sequences_that_are_ahead_wait_for_the_others(engine, tiny) -> None:
    runtime = vllm(tiny("llama"))
    for _ in range(2):  # the second generation drops the first
        engine.steps = 0
        token, cache = runtime.next_token(torch.tensor([[5, 10], [5, 20], [5, 30]]), None)
        assert token.tolist() == [[11], [21], [31]] and engine.steps == 3
        for number in range(2, 6):
            token, cache = runtime.next_token(token, cache)
            assert token.tolist() == [[10 + number], [20 + number], [30 + number]]
        assert engine.steps == 7 and len(engine.requests) == 3
    engine.most = 5
    with pytest.raises(ModelError, match="ended a sequence early; give a smaller --prompt or --generate"):
        runtime.next_token(token, cache)


def test_what_vllm_does_not_do_is_told(engine, tiny, monkeypatch) -> None:
    with pytest.raises(ModelError, match=r"vLLM cannot load it \(no such dtype here\)"):
        vllm(tiny("llama"), "float16")
    with pytest.raises(UsageError, match="this vLLM is built for cpu"):
        vllm(tiny("llama"), device="cuda:0")
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", "cuda")
    with pytest.raises(UsageError, match="first CUDA device that it sees, and cuda:1 was asked for"):
        vllm(tiny("llama"), device="cuda:1")


@pytest.mark.parametrize(("runtime", "package"), [("vllm", "vllm"), ("genai", "onnxruntime_genai")])
def test_a_runtime_that_is_not_installed_is_named_before_any_work(monkeypatch, runtime: str, package: str) -> None:
    monkeypatch.setattr("gblm_compress.measure.runtimes.find_spec", lambda name: None if name == package else name)
    with pytest.raises(MissingDependencyError, match=f"runtime {runtime}: {package} is not installed; .*pip install"):
        check_installed(runtime)
    check_installed("torch")
