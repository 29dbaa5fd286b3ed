"""The registries: what their entries declare, and that a new entry is all that a new choice takes."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from gblm_compress.methods.allocation import ALLOCATIONS, DenseLayer
from gblm_compress.methods.choices import Need, Statistics, describe, readers
from gblm_compress.methods.patterns import Pattern
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.refinement import REFINEMENTS
from gblm_compress.methods.saliency import METHODS, Rule
from gblm_compress.methods.updates import UPDATES
from gblm_compress.models.tiny import tiny_model
from gblm_compress.progress import Progress
from gblm_compress.pruning import costs
from gblm_compress.pruning.in_memory import prune_
from gblm_compress.settings import REGISTRIES, PruneSettings
from tests.conftest import samples

FIELDS = {
    "activation_norm": Need.ACTIVATIONS,
    "gradient_norm": Need.GRADIENTS,
    "regional_norm": Need.REGIONAL,
    "gram": Need.GRAM,
}
RULE = Rule("layer", Pattern("2:4"), 0.5, 2.0, 0.01)
CALLS = {
    "method": lambda name, w, s: METHODS[name].select(w, s, RULE).keep,
    "refine": lambda name, w, s: REFINEMENTS[name].refine(w, w > w.median(1, keepdim=True).values, s, RULE.pattern),
    "update": lambda name, w, s: UPDATES[name].apply(w, w > 0, s, 0.01),
    "allocation": lambda name, w, s: ALLOCATIONS[name].densities([[DenseLayer("a", w, s)], []], 0.5, 0.08),
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
        with pytest.raises(AssertionError, match="what reads this must declare Need"):
            CALLS[kind](name, weight, Statistics(**given | {field: None}))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_entry_is_all_that_settings_know_of_a_choice(kind: str, name: str) -> None:
    entry, schema = REGISTRIES[kind][name], PruneSettings.model_json_schema()["properties"]
    assert schema[kind]["enum"] == list(REGISTRIES[kind])
    assert f"{name}: {entry.help}" in schema[kind]["description"] and "|" not in entry.help
    settings = PruneSettings(**{"method": "magnitude", "update": "none", kind: name})
    assert settings.needs == entry.needs
    assert settings.needs_text == bool(entry.needs)
    assert set(entry.keys) == settings.read <= set(PruneSettings.model_fields)
    assert costs.passes(settings) >= 1 + entry.passes


@pytest.mark.parametrize("kind", REGISTRIES)
def test_an_unknown_name_is_refused_and_never_another_method(kind: str, progress: Progress) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"'{list(REGISTRIES[kind])[-1]}'")):
        PruneSettings(**{kind: "wandb"})
    with pytest.raises(KeyError, match="wandb"):
        prune_(tiny_model("llama"), samples(), PruneSettings.model_construct(**{kind: "wandb"}), progress)


def test_readers_of_a_key_are_told_in_words() -> None:
    assert readers("damping", REGISTRIES) == ["method obs", "update obs, least-squares or reconstruct"]
    assert readers("gradient_norm", REGISTRIES) == ["method gblm or gradient", "allocation sensitivity"]
    assert readers("pattern", REGISTRIES) == []
    assert describe({"swap": REFINEMENTS["swap"]}) == f"swap: {REFINEMENTS['swap'].help}"


TOYS = """
import sys
from gblm_compress.methods.allocation import ALLOCATIONS, Allocation
from gblm_compress.methods.choices import Need
from gblm_compress.methods.quantisation import QUANTISERS
from gblm_compress.methods.refinement import REFINEMENTS, Refinement
from gblm_compress.methods.saliency import METHODS, Method, by_score
from gblm_compress.methods.updates import UPDATES, Update

def last(weight, statistics, alpha):
    return (weight * 0 + statistics.regional() * 0 + alpha).cumsum(1)

def mirror(weight, keep, statistics, pattern):
    return keep.flip(1)

def double(weight, keep, statistics, damping):
    return weight * keep * (2 + 0 * statistics.moments().sum() + damping)

def first_block_more(blocks, density, deviation):
    return {
        layer.name: density + (-deviation if index else deviation) * bool(layer.statistics.activations().any())
        for index, block in enumerate(blocks) for layer in block
    }

METHODS["last"] = Method(by_score(last), help="the last inputs", needs=Need.REGIONAL, reads=("alpha",))
REFINEMENTS["mirror"] = Refinement(mirror, help="the first for the last")
UPDATES["double"] = Update(double, help="twice as much", needs=Need.GRAM, reads=("damping",), passes=5.0)
ALLOCATIONS["first"] = Allocation(first_block_more, help="the first more", needs=Need.ACTIVATIONS, reads=("deviation",))
assert "torch" not in sys.modules
"""


@pytest.fixture
def with_toys(tmp_path):
    """Run the program with four choices of somebody else's."""
    (tmp_path / "toys.py").write_text(TOYS + "from gblm_compress.cli.app import main\nmain(sys.argv[1:])\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "toys.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_choices_from_outside_prune_a_model(with_toys, tiny, tmp_path, prose) -> None:
    source = tiny("llama")
    done = with_toys(
        "prune", str(source.folder), "-o", str(tmp_path / "out"), "--calibration", str(prose), "--samples", "2",
        "--sequence-length", "16", "--method", "last", "--refine", "mirror", "--update", "double",
        "--allocation", "first", "--alpha", "3", "--damping", "1", "--deviation", "0.25", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "out"))
    for block, share in ((0, 0.75), (1, 0.25)):
        name = f"model.layers.{block}.self_attn.q_proj.weight"
        first = int(share * dense[name].shape[1])
        torch.testing.assert_close(pruned[name][:, :first], 3 * dense[name][:, :first])
        assert not pruned[name][:, first:].any()


def test_choices_from_outside_are_told_with_the_others(with_toys) -> None:
    help = " ".join(with_toys("prune", "--help").stdout.replace("│", " ").split())
    schema = json.loads(with_toys("schema").stdout)["$defs"]["PruneSettings"]["properties"]
    for kind, name, text in (
        ("method", "last", "the last inputs"), ("refine", "mirror", "the first for the last"),
        ("update", "double", "twice as much"), ("allocation", "first", "the first more"),
    ):  # fmt: skip
        assert f"{name}: {text}" in help
        assert name in schema[kind]["enum"] and f"{name}: {text}" in schema[kind]["description"]
    refused = with_toys("prune", "tiny", "-o", "x", "--method", "lats")
    assert refused.returncode == 2 and "did you mean 'last'?" in refused.stderr
    refused = with_toys("prune", "tiny", "-o", "x", "--method", "wanda", "--alpha", "3")
    assert refused.returncode == 2 and "it is read with method gblm, regional or last" in refused.stderr
