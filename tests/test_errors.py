import errno

import torch

from gblm_compress.errors import first_line, is_out_of_memory


def test_first_line_is_never_empty() -> None:
    assert first_line(ValueError("\n one\n two")) == "one"
    assert first_line(ValueError("")) == "ValueError" == first_line(ValueError(" \n"))
    assert len(first_line(ValueError("x" * 5000))) == 300


def test_out_of_memory_in_its_kinds() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    try:
        torch.empty(1 << 60, dtype=torch.int8)
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory")) and not is_out_of_memory(OSError(5, "x"))
    assert is_out_of_memory(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError())
