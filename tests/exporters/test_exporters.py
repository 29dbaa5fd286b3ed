"""The registry of formats, and an exporter from outside the package: that of docs/adding-an-exporter.md."""

import json
from functools import partial

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from gblm_compress.exporters import decided, dtype_of
from gblm_compress.formats import FORMATS
from gblm_compress.kernels import cpu
from gblm_compress.layouts import LAYOUTS
from gblm_compress.settings import ExportSettings
from tests.scripts import ROOT, blocks, python

OPTIONS = ExportSettings.model_fields.keys() - {"format", "dtype"}
OTHERS = {"graph": "plain", "group": 64, "quantise": "int8"}
COMPANY = {("onnx", "quantise"): ("kernels",), ("onnx", "group"): ("kernels", "quantise")}
"""{(format, option): the options that it needs}."""


def given(format: str, option: str) -> dict[str, object]:
    return {name: OTHERS.get(name, True) for name in (*COMPANY.get((format, option), ()), option)}


@pytest.fixture(scope="module")
def with_half(tmp_path_factory):
    """Run the program with the exporter that the page adds."""
    folder = tmp_path_factory.mktemp("half")
    entry, module = blocks("python", page=ROOT / "docs" / "adding-an-exporter.md")
    (folder / "half.py").write_text(module)
    (folder / "use.py").write_text(
        "import sys\nfrom gblm_compress.formats import FORMATS, Format\n"
        + entry.replace("gblm_compress.exporters.half", "half")
        + "assert 'torch' not in sys.modules\nfrom gblm_compress.cli.app import main\nmain()\n"
    )

    return folder, partial(python, "use.py", folder=folder)


def test_an_exporter_from_outside_writes_verifies_and_is_evaluated(with_half) -> None:
    folder, run = with_half
    (folder / "recipe.yaml").write_text(
        "model: tiny\ncalibration: {dataset: demo, samples: 8, sequence_length: 32}\n"
        "prune: {method: magnitude}\nexport: [{format: half}, {format: half, dtype: bfloat16}]\n"
        "evaluate: {dataset: demo, sequence_length: 32, max_windows: 2}\n"
    )
    report = json.loads(run("run", "recipe.yaml", "-o", "run", "--quiet", "--json").stdout)
    (result,) = (stage["result"] for stage in report["stages"] if stage["name"] == "export half")
    source, half = (load_file(folder / "run" / name / "model.safetensors") for name in ("pruned", "half"))
    assert result["format"] == "half" and result["checks"]["tensors_checked"] >= len(half)
    assert 0.4 < result["bytes"] / result["source_bytes"] < 0.6
    assert all((half[name] == source[name].half()).all() for name in source.keys() | half.keys())
    manifest = json.loads((folder / "run" / "half" / "gblm_manifest.json").read_text())
    assert (manifest["format"], manifest["dtype"]) == ("half", "float16")
    found = {row["artefact"]: row["value"] for row in report["rows"] if row["figure"] == "perplexity"}
    assert found.keys() >= {"pruned", "half", "half-bfloat16"}
    assert found["half"] == pytest.approx(found["pruned"], rel=1e-2)


def test_it_is_told_with_the_others_and_refuses_what_it_does_not_take(with_half) -> None:
    _, run = with_half
    for format, message in (("haff", "did you mean 'half'?"), ("half", "'tiny' is not pruned")):
        assert message in run("export", "tiny", "-o", "x", "--format", format, code=2).stderr
    assert "half: a dense checkpoint in 16 bit" in " ".join(run("export", "--help").stdout.split())


@pytest.mark.parametrize("name", FORMATS)
def test_an_entry_is_all_that_settings_know_of_a_format(name: str, tiny) -> None:
    entry, described = FORMATS[name], ExportSettings.model_json_schema()["properties"]["format"]
    assert described["enum"] == list(FORMATS) and f"{name}: {entry.help}" in described["description"]
    assert set(entry.reads) <= OPTIONS
    for option in OPTIONS:
        if option in entry.reads:
            options = given(name, option)
            parts = [f"{other}-{value}" if other in OTHERS else other for other, value in options.items()]
            assert ExportSettings(format=name, **options).folder_name == "-".join([name, *parts])
        else:
            with pytest.raises(ValidationError, match=f"{option} would do nothing: only format .* reads it"):
                ExportSettings(format=name, **given(name, option))
    assert dtype_of(tiny("llama"), ExportSettings(format=name)) == "float32"
    for dtype in ("float32", "float16", "bfloat16"):
        if dtype in entry.dtypes:
            settings = ExportSettings(format=name, dtype=dtype)
            assert (dtype_of(tiny("llama"), settings), settings.folder_name) == (dtype, f"{name}-{dtype}")
        else:
            with pytest.raises(ValidationError, match=f"{name} does not support {dtype}; give {entry.dtypes[0]}"):
                ExportSettings(format=name, dtype=dtype)


def test_every_option_is_some_formats_and_every_layout_has_a_format() -> None:
    assert {option for entry in FORMATS.values() for option in entry.reads} == OPTIONS
    packing = {entry.layout: name for name, entry in FORMATS.items() if entry.layout}
    assert packing == {name: layout.format for name, layout in LAYOUTS.items()}
    assert {name for name, entry in FORMATS.items() if entry.needs_cuda} == {"semi-structured"}


@pytest.mark.parametrize(("path", "is_slow"), [("avx2", True), ("avx-vnni", True), ("vnni", True), ("avx512", False)])
def test_where_4_bits_save_no_time_a_note_says_so(path, is_slow, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(cpu, "path", lambda dtype: path)
    for settings in ({"format": "bitmask-int4"}, {"format": "onnx", "quantise": "int4", "kernels": True}):
        _, note = decided(ExportSettings(**settings))
        assert bool(note and "4 bits save bytes, not time" in note) == is_slow
    for settings in ({"quantise": "int8", "kernels": True}, {"quantise": "int4"}):
        assert decided(ExportSettings(format="onnx", **settings))[1] is None
