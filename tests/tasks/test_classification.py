from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from gblm_compress.errors import DataError, ModelError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.classification import drawn_label
from tests.conftest import prune
from tests.tasks import families

TASK = TASKS["classification"]
LABELS = {0: "no", 1: "Maybe", 2: "yes"}
AUTO = "AutoModelForSequenceClassification"


@pytest.fixture
def config():
    config = families.encoder("bert", AUTO).config
    config.id2label = LABELS
    return config


def labelled(folder, rows: str, head: str = "text,label") -> str:
    (folder / "rows.csv").write_text(f"{head}\n{rows}\n")
    return str(folder / "rows.csv")


def test_a_label_is_drawn_as_often_as_the_model_expects_it() -> None:
    logits = torch.tensor([[0.3, -1.0, 1.2]])
    found = Counter(int(drawn_label(logits, {"draw": torch.tensor([seed])})) for seed in range(4000))
    shares = torch.tensor([found[i] / 4000 for i in range(3)])
    torch.testing.assert_close(shares, logits.softmax(-1)[0], rtol=0, atol=0.03)
    assert len({int(drawn_label(logits, {"draw": torch.tensor([7])})) for _ in range(3)}) == 1


def test_labels_are_read_by_number_and_name(tmp_path, config) -> None:
    dataset = labelled(tmp_path, "a b c,2\nd e,maybe\nf g h,NO")
    samples = TASK.calibration(families.tokenizer(), config, dataset, 3, 16, 0)
    assert sorted(int(sample["labels"]) for sample in samples) == [0, 1, 2]
    logits = torch.randn(1, 3)
    assert TASK.loss(logits, samples[0]) == cross_entropy(logits, samples[0]["labels"])
    plain = TASK.calibration(families.tokenizer(), config, "demo", 3, 16, 0)
    assert all("labels" not in sample for sample in plain)
    assert TASK.loss(logits, plain[0]) == cross_entropy(logits, drawn_label(logits, plain[0]))


def test_pairs_are_read_together(tmp_path, config) -> None:
    dataset = labelled(tmp_path, "a b,c d,1", "premise,hypothesis,label")
    (sample,) = TASK.evaluation(families.tokenizer(), config, dataset, 32, None)
    assert sample["input_ids"][0].tolist() == families.tokenizer()("a b", "c d")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ("a b,3", "text,label", r"line 2: the label 3 is none of the model's 3; .*0 to 2, or a name: no, Maybe, yes"),
        ("a b,perhaps", "text,label", "the label 'perhaps' is none of the model's"),
        ("a b,1\nc d,", "text,label", "line 3 has no label, and others have one; give all samples one"),
        ("a b,1", "words,label", r"line 2 has no column of texts, but 'words', 'label'; name one 'text' or 'sentence'"),
        ("a b,1", "words,class", r"line 1 names no known column, but 'words', 'class'; name one 'text' or 'sentence'"),
        ("a,b,1", "text,label", "line 2 has 3 columns, the first line 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(tmp_path, config, rows, head, message) -> None:
    with pytest.raises(DataError, match=message):
        TASK.calibration(families.tokenizer(), config, labelled(tmp_path, rows, head), len(rows.splitlines()), 16, 0)


def test_a_model_of_one_number_is_refused(config) -> None:
    config.num_labels = 1
    with pytest.raises(ModelError, match="gives one number and no classes"):
        TASK.calibration(families.tokenizer(), config, "demo", 1, 16, 0)


def test_accuracy_agreement_and_divergence_by_a_plain_loop(tmp_path, progress) -> None:
    source = families.written(tmp_path / "dense", "distilbert", AUTO)
    pruned = ModelSource("pruned", tmp_path / "pruned")
    text = CalibrationSettings(dataset="demo", samples=4, sequence_length=32)
    prune(source, pruned.folder, PruneSettings(method="gblm", fit="fast"), text, device="cpu", progress=progress)
    texts = ["a cat", "the dog ran off", "rain and more of it", "late", "seven trees", "no"]
    dataset = labelled(tmp_path, "\n".join(f"{text},{i % 3}" for i, text in enumerate(texts)))
    found = evaluate(pruned, EvaluateSettings(dataset=dataset), baseline=source, device="cpu", progress=progress)
    models = [loading.load_model(folder) for folder in (source, pruned)]
    dense, other = (
        [model(**families.tokenizer()(text, return_tensors="pt")).logits.detach() for text in texts] for model in models
    )
    right = [float(logits.argmax() == i % 3) for i, logits in enumerate(other)]
    assert found.metrics["accuracy"].value == pytest.approx(sum(right) / 6) and found.metrics["accuracy"].error > 0
    kl = [
        float(kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in zip(dense, other, strict=True)
    ]
    assert found.fidelity["mean_kl"] == pytest.approx(sum(kl) / 6, rel=1e-3, abs=1e-7)
    same = [float(a.argmax() == b.argmax()) for a, b in zip(dense, other, strict=True)]
    assert found.fidelity["top1_agreement"] == pytest.approx(sum(same) / 6)
