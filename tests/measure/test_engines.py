import pytest

from gblm_compress.errors import MissingDependencyError
from gblm_compress.measure.runtimes import check_installed


def test_genai_that_is_not_installed_is_named_before_any_work(monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.measure.runtimes.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match="runtime genai: onnxruntime_genai is not installed; .*pip install"
    ):
        check_installed("genai")
    check_installed("torch")
