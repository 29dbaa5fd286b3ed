import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from gblm_compress.errors import DataError, ModelError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models import loading
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.settings import CalibrationSettings, EvaluateSettings, PruneSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.embedding import POOLINGS, Embedding, top_agreement
from gblm_compress.tasks.metrics import spearman
from gblm_compress.tasks.passages import Row, encode
from tests.conftest import prune, prune_
from tests.tasks import families

TASK = TASKS["embedding"]


@pytest.fixture
def source(tmp_path) -> ModelSource:
    return families.written(tmp_path / "dense", "bert")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_are_pruned_with_gradients_and_fits(family: str) -> None:
    task = "classification" if family in ("bert", "modernbert", "albert") else "embedding"
    model = families.encoder(family, TASKS[task].auto_class)
    samples = TASKS[task].calibration(families.tokenizer(), model.config, "demo", 4, 40, 0)
    layers = prune_(model, samples, method="gblm", pattern="2:4", fit="best")
    assert len(layers) == sum(map(len, prunable_layers(model))) >= 6
    assert all(layer.nonzeros == layer.shape[0] * layer.shape[1] // 2 for layer in layers.values())


def test_squared_gradients_estimate_the_curvature_of_the_distance() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, requires_grad=True)
    states = torch.randn(7, 4)

    embedding, draws = TASK.judged((states @ weight.T).unsqueeze(0), {}), 2000

    def squared_gradients(values) -> torch.Tensor:
        gradients = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in values]
        return torch.stack(gradients).square().sum(0)

    losses = [TASK.loss(embedding, {"draw": torch.tensor([seed])}) for seed in range(draws)]
    torch.testing.assert_close(squared_gradients(losses) / draws, squared_gradients(embedding[0]), rtol=0.25, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_no_part_of_an_embedding(pooling: str) -> None:
    model, task = families.encoder("bert"), Embedding(pooling)
    rows = [Row(("some words",)), Row(("seven words of which some are longer",))]
    for sample in encode(families.tokenizer(), model.config, rows, 60, pad=True):
        cut = sample["input_ids"][:, : int(sample["attention_mask"].sum())]
        tokens = model(input_ids=cut).last_hidden_state[0]
        expected = {"mean": tokens.mean(0), "cls": tokens[0], "max": tokens.max(0).values, "lasttoken": tokens[-1]}
        got = task.judged(model(**task.arguments(sample)).last_hidden_state, sample)
        torch.testing.assert_close(got, normalize(expected[pooling], dim=0).unsqueeze(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "max"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "max"]}, "by cls and max is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "by weightedmean is not supported"),
        ("1_Pooling/config.json", [], "cannot be read .*not an object"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "through Dense, which is not"),
        ("README.md", {}, "mean"),
    ],
)
def test_the_folder_says_how_to_pool(tmp_path, name, content, found) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    with nullcontext() if found in POOLINGS else pytest.raises(ModelError, match=found):
        assert TASK.of_folder(tmp_path).pooling == found


def test_pairs_are_judged_by_rank_and_all_texts_by_their_neighbours(source, tmp_path, progress) -> None:
    words = ["a cat sat", "the dog ran off", "rain", "it is late, and dark", "seven", "a tree in the yard"]
    (tmp_path / "pairs.csv").write_text("\n".join(f'"{a}","{b}",{i}' for i, (a, b) in enumerate(pairwise(words))))
    settings = EvaluateSettings(dataset=str(tmp_path / "pairs.csv"))
    found = evaluate(source, settings, baseline=source, device="cpu", progress=progress)
    tokenizer, model = families.tokenizer(), loading.load_model(source)
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach() for text in words]
    vectors = [normalize(tokens.mean(0), dim=0) for tokens in states]
    expected = spearman([float(a @ b) for a, b in pairwise(vectors)], range(5))
    assert found.metrics["spearman"].value == pytest.approx(expected.value)
    assert set(found.fidelity) == {"cosine"} and found.sample == "text" and found.windows == 10
    plain = EvaluateSettings(dataset="demo", max_windows=12)
    found = evaluate(source, plain, baseline=source, device="cpu", progress=progress)
    assert found.metrics == {} and found.fidelity["top10_agreement"] == 1.0  # and no score
    assert found.fidelity["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_agreement_of_neighbours_by_a_plain_loop() -> None:
    torch.manual_seed(0)
    one, other = (normalize(torch.randn(30, 6), dim=1) for _ in range(2))
    shares = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        nearest = [{j for _, j in sorted((-float(v[i] @ v[j]), j) for j in others)[:4]} for v in (one, other)]
        shares.append(len(nearest[0] & nearest[1]) / 4)
    assert top_agreement(one, other, 4) == pytest.approx(sum(shares) / 30)
    assert top_agreement(one, one, 4) == 1.0
    assert float(TASK.divergence(one, other)) == pytest.approx(float((one - other).square().sum(1).mean()) / 2)


def test_what_cannot_be_drawn_or_padded_is_refused_before_the_work(source, tmp_path) -> None:
    text = CalibrationSettings(dataset="demo", samples=100_000, sequence_length=40)
    with pytest.raises(DataError, match=r"gives \d+ texts, but 100000 samples are asked for"):
        prune(source, tmp_path / "out", PruneSettings(fit="none"), text)
    byte_tokenizer().save_pretrained(source.folder)
    with pytest.raises(ModelError, match="'dense': its tokenizer has no pad token"):
        prune(source, tmp_path / "out", PruneSettings(fit="none"), text)
