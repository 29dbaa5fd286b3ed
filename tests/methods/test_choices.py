"""The registries: what their entries declare, and that a new entry is all that a new choice takes."""

from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from gblm_compress.methods.allocation import ALLOCATIONS, DenseLayer
from gblm_compress.methods.choices import Need, Statistics
from gblm_compress.methods.fits import FITS
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.saliency import METHODS, Rule
from gblm_compress.pruning import planning
from gblm_compress.settings import REGISTRIES, PruneSettings
from tests.scripts import ROOT, blocks, python

FIELDS = {
    "activation_norm": Need.ACTIVATIONS, "gradient_norm": Need.GRADIENTS, "regional_norm": Need.REGIONAL,
    "gram": Need.GRAM,
}  # fmt: skip
RULE = Rule("layer", Pattern("2:4"), 0.5, 2.0)
CALLS = {
    "method": lambda name, w, s: METHODS[name].select(w, s, RULE).keep,
    "fit": lambda name, w, s: FITS[name].apply(w, w > 0, s),
    "allocation": lambda name, w, s: ALLOCATIONS[name].densities([[DenseLayer("a", w, s)], []], 0.5),
    "quantise": lambda name, w, s: (make := QUANTISERS[name].make) and make(w, w > 0, group=None).scales,
}
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_declared_needs_are_what_is_read(kind: str, name: str) -> None:
    inputs, weight = torch.randn(32, 8), torch.randn(4, 8)
    gram = inputs.T @ inputs
    full = Statistics(torch.rand(8), torch.rand(4, 8), torch.rand(4, 8), gram)
    needs = REGISTRIES[kind][name].needs
    given = {field: getattr(full, field) if FIELDS[field] in needs else None for field in FIELDS}
    assert [field.name for field in fields(Statistics)] == [*FIELDS, "tokens"]  # which is counted, not measured
    found, expected = (CALLS[kind](name, weight, statistics) for statistics in (Statistics(**given), full))
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
    for field in (field for field in FIELDS if FIELDS[field] in needs):
        with pytest.raises(AssertionError, match="a choice that reads this must declare Need"):
            CALLS[kind](name, weight, Statistics(**given | {field: None}))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_entry_is_all_that_settings_know_of_a_choice(kind: str, name: str) -> None:
    entry, schema = REGISTRIES[kind][name], PruneSettings.model_json_schema()["properties"][kind]
    assert {"enum": list(REGISTRIES[kind])}.items() <= schema.get("anyOf", [schema])[0].items()  # one may be unset
    assert f"{name}: {entry.help}" in schema["description"] and "|" not in entry.help
    settings = PruneSettings(**{"method": "magnitude", "fit": "none", kind: name})
    assert settings.needs == entry.needs
    assert settings.needs_text == bool(entry.needs)
    assert set(entry.keys) == settings.read <= set(PruneSettings.model_fields)
    assert planning.passes(settings) >= (1 + entry.passes) * settings.needs_text


TOYS = """
import sys
from gblm_compress.methods.allocation import ALLOCATIONS, Allocation
from gblm_compress.methods.choices import Need
from gblm_compress.methods.fits import FITS, FitChoice

def double(weight, keep, statistics):
    return weight * keep * (2 + 0 * statistics.moments().sum())

def first_block_more(blocks, density):
    return {
        layer.name: density + (-0.04 if index else 0.04) * bool(layer.statistics.activations().any())
        for index, block in enumerate(blocks) for layer in block
    }

FITS["double"] = FitChoice(double, help="twice as much", needs=Need.GRAM, passes=5.0)
ALLOCATIONS["first"] = Allocation(first_block_more, help="the first more", needs=Need.ACTIVATIONS)
assert "torch" not in sys.modules
from gblm_compress.cli.app import main
main(sys.argv[1:])
"""
SHORT = "--calibration prose.txt --samples 2 --sequence-length 16 --quiet"


def test_choices_from_outside_prune_a_model(tiny, tmp_path, prose) -> None:
    source = tiny("llama")
    command = f"prune {source.folder} -o out --method magnitude --fit double --allocation first {SHORT}"
    python("-c", TOYS, *command.split(), folder=tmp_path)
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "out"))
    for block, share in ((0, 0.54), (1, 0.46)):
        name = f"model.layers.{block}.self_attn.q_proj.weight"
        alive = pruned[name] != 0
        assert torch.equal(pruned[name], 2 * dense[name] * alive)
        assert float(alive.double().mean()) == pytest.approx(share, abs=0.01)


def test_the_method_of_the_page_prunes(tmp_path, prose) -> None:
    (script,) = blocks("python", page=ROOT / "docs" / "adding-a-method.md")
    python("-c", script, *f"prune tiny -o out --method root --pattern 2:4 --fit none {SHORT}".split(), folder=tmp_path)
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal((weight != 0).view(len(weight), -1, 4).sum(-1), torch.full((len(weight), 16), 2))


def test_choices_from_outside_are_told_with_the_others() -> None:
    for options, known in (("--fit doubel", "double"), ("--allocation frist", "first")):
        said = python("-c", TOYS, *f"prune tiny -o x {options}".split(), code=2).stderr
        assert f"did you mean '{known}'?" in said
