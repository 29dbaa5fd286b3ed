"""What `doctor` says of kernels that do not pay on this CPU."""

import pytest

from gblm_compress.kernels import cpu
from gblm_compress.measure.doctor import diagnose


@pytest.mark.parametrize("path, slower", [("portable", True), ("avx2", False), ("neon", False)])
def test_a_cpu_without_fast_kernels_is_told_so(path, slower, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "paths", lambda _: ("portable", path) if path != "portable" else (path,))
    (kernels,) = (each for each in diagnose() if each["subject"] == "sparse CPU kernels")
    assert ("slower than dense" in kernels["enables"]) == slower
    assert (f"on the {path} path" in kernels["enables"]) != slower
