"""The reordering stage: the written model computes the same, and an N:M pattern takes less away, counted slowly."""

import json
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open

import gblm_compress
from gblm_compress.calibration import hidden_states
from gblm_compress.calibration.links import Link
from gblm_compress.errors import GblmError, ModelError, OutputError, UsageError, VerificationError
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.reordering import ReorderResult, reorder
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, PruneSettings, ReorderSettings, ResourceSettings

TEXT = {"samples": 3, "sequence_length": 32}


def tensors(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def reordered(tmp_path, prose, progress):
    def run(source: ModelSource, name: str = "out", offload: bool | None = None, **settings) -> ReorderResult:
        text = CalibrationSettings(dataset=str(prose), **TEXT)
        where = ResourceSettings(offload=offload)
        return reorder(
            source, tmp_path / name, ReorderSettings(**settings), text, resources=where, device="cpu", progress=progress
        )

    return run


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_the_same_is_computed_and_less_is_lost(kind, tiny, reordered, tmp_path, prose) -> None:
    source = tiny(kind)
    result = reordered(source, rounds=8)
    dense, written = loading.load_model(source), loading.load_model(ModelSource("out", tmp_path / "out"))
    task = loading.task_of(source)
    samples = task.calibration(loading.load_processor(source), dense.config, str(prose), 3, 32, 0)
    squares: dict[str, torch.Tensor] = {}
    for name in result.layers:

        def add(module, args, name=name) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).double().square().sum(0)

        written.get_submodule(name).register_forward_pre_hook(add)
    with torch.no_grad():
        for sample in samples:
            own, theirs = (model(**task.arguments(sample)).logits for model in (written, dense))
            assert torch.allclose(own, theirs, atol=1e-5)
    assert 0 <= result.change < 1e-5
    for name, layer in result.layers.items():
        weight = written.get_submodule(name).weight.detach().double()
        weight = weight.T if kind == "gpt2" else weight
        worth = (weight.square() * squares[name]).view(len(weight), -1, 4)
        smaller = worth.sort(-1).values[..., :2].sum() / worth.sum()
        assert layer.after == pytest.approx(float(smaller), abs=1e-5)
        assert layer.after < layer.before
    assert result.after < 0.95 * result.before
    assert result.weights == sum(loading.load_model(source).get_submodule(n).weight.numel() for n in result.layers)


def test_it_is_the_same_on_disk_and_keeps_the_dtype(tiny, reordered, tmp_path, prose, progress) -> None:
    whole, streamed = (reordered(tiny("llama"), str(offload), offload=offload) for offload in (False, True))
    assert whole.layers == streamed.layers
    one, other = (tensors(tmp_path / name) for name in ("False", "True"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    text = CalibrationSettings(dataset=str(prose), **TEXT)
    least = ResourceSettings(memory="1MB")  # nothing is left for hidden states, which go to files
    reorder(tiny("llama"), tmp_path / "least", ReorderSettings(), text, resources=least, progress=progress)
    assert all(torch.equal(one[name], tensor) for name, tensor in tensors(tmp_path / "least").items())
    assert {path.name for path in tmp_path.iterdir()} == {"False", "True", "least", "prose.txt"}
    model, tokenizer = gblm_compress.load(tiny("llama").folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    half = reordered(ModelSource("half", tmp_path / "half"), "out-half")
    stored, before = tensors(tmp_path / "out-half"), tensors(tmp_path / "half")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert half.change < 0.02
    for name, tensor in stored.items():  # no value is another: all of them moved
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values)


def test_what_is_pruned_of_it_recovers_with_the_first_model_as_teacher(tiny, reordered, tmp_path, prose) -> None:
    reordered(tiny("llama"))
    options = {"quiet": True, "device": "cpu"}
    gblm_compress.prune(
        tmp_path / "out", tmp_path / "pruned", method="wanda", pattern="2:4", fit="fast", calibration=prose,
        **TEXT, **options,
    )  # fmt: skip
    training = {"data": [str(prose)], "tokens": 512, "sequence_length": 32, "batch": 4, "rate": 0.01}
    dense, same = tiny("llama").folder, tmp_path / "out"
    result = gblm_compress.recover(tmp_path / "pruned", tmp_path / "recovered", teacher=dense, **training, **options)
    assert result.after < result.before
    other = gblm_compress.recover(tmp_path / "pruned", tmp_path / "again", teacher=same, **training, **options)
    assert other.before == pytest.approx(result.before, rel=1e-4)
    judged = {"max_windows": 2, "sequence_length": 32, "dataset": prose}
    for teacher in (dense, same):
        gblm_compress.evaluate(tmp_path / "recovered", baseline=teacher, **judged, **options)
    for folder in ("pruned", "recovered"):
        manifest = json.loads((tmp_path / folder / "gblm_manifest.json").read_text())
        assert manifest["reordering"]["pattern"] == "2:4"
        assert "| order of channels | chosen for 2:4 |" in (tmp_path / folder / "README.md").read_text()


def test_it_stays_a_dense_model(tiny, reordered, tmp_path, prose) -> None:
    first = reordered(tiny("llama"))
    assert "computes the same" in (tmp_path / "out" / "README.md").read_text()
    options = {"quiet": True, "device": "cpu"}
    again = gblm_compress.reorder(tmp_path / "out", tmp_path / "again", calibration=prose, **TEXT, **options)
    assert again.before == pytest.approx(first.after, abs=1e-4)
    with pytest.raises(ModelError, match="was not made by `gblm-compress prune`"):
        gblm_compress.recover(tmp_path / "out", tmp_path / "recovered", teacher="tiny", data=[str(prose)], **options)
    exported = gblm_compress.export(tmp_path / "out", tmp_path / "onnx", format="onnx", kernels=True, quiet=True)
    assert exported.folder == str(tmp_path / "onnx")


def test_what_cannot_be_reordered_is_refused(tiny, reordered, tmp_path, prose, progress) -> None:
    text = CalibrationSettings(dataset=str(prose), **TEXT)
    prune(
        tiny("llama"), tmp_path / "pruned", PruneSettings(method="magnitude", fit="none", pattern="2:4"), text,
        device="cpu", progress=progress,
    )  # fmt: skip
    with pytest.raises(ModelError, match="pruned already, and another order would break its pattern; give the dense"):
        reordered(ModelSource("pruned", tmp_path / "pruned"))
    with pytest.raises(ModelError, match="no channels that may be reordered for 2:5"):
        reordered(tiny("llama"), pattern="2:5")
    with pytest.raises(ValueError, match="does not depend on the order of channels; give N:M"):
        ReorderSettings(pattern="unstructured")
    with pytest.raises(GblmError) as found:
        gone = CalibrationSettings(dataset="gone.txt", samples=2, sequence_length=600)
        reorder(tiny("llama"), tmp_path / "out", ReorderSettings(), gone, device="gpu", progress=progress)
    for fault in ("gone.txt", "600", "gpu"):
        assert fault in str(found.value)
    with pytest.raises(UsageError, match="exists"):
        reordered(tiny("llama"), "pruned")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_nothing_is_left(tiny, tmp_path, prose, progress, monkeypatch) -> None:
    monkeypatch.setattr(hidden_states, "save_file", Mock(side_effect=OSError(28, "No space left on device")))
    text, least = CalibrationSettings(dataset=str(prose), **TEXT), ResourceSettings(memory="1MB")
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        reorder(tiny("llama"), tmp_path / "new" / "out", ReorderSettings(), text, resources=least, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]


def test_another_function_is_found_out_and_nothing_is_left(tiny, reordered, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gblm_compress.pruning.reordering.find_links", lambda block, layers, heads, m, layer_done: [
        Link(name, (name.replace("down", "up"),)) for name in layers if "down" in name
    ])  # fmt: skip
    with pytest.raises(VerificationError, match="computes something else"):
        reordered(tiny("llama"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == []


def test_command_and_python_give_the_same(program, tiny, tmp_path, prose) -> None:
    options = ["--calibration", str(prose), "--samples", "3", "--sequence-length", "32", "--device", "cpu"]
    done = program("reorder", str(tiny("llama").folder), "-o", "command", *options, "--pattern", "1:4", "--json")
    assert done.code == 0, done.stderr
    shown = json.loads(done.stdout)
    result = gblm_compress.reorder(
        tiny("llama").folder, tmp_path / "python", pattern="1:4", calibration=prose, device="cpu", quiet=True, **TEXT
    )
    one, other = (tensors(tmp_path / name) for name in ("command", "python"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert shown["after"] == pytest.approx(result.after) and shown["pattern"] == "1:4"
    done = program("reorder", str(tiny("llama").folder), "-o", "command", *options)
    assert done.code != 0 and "command" in done.stderr
    table = program("reorder", str(tiny("llama").folder), "-o", "command", *options, "--force")
    assert "2:4 takes away" in table.stdout and "4, with" in table.stdout
