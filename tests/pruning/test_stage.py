"""The stage as a whole: against a slow procedure that never replays a block, and its refusals."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gblm_compress.calibration import generation
from gblm_compress.errors import ModelError, UsageError
from gblm_compress.methods.choices import Need
from gblm_compress.methods.patterns import Pattern
from gblm_compress.models import manifest
from gblm_compress.models.architecture import prunable_layers, weight_matrix
from gblm_compress.models.loading import count_weights
from gblm_compress.progress import Progress
from gblm_compress.pruning.block_pruning import LayerResult
from gblm_compress.settings import REGISTRIES, CalibrationSettings, PruneSettings
from gblm_compress.settings.prune import PRESETS
from tests.conftest import ARCHITECTURES, divergence, edit_weights, prune, prune_, samples, saved, tiny_model
from tests.tasks.families import inputs_of, slow_masks


def slow_prune(kind: str, method: str, norm: str) -> dict[str, torch.Tensor]:
    """Masks by the papers' procedure, with whole forward passes only."""
    losses = [lambda model, ids=ids: model(**ids, labels=ids["input_ids"]).loss for ids in samples()]
    return slow_masks(tiny_model(kind), samples(), losses, 100.0, method, power=1 if norm == "l1" else 2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("method", "norm"), [("gblm", "l1"), ("gblm", "l2"), ("wanda", "l1"), ("gradient", "l2")])
def test_masks_are_those_of_the_slow_procedure(kind: str, method: str, norm: str) -> None:
    expected, model = slow_prune(kind, method, norm), tiny_model(kind)
    results = prune_(model, samples(), method=method, gradient_norm=norm, allocation="uniform")
    assert list(results) == list(expected)
    different = total = 0
    for name, mask in expected.items():
        got = weight_matrix(model.get_submodule(name)) != 0
        assert results[name].nonzeros == int(got.sum()) == mask.numel() // 2
        different += int((got != mask).sum())
        total += mask.numel()
    assert different / total < 1e-3  # a rounding difference may swap two weights of all but equal score


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("fit", ["fast", "balanced"])
def test_the_error_of_an_output_is_what_both_layers_give_on_the_text(kind: str, fit: str) -> None:
    ids, dense, model = samples(), tiny_model(kind), tiny_model(kind)
    results = prune_(model, ids, method="wanda", pattern="2:4", fit=fit)
    name = next(iter(results))  # its inputs are those of the dense model
    x = torch.cat([inputs_of(dense, {name: dense.get_submodule(name)}, one)[name] for one in ids]).double()
    before, after = (weight_matrix(m.get_submodule(name)).detach().double() for m in (dense, model))
    expected = torch.linalg.norm(x @ (before - after).T) / torch.linalg.norm(x @ before.T)
    assert results[name].output_error == pytest.approx(float(expected), rel=1e-3)
    assert expected > 0.01


@pytest.mark.parametrize("method", REGISTRIES["method"])
def test_every_combination_of_choices_runs_and_gives_its_pattern(method: str) -> None:
    """All methods and fits; patterns, allocations, grids and models take turns beside them."""
    ids = samples(2, 16)
    for number, fit in enumerate(REGISTRIES["fit"]):
        chosen = {
            "method": method,
            "fit": fit,
            "pattern": ("2:4", "unstructured", "unstructured-per-matrix")[number % 3],
            "allocation": list(REGISTRIES["allocation"])[number % 2],
            "quantise": list(REGISTRIES["quantise"])[(number + 1) % 3],
            "rounds": 2 if fit == "balanced" else 1,
        }
        settings = PruneSettings(**chosen)
        model = tiny_model(("llama", "gpt2", "opt")[number % 3])
        dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
        results = prune_(model, ids, **chosen)
        moved = 0
        for name, result in results.items():
            weight = weight_matrix(model.get_submodule(name))
            assert Pattern(result.pattern).first_violation(weight) is None
            assert torch.isfinite(weight).all() and not torch.signbit(weight[weight == 0]).any()
            assert result.nonzeros == int(torch.count_nonzero(weight))
            # No error is claimed where none was measured, or where all was fitted since.
            assert (result.output_error is None) == (fit == "best" or Need.GRAM not in settings.block_needs)
            stored = model.get_parameter(f"{name}.weight")
            moved += int(((stored != 0) & (stored != dense[f"{name}.weight"])).sum())
        weights = sum(result.shape[0] * result.shape[1] for result in results.values())
        assert sum(result.nonzeros for result in results.values()) <= 0.51 * weights
        assert (moved > 0) == (fit != "none" or settings.grid is not None)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_obs_has_the_mask_of_sparsegpt_whatever_becomes_of_the_survivors(pattern: str) -> None:
    dense, weights = tiny_model("llama"), {}
    for fit in ("obs", "none", "fast"):
        model = tiny_model("llama")
        prune_(model, samples(4, 48), method="obs", fit=fit, pattern=pattern)
        weights[fit] = {name: weight_matrix(layer) for name, layer in prunable_layers(model)[0].items()}
    for name, layer in prunable_layers(dense)[0].items():
        kept = weights["obs"][name] != 0
        assert torch.equal(weights["none"][name], layer.weight * kept)
        assert torch.equal(weights["fast"][name] != 0, kept)
        assert not torch.equal(weights["obs"][name], weights["none"][name])


def test_a_preset_is_its_settings_written_out() -> None:
    for name, keys in PRESETS.items():
        both = (PruneSettings(**given).model_dump(exclude={"preset"}) for given in ({"preset": name}, keys))
        assert next(both) == next(both)
    chosen = PruneSettings(preset="paper", fit="fast", gradient_norm="l2")
    assert (chosen.method, chosen.fit, chosen.gradient_norm) == ("gblm", "fast", "l2")
    assert PruneSettings(preset="sparsegpt", fit="best") == PruneSettings(preset="sparsegpt", method="obs", fit="best")
    assert PruneSettings.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("given", "message", "instead"),
    [
        ({"fit": ["best"]}, "'balanced' or 'best'", {"fit": "best"}),
        ({"quantise": "int4", "group": 65}, "'row', 32, 64 or 128", {"group": 64}),
        ({"preset": "bets"}, "'paper' or 'sparsegpt'", {"preset": "paper"}),
        ({"preset": ["best"]}, "'paper' or 'sparsegpt'", {"preset": "paper"}),
        ({"method": "wanda", "gradient_norm": "l2"}, "reads it", {"allocation": "sensitivity"}),
        ({"method": "wanda", "alpha": 3.0}, "alpha 3.0 would do nothing: only method", {"method": "regional"}),
        ({"fit": "fast", "rounds": 2}, "rounds 2 would do nothing: only fit", {"fit": "balanced"}),
        ({"group": "row"}, "group row would do nothing: only quantise", {"quantise": "int4"}),
    ],
)
def test_an_unknown_choice_and_a_key_that_nothing_reads_are_refused(given, message, instead) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneSettings(**given)
    for key, value in (given | instead).items():
        assert getattr(PruneSettings(**given | instead), key) == value


def test_updates_lower_the_divergence_of_a_model_in_their_order() -> None:
    """On unseen text: least squares beats the mask alone, distillation beats that."""
    found = {}
    for fit in ("best", "fast", "none"):
        model = tiny_model("llama")
        prune_(model, samples(16, 48), method="wanda", pattern="2:4", fit=fit)
        found[fit] = divergence(tiny_model("llama"), model, samples(4, 48, seed=5))
    assert found["best"] < found["fast"] < found["none"]


def test_the_columns_of_a_scale() -> None:
    for given, columns, words in (
        ({}, None, None),
        ({"quantise": "int8"}, None, "int8, a scale for every row"),
        ({"quantise": "int4"}, 64, "int4, a scale for every 64 columns"),
        ({"quantise": "int8", "group": "128"}, 128, "int8, a scale for every 128 columns"),
        ({"quantise": "int4", "group": "row"}, None, "int4, a scale for every row"),
    ):
        settings = PruneSettings(method="wanda", **given)
        assert (settings.columns_of_a_scale, settings.grid) == (columns, words)
        assert PruneSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "unstructured-per-matrix"])
def test_the_folder_is_an_ordinary_model_with_the_promised_zeros(kind, pattern, tiny, pruning) -> None:
    folder = pruning("out", kind, pattern=pattern, allocation="uniform").folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(tiny(kind).folder)
    names = [name for block in prunable_layers(dense) for name in block]
    assert list(manifest.read(Path(folder))["layers"]) == names
    for name in names:
        now, before = (weight_matrix(m.get_submodule(name)) for m in (model, dense))
        alive = now != 0
        assert torch.equal(now[alive], before[alive])
        assert int(alive.sum()) == now.numel() // 2
    untouched = dict(dense.named_parameters()).keys() - {f"{name}.weight" for name in names}
    for name in untouched:
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_survivors_keep_dtype_and_bits_whatever_is_computed_in(compute, stored, pruning, tmp_path) -> None:
    """And zeros are positive even where the source has -0.0."""
    source = saved(tiny_model("llama").to(getattr(torch, stored)), tmp_path / "m")
    edit_weights(source.folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][0].fill_(-0.0))
    before = load_file(source.folder / "model.safetensors")
    for name, tensor in load_file(Path(pruning("out", source, dtype=compute).folder) / "model.safetensors").items():
        assert str(tensor.dtype) == f"torch.{stored}"
        assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        assert "proj" not in name or not torch.signbit(tensor[tensor == 0]).any()


@pytest.mark.parametrize(("pattern", "is_told"), [("2:4", True), ("1:4", False), ("unstructured", False)])
def test_other_patterns_by_an_allocation_are_told(pattern, is_told, pruning) -> None:
    """N is at least 1, so that 1:4 cannot be divided; an unstructured pattern stays itself."""
    found = pruning(method="wanda", pattern=pattern, allocation="sensitivity").warnings
    advice = "give --allocation uniform to keep 2:4 everywhere"
    assert found == ((f"allocation sensitivity gave layers the patterns 1:4, 2:4, 3:4; {advice}",) if is_told else ())


def test_dense_exceptions_are_among_the_dense_weights(pruning) -> None:
    """Counted by hand: half of the weights are in block 0."""
    result = pruning(method="wanda", overrides=({"layers": "*.0.*", "pattern": "dense"},))
    assert set(result.layers) == {name for name in result.layers if ".1." in name}
    reasons = Counter(dense.reason for dense in result.left_dense.values())
    assert reasons == {"left dense by an exception or the allocation": 7, "embedding tied": 1}
    assert result.linear_weights == 2 * result.weights + result.left_dense["lm_head"].weights


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_exceptions_for_all_layers_and_for_some_of_them(allocation) -> None:
    def run(**patterns: str) -> dict[str, LayerResult]:
        overrides = tuple(f"*{part}*={pattern}" for part, pattern in patterns.items())
        return prune_(tiny_model("llama"), samples(), method="wanda", allocation=allocation, overrides=overrides)

    assert {result.pattern for result in run(layers="2:4").values()} == {"2:4"}
    some = run(layers="dense", mlp="2:4", down_proj="unstructured@0.25")
    assert len(some) == 6 and all(".mlp." in name for name in some)
    down = some["model.layers.0.mlp.down_proj"]
    assert (down.pattern, down.nonzeros) == ("unstructured", 64 * 96)
    with pytest.raises(UsageError, match="nothing to prune"):
        run(layers="dense")


def test_a_width_that_m_does_not_divide_is_refused_before_work(tmp_path, prose, pruning) -> None:
    with pytest.raises(UsageError, match=r"q_proj: in_features=64 is not a multiple of 3.*--ignore"):
        pruning(pattern="2:3")
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]


def test_dense_layers_are_rounded_to_a_grid_that_the_fit_knows(pruning) -> None:
    result = pruning(pattern="dense", quantise="int4", group="row", fit="fast")
    assert len(result.layers) == 14 and {layer.pattern for layer in result.layers.values()} == {"dense"}
    assert result.nonzeros < result.weights and not any("became zero" in note for note in result.warnings)
    found = {}
    for fit in ("none", "fast"):
        model = tiny_model("llama")
        prune_(model, samples(16, 48), pattern="dense", quantise="int4", group="row", fit=fit)
        found[fit] = divergence(tiny_model("llama"), model, samples(4, 48, seed=5))
    assert 0 < found["fast"] < found["none"]


def test_survivors_that_rounding_makes_zero_are_told_with_their_layer(pruning, tmp_path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "m")
    edit_weights(source.folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][:4].mul_(1e-8))
    result = pruning("out", source, method="magnitude", quantise="int8")
    lost = 4 * 32 / result.layers["model.layers.1.mlp.up_proj"].survivors
    note = f"most in model.layers.1.mlp.up_proj ({lost:.1%} of its own)"
    assert result.warnings[0].startswith("128 of ") and result.warnings[0].endswith(note)


UP = "model.layers.1.mlp.up_proj"
NOT_FINITE = f"{UP}: 1 of 8192 weights are NaN or infinite"
SCALES = f"{UP}: its weights need scales from .* to .*--ignore"


@pytest.mark.parametrize(
    ("kind", "place", "factor", "settings", "message"),
    [
        *(("llama", f"{UP}.weight", factor, {}, NOT_FINITE) for factor in (math.nan, math.inf)),
        *(("llama", f"{UP}.weight", 1e-8, {"quantise": grid}, SCALES) for grid in ("int8", "int4")),
        *(("llama", f"{UP}.weight", 1e30, {"quantise": grid}, SCALES) for grid in ("int8", "int4")),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", math.nan, {"fit": "balanced"}, "the fit of the block of transform"),
        ("gpt2", "transformer.ln_f.weight", math.nan, {"fit": "best"}, "the fit of the whole model: the loss is nan"),
    ],
)
def test_what_cannot_be_pruned_is_named_and_before_the_work_if_the_weights_show_it(
    kind, place, factor, settings, message
) -> None:
    model = tiny_model(kind)
    values = model.get_parameter(place).data
    (values if math.isfinite(factor) else values.view(-1)[3:4]).mul_(factor)
    if "fit" not in settings:
        model.forward = None
    with pytest.raises(ModelError, match=message):
        prune_(model, samples(), method="wanda", **settings)


def test_layers_share_by_their_gradients_where_these_are_measured_anyway() -> None:
    for given, allocation in (
        ({}, "sensitivity"),
        ({"method": "gradient", "pattern": "unstructured-per-matrix"}, "sensitivity"),
        ({"pattern": "2:4"}, "uniform"),
        ({"method": "wanda"}, "uniform"),
        ({"preset": "paper"}, "uniform"),
        ({"method": "wanda", "allocation": "sensitivity"}, "sensitivity"),
    ):
        settings = PruneSettings(**given)
        assert settings.allocation == settings.model_dump()["allocation"] == allocation
        assert ("allocation" in settings.model_fields_set) == bool(given.keys() & {"allocation", "preset"})
        assert PruneSettings.model_validate(settings.model_dump()) == settings


def test_the_estimate_counts_the_writing_of_the_text_once(tiny, tmp_path, capsys, monkeypatch) -> None:
    slow = 5 * count_weights(tiny("llama")) * 2 * 33 / 7200  # operations a second, of the writing alone
    monkeypatch.setattr(generation, "cost", SimpleNamespace(operations_per_second=lambda *given: slow))
    text = CalibrationSettings(dataset="self", samples=2, sequence_length=33)
    for again in (False, True):
        prune(tiny("llama"), tmp_path / "out", PruneSettings(fit="none"), text, progress=Progress(), force=again)
        said = capsys.readouterr().err
        assert again not in ("this takes about 2.0 h" in said, "writes 2 samples of 33 tokens" in said)
