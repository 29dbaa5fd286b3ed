import errno
from unittest.mock import Mock

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from gblm_compress.errors import DataError, ModelError, UsageError, collect, first_line, is_out_of_memory, raise_all


def test_first_line_is_never_empty() -> None:
    assert first_line(ValueError("\n one\n two")) == "one"
    assert first_line(ValueError("")) == "ValueError" == first_line(ValueError(" \n"))
    assert len(first_line(ValueError("x" * 5000))) == 300


def test_out_of_memory_in_its_kinds() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory")) and not is_out_of_memory(OSError(5, "x"))
    assert is_out_of_memory(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("MemoryError"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert is_out_of_memory(Fail("Exception during initialization: std::bad_alloc"))
    assert is_out_of_memory(Fail("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 99"))
    assert not is_out_of_memory(Fail("cos_cache dimension 1 must be a multiple of 8"))


def test_an_error_that_memory_caused_is_one_of_memory() -> None:
    error = ModelError("'x': ONNX Runtime cannot load it")
    assert not is_out_of_memory(error)
    error.__cause__ = ValueError("worse")
    error.__cause__.__cause__ = MemoryError()
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        ([ModelError("gone")], ModelError, "gone"),
        ([ModelError("gone"), ModelError("gone")], ModelError, "gone"),  # which counts once
        ([ModelError("a"), ModelError("b")], ModelError, "2 faults\na\nb"),
        ([ModelError("a"), DataError("b")], UsageError, "2 faults\na\nb"),
    ],
)
def test_all_faults_are_raised_at_once(faults, kind, message) -> None:
    raise_all(collect([lambda: None]))
    with pytest.raises(kind) as found:
        raise_all(collect(Mock(side_effect=fault) for fault in faults))
    assert type(found.value) is kind and str(found.value) == message
    assert len(faults) > 1 or found.value is faults[0]
    with pytest.raises(KeyError):  # a bug is no fault
        collect([Mock(side_effect=KeyError("bug"))])
