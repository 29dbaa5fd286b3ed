from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from gblm_compress.errors import DataError, ModelError
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.classification import drawn_label
from gblm_compress.tasks.metrics import mean
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


def test_labels_are_read_by_number_and_name_and_pairs_together(tmp_path, config) -> None:
    dataset = labelled(tmp_path, "a b c,2\nd e,maybe\nf g h,NO")
    samples = TASK.calibration(families.tokenizer(), config, dataset, 3, 16, 0)
    assert sorted(int(sample["labels"]) for sample in samples) == [0, 1, 2]
    logits = torch.randn(1, 3)
    assert TASK.loss(logits, samples[0]) == cross_entropy(logits, samples[0]["labels"])
    plain = TASK.calibration(families.tokenizer(), config, "demo", 3, 16, 0)
    assert all("labels" not in sample for sample in plain)
    assert TASK.loss(logits, plain[0]) == cross_entropy(logits, drawn_label(logits, plain[0]))
    pairs = labelled(tmp_path, "a b,c d,1", "premise,hypothesis,label")
    (sample,) = TASK.evaluation(families.tokenizer(), config, pairs, 32, None)
    assert sample["input_ids"][0].tolist() == families.tokenizer()("a b", "c d")["input_ids"]
    config.num_labels = 1
    with pytest.raises(ModelError, match="has a single output"):
        TASK.calibration(families.tokenizer(), config, "demo", 1, 16, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a b,3", r"line 2: the label 3 is not one of the model's 3; .* 2, or a name: no, Maybe, yes"),
        ("a b,perhaps", "the label 'perhaps' is not one of the model's"),
        ("a b,1\nc d,", "line 3 has no label, but other samples have one; label all"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, config, rows, message) -> None:
    with pytest.raises(DataError, match=message):
        TASK.calibration(families.tokenizer(), config, labelled(tmp_path, rows), len(rows.splitlines()), 16, 0)


def test_metrics_are_those_of_a_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 1, 6, generator=generator)
    samples = [{"labels": torch.tensor([i % 6])} for i in range(20)]
    first, five = (
        [float(i % 6 in one[0].argsort(descending=True)[:count]) for i, one in enumerate(logits)] for count in (1, 5)
    )
    entropies = [float(cross_entropy(one, sample["labels"])) for one, sample in zip(logits, samples, strict=True)]
    for task, accuracies in (("classification", [first]), ("image-classification", [first, five])):
        judged = [TASKS[task].measure(one, sample) for one, sample in zip(logits, samples, strict=True)]
        found = TASKS[task].metrics(judged)
        assert list(found) == [*TASKS[task].accuracies, "cross_entropy"]
        expected = [mean(each) for each in (*accuracies, entropies)]
        assert [each.value for each in found.values()] == pytest.approx(expected)
        assert next(iter(found.values())).error == pytest.approx((mean(first) * (1 - mean(first)) / 19) ** 0.5)
    assert TASK.metrics([TASK.measure(logits[0], {})]) == {}
