"""Tasks added from outside: their masks are those of a slow loop that never sees padding."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, pad
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2DoubleHeadsModel, LlamaForCausalLM

from gblm_compress.calibration.block_statistics import gram_matrices, regional_norms
from gblm_compress.calibration.blocks import activation_norms
from gblm_compress.calibration.hidden_states import StatePool
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.exporters import export
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.loading import config_of, load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer, tiny_model
from gblm_compress.pruning.in_memory import prune_
from gblm_compress.pruning.run_folder import RunFolder
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import (
    CalibrationSettings,
    EvaluateSettings,
    ExportSettings,
    PruneSettings,
    ResourceSettings,
)
from gblm_compress.tasks import TASKS, task_of
from gblm_compress.tasks.causal_lm import CausalLM
from gblm_compress.tasks.metrics import mean_metric
from gblm_compress.tasks.task import Sample, Task, fingerprint
from gblm_compress.tasks.text import load_text, tokenize, vocabulary_of
from gblm_compress.training.distillation import distil_, predictions
from tests.conftest import CAUSAL_LM, replay, samples
from tests.tasks import families

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-task.md"
SAMPLES, LENGTH = 5, 24


class Norms(Task):
    """Windows of several lengths, padded; the loss is the norm of all predictions."""

    help = "an encoder"
    auto_class = "AutoModel"
    output = "last_hidden_state"

    def calibration(self, processor, config, dataset, samples, length, seed):
        ids = tokenize(processor, vocabulary_of(config), load_text(dataset, "calibration"))
        generator, found = random.Random(seed), []
        for _ in range(samples):
            start, tokens = generator.randrange(len(ids) - length), generator.randint(length // 2, length)
            mask = (torch.arange(length) < tokens).long()
            window = ids[start : start + length] * mask
            found.append({"input_ids": window.unsqueeze(0), "attention_mask": mask.unsqueeze(0)})
        return found

    def loss(self, judged, sample):
        return judged.norm()

    def evaluation(self, processor, config, dataset, length, limit):
        return self.calibration(processor, config, dataset, limit or 64, length, seed=1)

    def metrics(self, measured):
        return {"norm": mean_metric(measured)}

    def fidelity(self, reference, judged):
        return {"cosine": float(torch.cosine_similarity(reference, judged).mean())}


@pytest.fixture
def encoder(tmp_path, monkeypatch) -> ModelSource:
    """A tiny encoder on disk, whose task is `Norms`."""
    monkeypatch.setitem(TASKS, "embedding", Norms())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
            elif name.endswith("LayerNorm.weight"):  # else all tokens have one norm, and the loss no gradient
                parameter.uniform_(0, 2)
    model.save_pretrained(tmp_path / "encoder")
    byte_tokenizer().save_pretrained(tmp_path / "encoder")
    return ModelSource("encoder", tmp_path / "encoder")


def drawn(source: ModelSource, prose: Path) -> list[Sample]:
    size = SAMPLES, LENGTH, 0
    found = TASKS["embedding"].calibration(load_processor(source), config_of(source), str(prose), *size)
    assert len({int(sample["attention_mask"].sum()) for sample in found}) > 2  # lengths differ
    return found


def counted_files(monkeypatch) -> list[Path]:
    """The files of hidden states from here on."""
    original, files = StatePool.new_file, []

    def new_file(pool) -> Path:
        files.append(original(pool))
        return files[-1]

    monkeypatch.setattr(StatePool, "new_file", new_file)
    return files


def inputs_of(model, layers, ids) -> dict[str, torch.Tensor]:
    """What each layer gets in a forward pass of the whole model, [tokens, in_features]."""
    found = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].detach().flatten(0, -2)})
        )
        for name, layer in layers.items()
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def without_padding(found) -> list[torch.Tensor]:
    return [sample["input_ids"][:, : int(sample["attention_mask"].sum())] for sample in found]


def slow_masks(
    model,
    texts: list[torch.Tensor],
    alpha: float,
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = lambda model, ids: model(ids).last_hidden_state.norm(),
) -> dict[str, torch.Tensor]:
    """Masks of gblm at 50 % per row: whole forward passes over one sample at a time, with no padding."""
    per_block = prunable_layers(model)
    layers = {name: layer for block in per_block for name, layer in block.items()}
    gradients = dict.fromkeys(layers, 0.0)
    for ids in texts:
        found = torch.autograd.grad(loss(model, ids), [layer.weight for layer in layers.values()])
        for name, gradient in zip(layers, found, strict=True):
            gradients[name] = gradients[name] + gradient.abs()
    masks = {}
    for block in per_block:
        squares = dict.fromkeys(block, 0.0)
        for ids in texts:
            for name, x in inputs_of(model, block, ids).items():
                squares[name] = squares[name] + x.square().sum(0)
        for name, layer in block.items():
            score = layer.weight.detach().abs() * ((squares[name] / len(texts)).sqrt() + alpha * gradients[name])
            masks[name] = score > score.sort(1).values[:, score.shape[1] // 2 - 1 : score.shape[1] // 2]
        with torch.no_grad():
            for name, layer in block.items():
                layer.weight *= masks[name]
    return masks


@pytest.mark.parametrize(("offload", "memory"), [(False, None), (True, 1)])
def test_masks_are_those_of_a_loop_that_sees_no_padding(
    encoder, tmp_path, prose, progress, monkeypatch, offload, memory
) -> None:
    text = CalibrationSettings(dataset=str(prose), samples=SAMPLES, sequence_length=LENGTH)
    resources = ResourceSettings.model_construct(offload=offload, memory=memory)
    settings = PruneSettings(method="gblm", alpha=1.0, update="none")
    files = counted_files(monkeypatch)
    prune(encoder, tmp_path / "out", settings, text, resources=resources, device="cpu", progress=progress)
    assert bool(files) == offload
    pruned = load_model(ModelSource("out", tmp_path / "out"))
    assert type(pruned) is BertModel
    expected = slow_masks(load_model(encoder), without_padding(drawn(encoder, prose)), alpha=1.0)
    different = sum(int(((pruned.get_submodule(n).weight != 0) != mask).sum()) for n, mask in expected.items())
    assert len(expected) == 12 and different <= 1e-3 * sum(mask.numel() for mask in expected.values())
    # It would not pass by chance: gradients and what padding adds turn far more of the mask.
    without_gradients = slow_masks(load_model(encoder), without_padding(drawn(encoder, prose)), alpha=0.0)
    total = sum(mask.numel() for mask in expected.values())
    assert sum(int((mask != without_gradients[name]).sum()) for name, mask in expected.items()) > 1e-2 * total
    full = [{**sample, "attention_mask": torch.ones_like(sample["attention_mask"])} for sample in drawn(encoder, prose)]
    model = load_model(encoder)
    prune_(model, full, settings, progress)
    padded = sum(int(((model.get_submodule(n).weight != 0) != mask).sum()) for n, mask in expected.items())
    assert padded > 1e-2 * total


def test_statistics_of_a_block_leave_padding_out(encoder, prose) -> None:
    found = drawn(encoder, prose)
    model = load_model(encoder)
    layers = prunable_layers(model)[0]
    block = replay(model, found, TASKS["embedding"]).block(0)
    texts = without_padding(found)
    grams, squares = (dict.fromkeys(layers, 0.0) for _ in range(2))
    for ids in texts:
        for name, x in inputs_of(model, layers, ids).items():
            grams[name] = grams[name] + x.T @ x
        outputs = []
        hook = model.encoder.layer[0].register_forward_hook(
            lambda _, args, output, outputs=outputs: outputs.append(output)
        )
        model(input_ids=ids)
        hook.remove()
        gradients = torch.autograd.grad(outputs[0].norm(), [layer.weight for layer in layers.values()])
        for name, gradient in zip(layers, gradients, strict=True):
            squares[name] = squares[name] + gradient.square()
    measured = gram_matrices(block, layers), activation_norms(block, layers), regional_norms(block, layers)
    for name in layers:
        gram, norm, regional = (of_all[name] for of_all in measured)
        torch.testing.assert_close(gram, grams[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm, (grams[name].diagonal() / SAMPLES).sqrt(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(regional, (squares[name] / SAMPLES).sqrt(), rtol=1e-3, atol=1e-4)
    assert block.tokens == sum(ids.shape[1] for ids in texts) / SAMPLES


def test_an_interrupted_run_of_padded_samples_goes_on(encoder, tmp_path, prose, progress, monkeypatch) -> None:
    text = CalibrationSettings(dataset=str(prose), samples=SAMPLES, sequence_length=LENGTH)
    resources, settings = (
        ResourceSettings.model_construct(offload=True, memory=1),
        PruneSettings(alpha=1.0, update="none"),
    )

    def pruned(name: str, resume: bool) -> bytes:
        prune(
            encoder, tmp_path / name, settings, text,
            resources=resources, resume=resume, device="cpu", progress=progress,
        )  # fmt: skip
        return (tmp_path / name / "model.safetensors").read_bytes()

    finish = RunFolder.finish

    def interrupted(run, block, *rest) -> None:
        if block == 1:
            raise KeyboardInterrupt
        finish(run, block, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish", interrupted)
        pruned("out", resume=False)
    assert pruned("out", resume=True) == pruned("whole", resume=False)


class PaddedLM(CausalLM):
    """Next tokens where `attention_mask` ends before the sample does."""

    def judged(self, prediction, sample):
        return prediction[0, : int(sample["attention_mask"].sum()) - 1]

    def loss(self, judged, sample):
        return cross_entropy(judged, sample["input_ids"][0, 1 : len(judged) + 1])

    loss_gradient = Task.loss_gradient


def padded_samples(count: int, length: int) -> list[Sample]:
    """`samples`, each with eight tokens of padding behind it."""
    mask = (torch.arange(length + 8) < length).long().unsqueeze(0)
    return [
        {"input_ids": pad(sample["input_ids"], (0, 8), value=7), "attention_mask": mask}
        for sample in samples(count, length)
    ]


@pytest.mark.parametrize(
    "settings",
    [{"alpha_scale": "normalised"}, {"method": "obs"}, {"update": "reconstruct"}, {"distillation_epochs": 1}],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_padded_or_not_a_decoder_becomes_the_same(settings, progress, monkeypatch) -> None:
    cut, padded = samples(8, 16), padded_samples(8, 16)
    unmasked = [{**sample, "attention_mask": torch.ones(1, 24, dtype=torch.int64)} for sample in padded]
    models = []
    for given in (cut, padded, unmasked):
        models.append(tiny_model("llama"))
        with monkeypatch.context() as patch:
            if given is not cut:
                patch.setitem(TASKS, "causal-lm", PaddedLM())
            prune_(models[-1], given, PruneSettings(pattern="2:4", **{"update": "none"} | settings), progress)

    def distance(model) -> float:
        pairs = zip(models[0].parameters(), model.parameters(), strict=True)
        return sum(float((one - other).detach().square().sum()) for one, other in pairs) ** 0.5

    assert distance(models[1]) < 0.05 * distance(models[2])


def test_the_loss_of_distillation_leaves_padding_out(progress) -> None:
    dense, losses = tiny_model("llama"), []
    for task, given in ((CAUSAL_LM, samples(8, 16)), (PaddedLM(), padded_samples(8, 16))):
        pruned = tiny_model("llama")
        prune_(pruned, [], PruneSettings(method="magnitude", pattern="2:4", update="none"), progress)
        layers = {name: layer for block in prunable_layers(pruned) for name, layer in block.items()}
        teacher = predictions(dense, task, given, progress)
        fitted, _ = distil_(
            pruned, layers, task, given, teacher, epochs=1, rate=1e-3, compute="float32", progress=progress
        )
        losses.append(fitted.before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 1e-3


def test_experts_that_read_rows_of_their_own_choice_refuse_padding(encoder, prose) -> None:
    model = load_model(encoder)
    layer = model.encoder.layer[1].intermediate.dense
    layer.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
    model.encoder.layer[1].output.register_forward_pre_hook(lambda _, args: (args[0], args[1][:, 1:]))
    states = replay(model, drawn(encoder, prose), TASKS["embedding"])
    states.advance(0)
    with pytest.raises(ModelError, match=r"intermediate.dense: the layer reads 23 rows of a sample of 24 tokens"):
        activation_norms(states.block(1), prunable_layers(model)[1])


def test_an_encoder_is_packed_and_has_no_export_to_onnx(encoder, tmp_path, prose, progress) -> None:
    text = CalibrationSettings(dataset=str(prose), samples=SAMPLES, sequence_length=LENGTH)
    prune(
        encoder, tmp_path / "pruned", PruneSettings(pattern="2:4", update="none"), text, device="cpu", progress=progress
    )
    pruned = ModelSource("pruned", tmp_path / "pruned")
    assert "`AutoModel.from_pretrained` loads" in (pruned.folder / "README.md").read_text()
    done = export(pruned, tmp_path / "packed", ExportSettings(format="bitmask"), force=False, progress=progress)
    assert done.checks["packed_layers"] == 12 and done.checks["logits_relative_difference"] < 1e-4
    with pytest.raises(UsageError, match="an encoder cannot be exported to ONNX"):
        export(pruned, tmp_path / "onnx", ExportSettings(format="onnx"), force=False, progress=progress)


def test_an_encoder_is_judged_by_the_metrics_of_its_task(encoder, tmp_path, prose, progress) -> None:
    pruned = ModelSource("pruned", tmp_path / "pruned")
    prune(
        encoder,
        pruned.folder,
        PruneSettings(method="magnitude", fit="none"),
        CalibrationSettings(),
        device="cpu",
        progress=progress,
    )
    settings = EvaluateSettings(dataset=str(prose), sequence_length=LENGTH, max_windows=3)
    found = evaluate(pruned, settings, baseline=encoder, device="cpu", progress=progress)
    dense, other, norms, cosines = load_model(encoder), load_model(pruned), [], []
    for ids in without_padding(TASKS["embedding"].evaluation(*_tokenizer_and_config(encoder), str(prose), LENGTH, 3)):
        one, two = (model(input_ids=ids).last_hidden_state[0].detach().double() for model in (dense, other))
        norms.append(float(two.norm()))
        cosines.append(float(((one * two).sum(1) / one.norm(dim=1) / two.norm(dim=1)).mean()))
    assert found.metrics["norm"].value == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert found.fidelity["cosine"] == pytest.approx(sum(cosines) / 3, rel=1e-4) and found.fidelity["cosine"] < 0.999
    plain = found.as_dict()
    assert plain["metrics"] == ["norm"] and plain["baseline_norm"] == found.baseline["norm"].value


def _tokenizer_and_config(source: ModelSource):
    return load_processor(source), config_of(source)


def test_the_task_of_the_page_prunes(monkeypatch, prose, progress) -> None:
    monkeypatch.setitem(TASKS, "token-classification", None)  # so that the page's line is undone at the end
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, {})
    model = families.encoder("bert", "AutoModelForTokenClassification")
    task = task_of(type(model))
    found = task.calibration(families.tokenizer(), model.config, str(prose), 4, LENGTH, 0)
    layers = prune_(model, found, PruneSettings(fit="best"), progress)
    assert len(layers) == 12 and task is TASKS["token-classification"]


def test_a_class_tells_its_task() -> None:
    class Own(LlamaForCausalLM):
        pass

    assert task_of(LlamaForCausalLM) is task_of(Own) is task_of(torch.nn.Linear) is CAUSAL_LM
    assert task_of(transformers.Gemma3ForConditionalGeneration) is CAUSAL_LM  # its other parts stay as they are
    assert task_of(BertModel) is TASKS["embedding"]
    assert task_of(transformers.BertForSequenceClassification) is TASKS["classification"]
    assert task_of(transformers.DeiTForImageClassification) is TASKS["image-classification"]
    for other in (BertForMaskedLM, GPT2DoubleHeadsModel):
        with pytest.raises(ModelError, match=f"{other.__name__} is not supported; a causal language model or"):
            task_of(other)


def test_the_registry_loads_no_torch() -> None:
    code = "import sys, gblm_compress.tasks; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_samples_on_another_device_have_the_same_fingerprint() -> None:
    class Elsewhere:
        """As a tensor on a GPU: only its copy has numbers."""

        def cpu(self) -> torch.Tensor:
            return torch.arange(3)

    assert fingerprint([{"input_ids": Elsewhere()}]) == fingerprint([{"input_ids": torch.arange(3)}])
