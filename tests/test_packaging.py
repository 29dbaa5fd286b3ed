"""What ships beside the wheel: a checkout without links, and documentation that is generated from the code."""

import runpy
import shutil
from pathlib import Path

import pytest

from gblm_compress.models.finding import DEMO_INSTALL
from tests.scripts import ROOT, python

GENERATED = runpy.run_path(str(ROOT / "docs" / "reference.py"))["GENERATED"]
TABLES = runpy.run_path(str(ROOT / "docs" / "tables.py"))


def test_a_checkout_without_links_works(tmp_path) -> None:
    """git on Windows writes a link as a file that holds its target."""
    for name in ("cli", "exporters", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "gblm_compress", tmp_path / "gblm_compress", symlinks=True)
    for name in ("cli", "exporters", "recipes"):
        link = tmp_path / "gblm_compress" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"
        link.unlink()
        link.write_text(f"../{name}")
    for arguments in (["--version"], ["validate", "quickstart"]):
        python("-m", "gblm_compress", *arguments, folder=tmp_path, PYTHONPATH="")


@pytest.mark.parametrize("path", GENERATED, ids=str)
def test_generated_documentation_is_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text() == GENERATED[path](), "run: python docs/reference.py"


@pytest.mark.parametrize("page", TABLES["PAGES"], ids=lambda page: page.name)
def test_tables_hold_what_was_measured(page: Path) -> None:
    assert page.read_text() == TABLES["written"](page), "run: python docs/tables.py"


def test_no_table_of_measurements_is_typed() -> None:
    named = {name for page in TABLES["PAGES"] for _, name in TABLES["MARKED"].findall(page.read_text())}
    assert named == set(TABLES["TABLES"])
    pages = (ROOT / "docs" / "results").glob("*.md")
    typed = {page.name for page in pages if "\n|" in TABLES["MARKED"].sub("", page.read_text())}
    assert not typed


def test_the_readme_names_the_version_of_the_demo_package() -> None:
    assert DEMO_INSTALL.rpartition(" ")[2] in (ROOT / "Makefile").read_text()


def test_the_project_names_no_path_of_one_machine() -> None:
    for pattern in ("*.py", "*.md", "*.yaml", "*.toml"):
        for path in ROOT.rglob(pattern):
            if not {".venv", ".venv-vllm"} & set(path.parts) and path.name != Path(__file__).name:
                assert "/work/" not in path.read_text(), path
