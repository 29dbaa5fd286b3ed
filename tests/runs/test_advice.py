"""Advice: sizes are those of the artefacts that are made, times are linear in blocks, the words follow from both."""

import json

import pytest

from gblm_compress.errors import UsageError
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.runs import advice
from gblm_compress.runs.advice import WAYS, Prediction, advise, advised, sentences
from gblm_compress.settings import AdviseSettings, PruneSettings
from tests.conftest import export, prune, saved
from tests.families.tiny import tiny_family

SMALL = {name: WAYS[name] for name in ("dense, torch float32", "packed, torch bitmask", "packed, torch bitmask-int8")}
QUIET = Progress(quiet=True)


def test_sizes_are_those_of_the_whole_models_artefacts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(advice, "WAYS", SMALL | {"no way": ("pruned", "auto", {"format": "semi-structured"})})
    model = saved(tiny_family("llama", num_hidden_layers=6), tmp_path / "model")
    found = advise(model, AdviseSettings(blocks=3), progress=QUIET)
    assert found.blocks == 6
    prune(model, tmp_path / "pruned", PruneSettings(method="magnitude", fit="none"))
    sizes = {"dense, torch float32": model.bytes_on_disk}
    for format in ("bitmask", "bitmask-int8"):
        result, _ = export(ModelSource("pruned", tmp_path / "pruned"), tmp_path / format, format=format)
        sizes[f"packed, torch {format}"] = result.bytes
    predicted = {p.name: p.bytes for p in found.predictions}
    assert predicted.keys() == sizes.keys()
    for name, size in sizes.items():
        assert predicted[name] == pytest.approx(size, rel=0.005), name  # headers of files are not quite linear
    assert [p.ms_per_token for p in found.predictions] == sorted(p.ms_per_token for p in found.predictions)
    assert all(p.low <= p.ms_per_token <= p.high for p in found.predictions) and "2:4" in found.left_out["no way"]
    json.dumps(found.as_dict())


PAYS = "Does pruning pay here? "
CANNOT_TELL = f"{PAYS}Unclear, as the ranges overlap: pruned 2.9–5.6 and quantised 4.3–8.4 ms per token; ask"


@pytest.mark.parametrize(
    ("times", "spread", "said"),
    [
        ((10, 6, 4), 1.1, f"{PAYS}pruned needs 0.67 times the time of quantised. `evaluate`"),
        ((10, 6, 4), 1.4, CANNOT_TELL),
        ((10, 6, 5.9), 1.1, "Does quantisation alone pay here? quantised needs 0.60 times the"),
        ((10, 9.5, 9.9), 1.01, "Leave the model as it is: nothing is clearly faster than quantised."),
    ],
)
def test_the_words_follow_from_the_figures_and_their_ranges(times, spread, said) -> None:
    kinds = zip(("dense", "quantised", "pruned"), times, strict=True)
    made = [Prediction(kind, kind, 0, ms, ms / spread, ms * spread) for kind, ms in kinds]
    made.sort(key=lambda each: each.ms_per_token)
    assert next(sentences(made)).startswith(said) and (advised(made) is None) == ("needs" not in said)


def test_a_model_of_few_positions_or_one_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(advice, "WAYS", {"dense, torch float32": WAYS["dense, torch float32"]})
    with pytest.raises(UsageError, match="has 64 positions; the length that is timed is 174"):
        advise(saved(tiny_family("gpt2", n_positions=64), tmp_path / "short"), AdviseSettings(), progress=QUIET)
    source = saved(tiny_family("gpt2", n_layer=1, n_positions=256), tmp_path / "one")
    with pytest.raises(UsageError, match="blocks 3: model 'one' has 1; give at most that many"):
        advise(source, AdviseSettings(blocks=3), progress=QUIET)
    (found,) = advise(source, AdviseSettings(blocks=2), progress=QUIET).predictions
    assert found.bytes == pytest.approx(source.bytes_on_disk, rel=0.01)
