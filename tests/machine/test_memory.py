import sys

import pytest
import torch

from gblm_compress.machine.memory import peak_memory
from tests.scripts import python

PROGRAM = """
import resource
from contextlib import nullcontext

import torch

from gblm_compress.machine import memory

def faults(kept):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with kept:
        for _ in range(20):
            torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(nullcontext())
print(faults(memory.freed_memory_kept()))
memory.is_own_process = True
print(faults(memory.freed_memory_kept()), faults(nullcontext()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_of_freed_tensors_are_used_again_in_a_process_of_our_own_and_given_back_after() -> None:
    elsewhere, within, after = map(int, python("-c", PROGRAM).stdout.split())
    # 20 tensors of 64 MiB: each of the 16,384 pages of one comes once, or every time.
    assert within < 2 * 16_384 < 10 * 16_384 < min(elsewhere, after)


def test_cuda_is_awake_before_its_counter_is_set_back(monkeypatch) -> None:
    calls = []
    for name in ("init", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: calls.append((name, *given)) or 5)
    with peak_memory("cuda:1") as memory:
        pass
    assert calls == [("init",), ("reset_peak_memory_stats", "cuda:1"), ("max_memory_allocated", "cuda:1")]
    assert memory.peak_bytes == 5
