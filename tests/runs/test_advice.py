"""Advice: sizes are those of the artefacts that are made, times are linear in blocks, the words follow from both."""

import json

import pytest
import torch
import transformers

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters import export
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import byte_tokenizer, tiny_config
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune
from gblm_compress.runs import advice
from gblm_compress.runs.advice import advise
from gblm_compress.runs.predictions import TARGETS, WAYS, Prediction, Way, sentences
from gblm_compress.settings import AdviseSettings, CalibrationSettings, ExportSettings, PruneSettings

SMALL = (
    Way("dense, torch float32", dtype="float32"),
    Way("packed, torch bitmask", True, {"format": "bitmask"}),
    Way("packed, torch bitmask-int8", True, {"format": "bitmask-int8"}),
    Way("no way", True, {"format": "semi-structured"}),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSource:
    """A Llama of six blocks with random weights."""
    folder = tmp_path_factory.mktemp("advice") / "model"
    config = tiny_config("llama")
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSource("model", folder)


def asked(source: ModelSource, **settings) -> advice.Advice:
    pruning = PruneSettings(method="wanda")
    text = CalibrationSettings(dataset="demo", samples=2, sequence_length=64)
    return advise(source, AdviseSettings(**settings), pruning, text, progress=Progress(quiet=True))


def test_sizes_are_those_of_the_whole_models_artefacts(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(advice, "WAYS", SMALL)
    found = asked(model, target="bytes", blocks=3)
    assert found.blocks == 6
    chosen = PruneSettings(method="magnitude", fit="none")
    prune(model, tmp_path / "pruned", chosen, CalibrationSettings(), progress=Progress(quiet=True))
    sizes = {"dense, torch float32": model.bytes_on_disk}
    for format in ("bitmask", "bitmask-int8"):
        result = export(
            ModelSource("pruned", tmp_path / "pruned"), tmp_path / format, ExportSettings(format=format),
            progress=Progress(quiet=True),
        )  # fmt: skip
        sizes[f"packed, torch {format}"] = result.bytes
    predicted = {p.name: p.bytes for p in found.predictions}
    assert predicted.keys() == sizes.keys()
    for name, size in sizes.items():
        assert predicted[name] == pytest.approx(size, rel=0.005), name  # headers of files are not quite linear
    assert [p.bytes for p in found.predictions] == sorted(p.bytes for p in found.predictions)
    assert "2:4" in found.left_out["no way"]
    assert found.pruning_seconds > 0 and found.pruning_disk_bytes > model.bytes_on_disk
    json.dumps(found.as_dict())


def test_what_is_linear_is_carried_on() -> None:
    assert advice._whole(1, 5, 30, 2 + 3 * 1, 2 + 3 * 5) == 2 + 3 * 30
    assert advice._whole(1, 5, 30, 4, 3) == 3  # noise: the whole takes no less than five of its blocks


def prediction(name: str, ms: float, pruned: bool, quantised: bool) -> Prediction:
    return Prediction(name, pruned, 8 if quantised else None, int(1e6 * ms), ms, ms, ms)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((10, 6, 7, 4), "Pruning pays here: both needs 0.67 times the time of quantised"),
        ((10, 6, 7, 5.9), "Just quantise: quantised needs 0.60 times the time of dense. The best with zeros, both,"),
        ((10, 9.5, 9.9, 9.4), "Leave the model as it is: nothing needs clearly less time than quantised; both"),
    ],
)
def test_the_words_follow_from_the_figures(times, said) -> None:
    kinds = {"dense": (False, False), "quantised": (False, True), "pruned": (True, False), "both": (True, True)}
    made = [prediction(name, ms, *kind) for (name, kind), ms in zip(kinds.items(), times, strict=True)]
    assert next(iter(sentences(made, "latency"))).startswith(said)


def test_for_quality_the_least_change_comes_first() -> None:
    assert {way.name: way.bits for way in WAYS if way.bits} == {
        "dense, ONNX int8": 8, "dense, ONNX int4": 4, "packed, torch bitmask-int8": 8,
        "packed, ONNX int8": 8, "packed, ONNX int4": 4,
    }  # fmt: skip
    made = [Prediction(way.name, way.pruned, way.bits, 1, 20.0 - 2 * n, 0, 0) for n, way in enumerate(WAYS)]
    order = [p.name for p in sorted(made, key=TARGETS["quality"])]
    assert order == [
        "dense, ONNX float32", "dense, torch bfloat16", "dense, torch float32", "dense, ONNX int8", "dense, ONNX int4",
        "packed, ONNX float16", "packed, torch bitmask", "packed, ONNX int8", "packed, torch bitmask-int8",
        "packed, ONNX int4",
    ]  # fmt: skip
    said = list(sentences(made, "quality"))
    assert said[0].startswith("Quality is not measured here")
    assert said[1].startswith(
        "dense, ONNX float32 loses least. dense, ONNX int4 loses least of what is clearly faster: "
    )
    alone = list(sentences(made[2:3], "quality"))
    assert alone[1] == "dense, ONNX float32 loses least, and nothing is clearly faster: leave the model as it is."


@pytest.mark.parametrize(
    ("positions", "message"), [(64, "has 64 positions; the length that is timed is 174"), (256, None)]
)
def test_a_model_of_few_positions(tmp_path, positions, message, monkeypatch) -> None:
    monkeypatch.setattr(advice, "WAYS", SMALL[:1])
    config = tiny_config("gpt2")
    config.n_layer, config.n_positions = 3, positions
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    if message is None:
        assert asked(ModelSource("short", tmp_path / "short"), blocks=2).predictions
        return
    with pytest.raises(UsageError, match=message):
        asked(ModelSource("short", tmp_path / "short"))


def test_a_model_of_one_block_is_to_be_measured_itself(tmp_path) -> None:
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "one")
    byte_tokenizer().save_pretrained(tmp_path / "one")
    with pytest.raises(ModelError, match="has one block"):
        asked(ModelSource("one", tmp_path / "one"))
