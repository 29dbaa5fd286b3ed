"""The wheel, as a user has it: built, installed into an environment of its own, and run there."""

import json
import re
import shutil
import sys
import sysconfig
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import gblm_compress
from tests.scripts import ROOT, run

SOURCES = ("gblm_compress", "cli", "exporters", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")
LIBRARY = f"gblm_compress/kernels/_bitmask{EXTENSION_SUFFIXES[-1]}"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def _done(*command: str | Path, cwd: Path, **more: str) -> str:
    return run(*command, folder=cwd, PYTHONPATH="", HF_HUB_OFFLINE="1", **more).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as earlier builds leave files beside the sources that would be packed too."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    _done(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", ".", cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """The folder of the programs of an environment with the wheel. Other packages are those of this environment."""
    home = tmp_path_factory.mktemp("environment")
    _done(sys.executable, "-m", "venv", "--without-pip", ".", cwd=home)
    _done(*PIP, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # Only the folder is added: what links an editable install in it is not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folder = f"gblm_compress-{gblm_compress.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"gblm_compress", folder}
    sources = {
        f"gblm_compress/{path.relative_to(ROOT / 'gblm_compress')}"
        for pattern in ("*.py", "*/*.py", "*/*.yaml", "runs/page_files/*", "py.typed")
        for path in (ROOT / "gblm_compress").glob(pattern)
    }
    missing = {name for name in names if name.startswith("gblm_compress/") and name != LIBRARY} ^ sources
    assert not missing and len(sources) > 100


@needs_compiler
def test_a_wheel_is_for_every_python_and_for_linux_since_2014(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    library = zipfile.ZipFile(wheel).read(LIBRARY)
    assert b"Py_" not in library
    if sys.platform == "linux":  # what `auditwheel` asks of the tag manylinux_2_17
        asked = {tuple(map(int, version.split(b"."))) for version in re.findall(rb"GLIBC_([\d.]+)", library)}
        assert asked and max(asked) <= (2, 17)


def test_the_installed_program_runs_without_a_compiler(wheel: Path, installed: Path, tmp_path: Path) -> None:
    def program(*arguments: str) -> str:
        return _done(installed / "gblm-compress", *arguments, cwd=tmp_path, PATH=str(installed))

    code = "import gblm_compress, importlib.metadata as m; print(gblm_compress.__file__, m.version('gblm-compress'))"
    home, version = _done(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(home).is_relative_to(installed.parent) and version == gblm_compress.__version__
    assert program("--version").split() == [version]
    compiled = LIBRARY in zipfile.ZipFile(wheel).namelist()
    kernels, onnx = ("portable", "onnx-kernels") if compiled else ("not built", "onnx")
    assert re.search(rf"sparse CPU kernels +(!! )?{kernels}", program("doctor"))
    exports = "export=[{format: bitmask}, {format: onnx, kernels: auto}]"
    changes = ("prune.fit=none", exports, "evaluate.max_windows=2", "benchmark=null", "gates={}")
    report = json.loads(program("run", "ci-smoke", *(f"--set={change}" for change in changes), "--quiet", "--json"))
    assert [stage["name"] for stage in report["stages"][:3]] == ["prune", "export bitmask", f"export {onnx}"]
    assert all(row["value"] > 1 for row in report["rows"] if row["figure"] == "perplexity")
    assert {"pruned", "bitmask", onnx} <= {row["artefact"] for row in report["rows"] if row["figure"] == "perplexity"}
    assert (tmp_path / "runs" / "ci-smoke" / "report.html").is_file()
