"""Models that classify images: families, masks against a slow loop, and what is refused."""

import io
import os
import random
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy
import onnxruntime
import pyarrow
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gblm_compress import tasks
from gblm_compress.errors import DataError, ModelError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.inspection import inspect
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings, ResourceSettings
from gblm_compress.tasks import TASKS, text
from gblm_compress.tasks import image_classification as images
from gblm_compress.tasks.image_classification import Picture, labels_of
from tests.conftest import export, prune
from tests.tasks import families
from tests.tasks.families import table

TASK = TASKS["image-classification"]
CLASSES, SAMPLES = 6, 5
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "mlp_ratio": 2}
FAMILIES = {
    "vit": {**_SIZES, "intermediate_size": 64},
    "deit": {**_SIZES, "intermediate_size": 64, "architectures": ["DeiTForImageClassification"]},
    "dinov2": {**_SIZES, "mlp_ratio": 2},
    "beit": {**_SIZES, "intermediate_size": 64, "use_relative_position_bias": True},
    "swin": {"image_size": 16, **_SWIN},
}


def config_of(family: str):
    names = {number: f"class {number}" for number in range(CLASSES)}
    return CONFIG_MAPPING[family](**FAMILIES[family], id2label=names)


def process(folder: Path, size: int = 16, **options) -> None:
    """Write an image processor into a folder."""
    sizes = {"height": size, "width": size}
    transformers.ViTImageProcessorPil(size=sizes, **options).save_pretrained(folder)


@pytest.fixture
def model(tmp_path):
    """model("vit"): a tiny model of that family on disk, with its image processor."""

    def make(family: str) -> ModelSource:
        families.random_model(config_of(family), TASK.auto_class).save_pretrained(tmp_path / family)
        process(tmp_path / family)
        return ModelSource(family, tmp_path / family)

    return make


@pytest.fixture
def pictures(tmp_path):
    """Random images in folders of classes, of another size than the models take, some grey."""
    generator = numpy.random.default_rng(0)
    for folder in (tmp_path / "images" / f"class {number}" for number in range(CLASSES)):
        folder.mkdir(parents=True)
        for place, shape in enumerate(((20, 24, 3), (16, 16))):
            Image.fromarray(generator.integers(0, 255, shape, dtype=numpy.uint8)).save(folder / f"{place}.png")
    return tmp_path / "images"


def drawn(source: ModelSource, dataset) -> list:
    processor, config = load_processor(source), load_model(source).config
    return TASK.calibration(processor, config, str(dataset), SAMPLES, 2, 0)


def prune_on(pictures: Path, source: ModelSource, folder: Path, offload: bool = False, **settings) -> ModelSource:
    calibration = CalibrationSettings(dataset=str(pictures), samples=SAMPLES)
    resources = ResourceSettings(offload=offload)
    prune(source, folder, PruneSettings(method="gblm", **settings), calibration, resources=resources, device="cpu")
    return ModelSource(folder.name, folder)


@pytest.mark.parametrize("offload", [False, True])
def test_masks_are_those_of_a_loop_over_images(model, pictures, tmp_path, offload) -> None:
    source = model("vit")
    settings = {"alpha": 1.0, "allocation": "uniform", "fit": "none"}
    pruned = load_model(prune_on(pictures, source, tmp_path / "out", offload, **settings))
    samples = drawn(source, pictures)
    inputs = [{"pixel_values": sample["pixel_values"]} for sample in samples]
    losses = [
        lambda model, x=x, y=sample["labels"]: cross_entropy(model(**x).logits, y)
        for x, sample in zip(inputs, samples, strict=True)
    ]
    expected = families.slow_masks(load_model(source), inputs, losses)
    assert len(expected) == 12 and families.share_that_differs(pruned, expected) <= 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_steps(model, pictures, tmp_path, progress, family) -> None:
    """By the method and fit that call its blocks in every way: for gradients, statistics, targets and distillation."""
    source = model(family)
    pruned = prune_on(pictures, source, tmp_path / "p", pattern="2:4", fit="best")
    assert (pruned.folder / "preprocessor_config.json").exists()
    assert "AutoModelForImageClassification.from_pretrained" in (pruned.folder / "README.md").read_text()
    found = inspect(pruned, progress)
    assert all("2:4" in layer.patterns for layer in found.layers) and {kind["layers"] for kind in found.kinds} <= {1, 2}
    done = evaluate(pruned, EvaluateSettings(dataset=str(pictures)), baseline=source, device="cpu", progress=progress)
    assert list(done.metrics) == ["top1_accuracy", "top5_accuracy", "cross_entropy"] and done.windows == 2 * CLASSES
    assert done.fidelity["top1_agreement"] <= 1 and done.fidelity["mean_kl"] > 0
    packed, _ = export(pruned, tmp_path / "packed", format="bitmask")
    assert packed.checks["packed_layers"] == len(found.layers)
    if family == "vit":
        quantised, _ = export(pruned, tmp_path / "int8", format="onnx", quantise="int8")
        assert quantised.checks["layers_checked"] == len(found.layers)
    export(pruned, tmp_path / "onnx", format="onnx")
    # As optimum's ORTModelForImageClassification runs it: `pixel_values` of any number of images, `logits`.
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    pixels = torch.randn(3, 3, 16, 16)
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    expected = load_model(pruned)(pixel_values=pixels).logits.detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_change_the_size_of_states_are_not_pruned_from_disk(model, pictures, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"block 0 makes hidden states \[1, 16, 32\] of \[1, 64, 16\]; .*--memory"):
        prune_on(pictures, model("swin"), tmp_path / "p", offload=True, fit="none")


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ((None, None), (), []),
        ((3, 0), (), [3, 0]),
        (("Class 2", "class 5"), ("class 5", "Class 2"), [2, 5]),
        (("4", "1"), ("1", "4"), [4, 1]),
        (("n02", "n01"), tuple(f"n0{n}" for n in range(CLASSES)), [2, 1]),
        ((-1,), (), "image 0: the label -1 is not one"),
        (("cat",), ("cat", "dog"), "the label 'cat' is not one"),
        ((1, None), (), "image 1 has no label, but other samples have one"),
    ],
)
def test_labels_are_numbers_or_names_of_the_model(labels, classes, expected) -> None:
    given = [Picture(f"image {n}", label, lambda: None) for n, label in enumerate(labels)]
    with pytest.raises(DataError, match=expected) if isinstance(expected, str) else nullcontext():
        assert labels_of(given, classes, config_of("vit")) == expected


def test_a_limit_draws_from_all_classes_and_a_processor_that_does_not_fit_is_refused(model, pictures) -> None:
    source = model("vit")
    processor, config = load_processor(source), config_of("vit")
    found = TASK.evaluation(processor, config, str(pictures), 2, 6)
    assert len(found) == 6 and len({int(sample["labels"]) for sample in found}) > 3
    with pytest.raises(DataError, match="has 12 images, but 13 samples are asked for; give fewer"):
        TASK.calibration(processor, config, str(pictures), 13, 2, 0)
    process(source.folder, 24)
    with pytest.raises(ModelError, match=r"3 × 24 × 24 numbers of image '.*png', but the model takes 3 × 16 × 16"):
        drawn(source, pictures)
    process(source.folder, image_mean=[0.5])
    with pytest.raises(ModelError, match="the image processor fails on image '.*png' "):
        drawn(source, pictures)


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value,) * 3)


def png(value: int) -> bytes:
    content = io.BytesIO()
    picture(value).save(content, "png")
    return content.getvalue()


def read(place: object, role: text.Role = "evaluation", count: int | None = None, seed: int = 0) -> list[Picture]:
    return images.read(str(place), role, count, seed)[0]


def values(found: list[Picture]) -> list[tuple[int, images.Label]]:
    return [(one.read("L").getpixel((0, 0)), one.label) for one in found]


def test_a_folder_has_a_class_for_each_sub_folder_and_may_have_parts(tmp_path) -> None:
    """Two classes of three images, one in capitals and one a level deeper."""
    folder = tmp_path / "data"
    for number, name in enumerate(("cat", "dog")):
        (folder / name / "deep").mkdir(parents=True)
        for value, place in enumerate(("a.png", "b.PNG", "deep/c.bmp")):
            picture(10 * number + value).save(folder / name / place)
    (folder / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    found, classes = images.read(str(folder), "evaluation", None, 0)
    assert classes == ("cat", "dog")
    assert values(found) == [(0, "cat"), (1, "cat"), (2, "cat"), (10, "dog"), (11, "dog"), (12, "dog")]
    chosen = random.Random(5).sample(range(6), 4)
    assert values(read(folder, "calibration", 4, 5)) == [values(found)[index] for index in chosen]
    assert tasks.data_files(str(folder)) == [folder] and tasks.is_here(str(folder))
    assert values(read(folder / "cat" / "deep")) == [(2, None)]
    folder.rename(tmp_path / "train")
    assert len(read(tmp_path, "calibration")) == 6
    with pytest.raises(DataError, match="has no part for evaluation: no folder val or validation"):
        read(tmp_path)


def test_a_parquet_file(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    stored = [{"bytes": png(value), "path": None} for value in range(200)]
    path.write_bytes(table(image=stored, label=list(range(200))))
    assert values(read(path)) == [(value, value) for value in range(200)]
    for count in (9, 2):  # of four batches, some have none
        chosen = sorted(random.Random(1).sample(range(200), count))
        assert values(read(path, "calibration", count, 1)) == [(value, value) for value in chosen]
    path.write_bytes(table(image=stored[:2], label=[False, True]))
    assert [repr(one.label) for one in read(path)] == ["0", "1"]
    path.write_bytes(table(image=[png(3)]))
    assert values(read(path)) == [(3, None)]


def test_a_hub_dataset(monkeypatch) -> None:
    class Rows(list):
        def shuffle(self, seed: int, buffer_size: int) -> "Rows":
            return Rows(reversed(self))

    rows = Rows({"image": picture(value), "label": value} for value in range(5))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: rows)
    assert values(read("owner/name")) == [(value, value) for value in range(5)]
    assert values(read("owner/name", "calibration", 2)) == [(4, 4), (3, 3)]
    assert images.data_files("owner/name:config@split") == []


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        (".", {}, "the folder holds no image; give a folder with a sub-folder"),
        (".", {"train/a.txt": b"", "test/a.png": png(0)}, "no image for calibration: the folder 'train' holds none"),
        (".", {"cat/a.png": png(0), "b.png": png(0)}, "'b.png' lies beside class folders"),
        ("a.parquet", table(img=[png(0)]), "has no column 'image'; it has 'img'"),
        ("a.parquet", table(image=[3]), "row 0: its image is int; give the bytes of an image file"),
        ("a.parquet", table(image=[png(0)], label=[0.5]), "row 0: its label is float; give a whole number or a name"),
        ("a.parquet", table(image=pyarrow.array([], pyarrow.binary())), "holds no image"),
        ("a.parquet", b"PAR1" + bytes(40), "cannot be read"),
        ("a.csv", b"", "is a file of an unsupported kind; give a folder with a sub-folder of images for each class"),
        ("demo", {}, "'demo' is text, but the model takes images"),
        ("./gone", {}, "'./gone' does not exist; give a folder with a sub-folder"),
        ("gone.parquet", {}, "no such file"),
    ],
)
def test_unusable_datasets_are_data_errors(tmp_path, monkeypatch, source, files, message) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items() if isinstance(files, dict) else [(source, files)]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(source, "calibration")


def test_what_no_task_can_read_is_refused_in_words_for_all_of_them(tmp_path) -> None:
    """The model is not known yet: a folder without an image may have been meant for one of texts or of images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").touch()
    for path, message in (("empty", "is a folder"), ("config.json", "is a file of an unsupported kind")):
        with pytest.raises(DataError) as raised:
            tasks.data_files(str(tmp_path / path))
        said = str(raised.value)
        assert said.startswith(f"dataset {str(tmp_path / path)!r} {message}; for a causal language model give a .txt")
        assert all(task.help in said and task.reads in said for task in tasks.TASKS.values())
    for gone in ("gone.parquet", "./gone.txt", "./gone"):
        with pytest.raises(DataError, match=rf"'{gone}': no such file$"):
            tasks.data_files(gone)


@pytest.mark.parametrize("source", ["folder", "parquet", "hub"])
def test_no_image_starts_a_program(tmp_path, monkeypatch, source) -> None:
    """Pillow runs Ghostscript for EPS, whatever the name of the file says; here a script stands for it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": eps, "path": None}]}).cast_column("image", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda **arguments: rows)
    (tmp_path / "a.png").write_bytes(eps)
    (tmp_path / "a.parquet").write_bytes(table(image=[eps]))
    place = {"folder": tmp_path, "parquet": tmp_path / "a.parquet", "hub": "owner/name"}[source]
    with pytest.raises(DataError, match="unknown format|Unable to locate Ghostscript"):
        read(place)[0].read("RGB")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_deep_images_are_data_errors(tmp_path) -> None:
    (tmp_path / "cut.png").write_bytes(png(0)[:45])
    (tmp_path / "words.jpg").write_text("no image")
    Image.fromarray(numpy.full((4, 4), 1000, numpy.uint16)).save(tmp_path / "deep.png")
    messages = "cut.png' cannot be read", "deep.png' has pixels of mode I;16", "words.jpg' .*unknown format"
    for one, message in zip(read(tmp_path), messages, strict=True):
        with pytest.raises(DataError, match=message):
            one.read("RGB")


MODES = [*((mode, ".png") for mode in ("L", "LA", "P", "RGBA")), ("CMYK", ".tif")]


@pytest.mark.parametrize(("mode", "suffix"), [*MODES, *(("RGB", suffix) for suffix in images.SUFFIXES)])
def test_images_of_all_modes_and_formats_are_converted(tmp_path, mode, suffix) -> None:
    picture(200).convert(mode).save(tmp_path / f"a{suffix}")
    (one,) = read(tmp_path)
    assert one.read("RGB").mode == "RGB" and one.read("L").mode == "L"
    assert abs(one.read("RGB").getpixel((1, 1))[0] - 200) <= (5 if mode == "P" else 1)
