"""Charts as pictures."""

import sys

import pytest
from PIL import Image

from gblm_compress.errors import MissingDependencyError, OutputError
from gblm_compress.runs import charts, images
from tests.runs.reports import report


def test_every_chart_becomes_a_picture_with_something_on_it(tmp_path) -> None:
    drawn = charts.of(report())
    images.write(drawn, tmp_path / "charts")
    for chart in drawn:
        with Image.open(tmp_path / "charts" / f"{chart.name}.png") as picture:
            assert picture.width >= images.WIDTH * images.SCALE
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_limit_on_memory_does_not_end_the_drawing() -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such limit")
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    images.script.cache_clear()
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, before[1]))
    try:
        assert "vegaEmbed" in images.script()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_without_the_drawing_program_the_message_says_what_to_install(tmp_path, monkeypatch) -> None:
    program = tmp_path / "drawing.py"
    program.write_text("import gone_from_here\n")
    monkeypatch.setattr(images, "PROGRAM", program)
    with pytest.raises(MissingDependencyError, match=r"No module named 'gone_from_here'.*vl-convert-python"):
        images.write(charts.of(report()), tmp_path / "charts")


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "charts").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        images.write(charts.of(report()), tmp_path / "charts")
