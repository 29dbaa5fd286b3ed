"""Models that classify images: families, masks against a slow loop, and what is refused."""

from functools import partial

import numpy
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import cross_entropy

from gblm_compress.errors import DataError, ModelError
from gblm_compress.exporters import export
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.measure.inspection import inspect
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import (
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
    ResourceSettings,
)
from gblm_compress.tasks import TASKS, task_of
from gblm_compress.tasks.image_classification import Picture, Pictures, labels_of

TASK = TASKS["image-classification"]
CLASSES, SAMPLES = 6, 5
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_NAMES = {"id2label": {number: f"class {number}" for number in range(CLASSES)}}
FAMILIES = {
    "vit": lambda: transformers.ViTConfig(**_SIZES, **_NAMES, intermediate_size=64),
    "deit": lambda: transformers.DeiTConfig(**_SIZES, **_NAMES, intermediate_size=64),
    "dinov2": lambda: transformers.Dinov2Config(**_SIZES, **_NAMES, mlp_ratio=2),
    "beit": lambda: transformers.BeitConfig(**_SIZES, **_NAMES, intermediate_size=64, use_relative_position_bias=True),
    "swin": lambda: transformers.SwinConfig(
        **_NAMES, image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, mlp_ratio=2
    ),
}


@pytest.fixture
def model(tmp_path):
    """model("vit"): a tiny model of that family on disk, with its image processor."""

    def make(family: str) -> ModelSource:
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.architectures = ["DeiTForImageClassification"] if family == "deit" else None
        made = transformers.AutoModelForImageClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3)
        made.save_pretrained(tmp_path / family)
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(tmp_path / family)
        return ModelSource(family, tmp_path / family)

    return make


@pytest.fixture
def pictures(tmp_path):
    """Random images in folders of classes, of another size than the models take, some grey."""
    generator = numpy.random.default_rng(0)
    for number in range(CLASSES):
        (tmp_path / "images" / f"class {number}").mkdir(parents=True)
        for place, shape in enumerate(((20, 24, 3), (16, 16))):
            made = Image.fromarray(generator.integers(0, 255, shape, dtype=numpy.uint8))
            made.save(tmp_path / "images" / f"class {number}" / f"{place}.png")
    return tmp_path / "images"


def drawn(source: ModelSource, dataset) -> list:
    processor, config = load_processor(source), load_model(source).config
    return TASK.calibration(processor, config, str(dataset), SAMPLES, 2, 0)


def slow_masks(model, samples, labels, as_one: bool = False) -> dict[str, torch.Tensor]:
    """Masks of gblm at 50 % per row, alpha 1: forward passes of the whole model over one image at a time.

    Args:
        as_one: whether all layers are measured in the dense model.
    """
    per_block = prunable_layers(model)
    layers = {name: layer for block in per_block for name, layer in block.items()}
    per_block = [layers] if as_one else per_block
    gradients = dict.fromkeys(layers, 0.0)
    for sample, label in zip(samples, labels, strict=True):
        loss = cross_entropy(model(pixel_values=sample["pixel_values"]).logits, label)
        for name, gradient in zip(
            layers, torch.autograd.grad(loss, [layer.weight for layer in layers.values()]), strict=True
        ):
            gradients[name] = gradients[name] + gradient.abs()
    masks = {}
    for block in per_block:
        squares = dict.fromkeys(block, 0.0)

        def add(name, squares, _, args) -> None:
            squares[name] = squares[name] + args[0].detach().flatten(0, -2).square().sum(0)

        hooks = [layer.register_forward_pre_hook(partial(add, name, squares)) for name, layer in block.items()]
        for sample in samples:
            model(pixel_values=sample["pixel_values"])
        for hook in hooks:
            hook.remove()
        for name, layer in block.items():
            score = layer.weight.detach().abs() * ((squares[name] / len(samples)).sqrt() + gradients[name])
            masks[name] = score > score.sort(1).values[:, score.shape[1] // 2 - 1 : score.shape[1] // 2]
        with torch.no_grad():
            for name, layer in block.items():
                layer.weight *= masks[name]
    return masks


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_masks_are_those_of_a_loop_over_images(model, pictures, tmp_path, progress, labelled, offload) -> None:
    source = model("vit")
    if not labelled:  # a folder without classes
        (tmp_path / "flat").mkdir()
        for number, path in enumerate(sorted(pictures.rglob("*.png"))):
            path.rename(tmp_path / "flat" / f"{number:02}.png")
        pictures = tmp_path / "flat"
    prune(
        source,
        tmp_path / "out",
        PruneSettings(method="gblm", alpha=1.0, update="none"),
        CalibrationSettings(dataset=str(pictures), samples=SAMPLES),
        resources=ResourceSettings(offload=offload),
        device="cpu",
        progress=progress,
    )
    dense, samples = load_model(source), drawn(source, pictures)
    assert all(("labels" in sample) == labelled for sample in samples)
    labels = [sample.get("labels") for sample in samples]
    if not labelled:  # by hand: the first class at which the sum of likelihoods passes a number that the sample has
        labels = []
        for sample in samples:
            number = float(torch.rand(1, generator=torch.Generator().manual_seed(int(sample["draw"]))))
            likelihoods = dense(pixel_values=sample["pixel_values"]).logits.detach().softmax(-1)[0].tolist()
            sums = [sum(likelihoods[: place + 1]) for place in range(CLASSES)]
            labels.append(torch.tensor([next(place for place, total in enumerate(sums) if total >= number)]))
    expected = slow_masks(dense, samples, labels)
    pruned = load_model(ModelSource("out", tmp_path / "out"))
    different = sum(int(((pruned.get_submodule(n).weight != 0) != mask).sum()) for n, mask in expected.items())
    assert len(expected) == 12 and different <= 1e-3 * sum(mask.numel() for mask in expected.values())
    others = slow_masks(load_model(source), samples, [(label + 1) % CLASSES for label in labels])
    assert sum(int((mask != others[name]).sum()) for name, mask in expected.items()) > 1e-2 * 12 * 32 * 32


@pytest.mark.parametrize(("method", "fit"), [("wanda", "none"), ("obs", "fast"), ("gblm", "balanced")])
def test_methods_and_fits_go_through(model, pictures, tmp_path, progress, method, fit) -> None:
    settings = PruneSettings(method=method, pattern="2:4", fit=fit)
    calibration = CalibrationSettings(dataset=str(pictures), samples=SAMPLES)
    prune(model("vit"), tmp_path / "p", settings, calibration, device="cpu", progress=progress)
    found = inspect(ModelSource("p", tmp_path / "p"), None, progress)
    assert all("2:4" in layer.patterns for layer in found.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_steps(model, pictures, tmp_path, progress, family) -> None:
    """By the method and fit that call its blocks in every way: for gradients, statistics, targets and distillation."""
    source = model(family)
    calibration = CalibrationSettings(dataset=str(pictures), samples=SAMPLES)
    settings = PruneSettings(method="gblm", pattern="2:4", fit="best")
    prune(source, tmp_path / "p", settings, calibration, device="cpu", progress=progress)
    pruned = ModelSource("p", tmp_path / "p")
    assert (pruned.folder / "preprocessor_config.json").exists()
    found = inspect(pruned, None, progress)
    assert all("2:4" in layer.patterns for layer in found.layers) and {kind.layers for kind in found.kinds} <= {1, 2}
    done = evaluate(pruned, EvaluateSettings(dataset=str(pictures)), baseline=source, device="cpu", progress=progress)
    assert list(done.metrics) == ["top1_accuracy", "top5_accuracy", "cross_entropy"] and done.windows == 2 * CLASSES
    assert done.fidelity["top1_agreement"] <= 1 and done.fidelity["mean_kl"] > 0
    packed = export(pruned, tmp_path / "packed", ExportSettings(format="bitmask"), force=False, progress=progress)
    assert packed.checks["packed_layers"] == len(found.layers)
    export(pruned, tmp_path / "onnx", ExportSettings(format="onnx"), force=False, progress=progress)
    # As optimum's ORTModelForImageClassification runs it: `pixel_values` of any number of images, `logits`.
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    pixels = torch.randn(3, 3, 16, 16)
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    expected = load_model(pruned)(pixel_values=pixels).logits.detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_metrics_are_those_of_a_count(model, pictures, progress) -> None:
    source = model("vit")
    done = evaluate(source, EvaluateSettings(dataset=str(pictures)), device="cpu", progress=progress)
    dense, processor, first, five = load_model(source), load_processor(source), 0, 0
    for number in range(CLASSES):
        for path in sorted((pictures / f"class {number}").iterdir()):
            pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
            order = dense(pixel_values=pixels).logits[0].argsort(descending=True).tolist()
            first, five = first + (order[0] == number), five + (number in order[:5])
    count = 2 * CLASSES
    assert done.metrics["top1_accuracy"].value == pytest.approx(first / count)
    assert done.metrics["top5_accuracy"].value == pytest.approx(five / count)
    share = first / count
    assert done.metrics["top1_accuracy"].error == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)


def test_blocks_that_change_the_size_of_states_are_measured_as_one(model, pictures, tmp_path, progress) -> None:
    source = model("swin")
    calibration = CalibrationSettings(dataset=str(pictures), samples=SAMPLES)
    settings = PruneSettings(method="gblm", alpha=1.0, update="none")
    prune(source, tmp_path / "out", settings, calibration, device="cpu", progress=progress)
    dense, samples = load_model(source), drawn(source, pictures)
    expected = slow_masks(dense, samples, [sample["labels"] for sample in samples], as_one=True)
    pruned = load_model(ModelSource("out", tmp_path / "out"))
    different = sum(int(((pruned.get_submodule(n).weight != 0) != mask).sum()) for n, mask in expected.items())
    assert len(expected) == 13 and different <= 1e-3 * sum(mask.numel() for mask in expected.values())
    with pytest.raises(ModelError, match=r"block 0 makes hidden states \[1, 16, 32\] of \[1, 64, 16\]; .*--no-offload"):
        prune(
            source, tmp_path / "p", settings, calibration,
            resources=ResourceSettings(offload=True), device="cpu", progress=progress,
        )  # fmt: skip


def test_a_model_of_a_shared_config_has_its_task() -> None:
    assert task_of(transformers.DeiTForImageClassification) is TASK
    assert task_of(transformers.DeiTForImageClassificationWithTeacher) is TASK


def made(*labels, classes=()) -> Pictures:
    return Pictures([Picture(f"image {n}", label, lambda: None) for n, label in enumerate(labels)], classes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (made(None, None), []),
        (made(3, 0), [3, 0]),
        (made("Class 2", "class 5", classes=("class 5", "Class 2")), [2, 5]),
        (made("4", "1", classes=("1", "4")), [4, 1]),
        (made("n02", "n01", classes=tuple(f"n0{n}" for n in range(CLASSES))), [2, 1]),
    ],
)
def test_labels_are_numbers_or_names(given, expected) -> None:
    assert labels_of(given, FAMILIES["vit"]()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (made(6), "image 0: the label 6 is none of the model's 6; give a number from 0 to 5, or a name: class 0, "),
        (made(-1), "the label -1 is none"),
        (made("cat", classes=("cat", "dog")), "the label 'cat' is none"),
        (made(1, None), "image 1 has no label, and others have one"),
    ],
)
def test_labels_outside_the_models_are_refused(given, message) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(given, FAMILIES["vit"]())


def test_a_processor_that_does_not_fit_is_refused(model, pictures) -> None:
    source = model("vit")
    transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(source.folder)
    with pytest.raises(ModelError, match=r"3 × 24 × 24 numbers of image '.*png', and the model takes 3 × 16 × 16"):
        drawn(source, pictures)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5]).save_pretrained(source.folder)
    with pytest.raises(ModelError, match="the image processor does not take image '.*png' "):
        drawn(source, pictures)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./vit", "'./vit': the folder holds no image; give a folder with a sub-folder of images for each class"),
        ("./gone", "'./gone' is not there; give a folder with a sub-folder of images for each class"),
        ("./vit/config.json", "is a file of another kind; give a folder with a sub-folder of images for each class"),
    ],
)
def test_a_user_is_told_of_images(program, model, dataset, message) -> None:
    model("vit")
    for command in (("evaluate", "./vit", "--dataset"), ("prune", "./vit", "-o", "x", "--calibration")):
        done = program(*command, dataset)
        assert done.code == 3 and message in done.stderr and ".txt" not in done.stderr, done.stderr


def test_too_few_images_are_refused(model, pictures) -> None:
    source = model("vit")
    with pytest.raises(DataError, match="has 12 images, and 13 are asked for; give fewer samples"):
        TASK.calibration(load_processor(source), load_model(source).config, str(pictures), 13, 2, 0)


def test_a_limit_draws_from_all_classes(model, pictures) -> None:
    source = model("vit")
    found = TASK.evaluation(load_processor(source), load_model(source).config, str(pictures), 2, 6)
    assert len(found) == 6 and len({int(sample["labels"]) for sample in found}) > 3
