"""Tasks added from outside: their masks are those of a slow loop that never sees padding."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import pad
from transformers import BertModel

from gblm_compress.calibration.blocks import layer_statistics
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.methods.choices import Need
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.loading import config_of, load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from gblm_compress.tasks import TASKS, same_text, task_of
from gblm_compress.tasks.task import Sample, Task, fingerprint, random_numbers
from gblm_compress.tasks.text import load_text
from tests.calibration.test_blocks import activation_norms
from tests.conftest import CAUSAL_LM, prune, prune_, replay, samples
from tests.scripts import ROOT, blocks
from tests.tasks import families

SAMPLES, LENGTH = 5, 24
TASK = TASKS["embedding"]


@pytest.fixture
def encoder(tmp_path) -> ModelSource:
    """A tiny encoder on disk, with a file that says how to pool."""
    source = families.written(tmp_path / "encoder", "bert")
    (source.folder / "1_Pooling").mkdir()
    (source.folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return source


@pytest.fixture
def text(tmp_path) -> CalibrationSettings:
    """Passages of 12 to 24 bytes, so that most are padded."""
    words = [word for word in load_text("demo", "calibration").split() if len(word) < 4]
    lines = [" ".join(words[7 * i : 7 * i + 5 + i % 3]) for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    return CalibrationSettings(dataset=str(tmp_path / "lines.txt"), samples=SAMPLES, sequence_length=LENGTH)


def drawn(source: ModelSource, text: CalibrationSettings) -> list[Sample]:
    found = TASK.calibration(load_processor(source), config_of(source), *text.datasets, SAMPLES, LENGTH, 0)
    assert len({int(sample["attention_mask"].sum()) for sample in found}) > 2  # lengths differ
    return found


def without_padding(found) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": sample["input_ids"][:, : int(sample["attention_mask"].sum())]} for sample in found]


@pytest.mark.parametrize(("offload", "memory"), [(False, None), (True, 1)])
def test_masks_are_those_of_a_loop_that_sees_no_padding(encoder, tmp_path, text, offload, memory) -> None:
    """gblm of the task as it ships: the gradient of the embedding's product with each sample's direction."""
    resources = ResourceSettings.model_construct(offload=offload, memory=memory)
    settings = PruneSettings(method="gblm", alpha=100.0, allocation="uniform", fit="none")
    prune(encoder, tmp_path / "out", settings, text, resources=resources, device="cpu")
    pruned = load_model(ModelSource("out", tmp_path / "out"))
    assert type(pruned) is BertModel and (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    found = drawn(encoder, text)
    texts = without_padding(found)

    def loss(ids, sample, model):
        pooled = model(**ids).last_hidden_state[0].mean(0)
        return pooled @ random_numbers(sample, 32, normal=True) / pooled.norm()

    losses = [partial(loss, *each) for each in zip(texts, found, strict=True)]
    expected = families.slow_masks(load_model(encoder), texts, losses, 100.0)
    assert len(expected) == 12 and families.share_that_differs(pruned, expected) <= 1e-3


def test_statistics_of_a_block_leave_padding_out(encoder, text) -> None:
    found, model = drawn(encoder, text), load_model(encoder)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):  # else all tokens have one norm, which has no gradient
            parameter.detach().uniform_(0, 2, generator=torch.Generator().manual_seed(0))
    layers, block = prunable_layers(model)[0], replay(model, found, TASK).block(0)
    texts = without_padding(found)
    grams, squares = (dict.fromkeys(layers, 0.0) for _ in range(2))
    for sample in texts:
        for name, x in families.inputs_of(model, layers, sample).items():
            grams[name] = grams[name] + x.T @ x
        output = model(**sample, output_hidden_states=True).hidden_states[1]
        gradients = torch.autograd.grad(output.norm(), [layer.weight for layer in layers.values()])
        for name, gradient in zip(layers, gradients, strict=True):
            squares[name] = squares[name] + gradient.square()
    norms = activation_norms(block, layers)
    for name, measured in layer_statistics(block, layers, {}, Need.GRAM | Need.REGIONAL).items():
        torch.testing.assert_close(measured.gram, grams[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norms[name], (grams[name].diagonal() / SAMPLES).sqrt(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(measured.regional_norm, (squares[name] / SAMPLES).sqrt(), rtol=1e-3, atol=1e-4)
    assert block.tokens == sum(sample["input_ids"].shape[1] for sample in texts) / SAMPLES


@pytest.mark.parametrize("settings", [{"method": "obs"}, {"fit": "balanced"}, {"fit": "best"}], ids=str)
def test_padded_or_not_a_model_becomes_the_same(settings) -> None:
    """Texts of 16 tokens as they are, with eight tokens of padding, and with these eight read as text."""
    models = []
    for length, counted in ((16, 16), (24, 16), (24, 24)):
        mask = (torch.arange(length) < counted).long().unsqueeze(0)
        texts = [pad(sample["input_ids"], (0, length - 16), value=7) for sample in samples(8, 16)]
        models.append(families.encoder("bert"))
        prune_(models[-1], [{"input_ids": ids, "attention_mask": mask} for ids in texts], pattern="2:4", **settings)

    def distance(model) -> float:
        pairs = zip(models[0].parameters(), model.parameters(), strict=True)
        return sum(float((one - other).detach().square().sum()) for one, other in pairs) ** 0.5

    assert distance(models[1]) < 0.05 * distance(models[2])


def test_experts_that_read_rows_of_their_own_choice_refuse_padding(encoder, text) -> None:
    model = load_model(encoder)
    layer = model.encoder.layer[1].intermediate.dense
    layer.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
    model.encoder.layer[1].output.register_forward_pre_hook(lambda _, args: (args[0], args[1][:, 1:]))
    states = replay(model, drawn(encoder, text), TASK)
    states.advance(0)
    with pytest.raises(ModelError, match=r"intermediate.dense: the layer reads 23 rows of a sample of 24 tokens"):
        activation_norms(states.block(1), prunable_layers(model)[1])


def test_a_task_says_what_it_has_not(encoder) -> None:
    methods = {"help": "a bare model", "calibration": None, "loss": lambda self, judged, sample: judged.norm()}
    task = type("Bare", (Task,), methods)()
    for call, arguments, message in (
        (task.training, 5, "training does not support a bare model"),
        (task.evaluation, 5, "evaluation does not support a bare model"),
        (task.timed, 4, "benchmark does not support a bare model"),
        (task.example, 1, "a bare model cannot be exported to ONNX"),
    ):
        with pytest.raises(UsageError, match=message):
            call(*[None] * arguments)
    assert task.metrics([task.measure(torch.ones(4), {})])["loss"].value == 2.0 and task.agreement([], []) == {}


def test_the_task_of_the_page_prunes(monkeypatch, prose) -> None:
    monkeypatch.setitem(TASKS, "token-classification", None)  # so that the page's line is undone at the end
    (code,) = blocks("python", page=ROOT / "docs" / "adding-a-task.md")
    exec(code, {})
    model = families.encoder("bert", "AutoModelForTokenClassification")
    task = task_of(type(model))
    found = task.calibration(families.tokenizer(), model.config, str(prose), 4, LENGTH, 0)
    layers = prune_(model, found, fit="best")
    assert len(layers) == 12 and task is TASKS["token-classification"]


def test_a_class_tells_its_task() -> None:
    own = type("Own", (transformers.LlamaForCausalLM,), {})
    assert task_of(own) is task_of(torch.nn.Linear) is CAUSAL_LM
    for name, task in {
        "LlamaForCausalLM": "causal-lm",
        "Gemma3ForConditionalGeneration": "causal-lm",  # its other parts stay as they are
        "BertModel": "embedding",
        "BertForSequenceClassification": "classification",
        "DeiTForImageClassification": "image-classification",
        "DeiTForImageClassificationWithTeacher": "image-classification",
        **{task.auto_class: name for name, task in TASKS.items()},
    }.items():
        assert task_of(getattr(transformers, name)) is TASKS[task], name
    for name, task in {
        "BertForMaskedLM": "fill-mask",
        "GPT2DoubleHeadsModel": "no task that optimum knows",
        "ParakeetForCTC": "automatic-speech-recognition",
    }.items():
        with pytest.raises(ModelError, match=f"{name} is for {task}; a causal language model or"):
            task_of(getattr(transformers, name))


def test_samples_on_another_device_have_the_same_fingerprint() -> None:
    elsewhere = SimpleNamespace(cpu=lambda: torch.arange(3))  # as on a GPU: only a copy has numbers
    assert fingerprint([{"input_ids": elsewhere}]) == fingerprint([{"input_ids": torch.arange(3)}])


def test_the_same_text_is_told_by_its_name_or_its_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    note = same_text("c4", "c4")
    assert note == same_text("a.txt", str(tmp_path / "a.txt")) == same_text("b.txt", "a.txt,self=2,b.txt") != ""
    others = (
        ("c4", "wikitext2"),
        ("a.txt", "b.txt"),
        ("c4", "self"),
        ("demo", ""),
        ("c4", " , =nan,x=-1"),
        ("c4", "gone.txt"),
    )
    assert [same_text(*pair) for pair in others] == [""] * len(others)
