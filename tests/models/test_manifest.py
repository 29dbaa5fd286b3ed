"""Manifests from anywhere are refused, no name is obeyed on a card, and no model is compared with a stranger."""

import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gblm_compress.errors import ModelError, UsageError
from gblm_compress.measure.evaluation import evaluate
from gblm_compress.models import manifest
from gblm_compress.models.manifest import MANIFEST, check_baseline
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import EvaluateSettings, PruneSettings
from tests.conftest import build_tiny, edit_json, export, prune

LAYER = "model.layers.0.mlp.up_proj"
SETTINGS = PruneSettings(method="magnitude", pattern="2:4", fit="none")


@pytest.fixture
def folder(pruned, tmp_path) -> Path:
    """A copy of a pruned folder, to be damaged."""
    return shutil.copytree(pruned(pattern="2:4").folder, tmp_path / "out")


def test_the_manifest_holds_every_setting_and_an_export_says_where_it_comes_from(folder, tiny, tmp_path) -> None:
    source = ModelSource("out", folder)
    content = manifest.read(folder)
    assert content["prune"] == SETTINGS.model_dump(mode="json")
    assert content["calibration"] is None  # magnitude looks at no text
    assert content["versions"]["torch"] == version("torch")
    export(source, tmp_path / "export", format="bitmask")
    content = manifest.read(tmp_path / "export")
    assert content["base_model"]["sha256"] == tiny("llama").fingerprint
    assert content["source_sha256"] == source.fingerprint and content["prune"] == SETTINGS.model_dump(mode="json")
    card = (tmp_path / "export" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(tmp_path / "export"))
    loaded: dict = {}
    exec(code, loaded)  # the lines of the card, as a reader would run them
    assert loaded["model"].config.num_hidden_layers == 2 and loaded["tokenizer"]("a")["input_ids"]


def test_what_is_pruned_already_is_said(folder, pruning, tiny, tmp_path) -> None:
    again = pruning("again", ModelSource("out", folder), method="magnitude", sparsity=0.3)
    assert "out is pruned already (2:4, 50.0 % zeros); its zeros are the first" in again.warnings[0]
    assert manifest.read(tmp_path / "again")["base_model"]["sha256"] == tiny("llama").fingerprint


def layer(**changes: Any) -> dict[str, Any]:
    return {"layers": {LAYER: {"pattern": "2:4", "shape": [1, 1], "nonzeros": 1, "transposed": False} | changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[]", "not an object"),
        ({"layers": {}}, "a pruned folder lists its settings and its layers"),
        ({"prune": 5}, "prune: "),
        ({"prune": {"method": ["x |\n# INJECTED"]}}, r'prune.method: .* got \["x |\\n# INJECTED"\]'),
        ({"prune": SETTINGS.model_dump(mode="json") | {"group": 1}}, "prune.group"),
        ({"kind": "run"}, "kind: "),
        ({"left_dense": {"a": {"weights": "x", "reason": "y"}}}, "left_dense.a.weights"),
        (layer(shape=[0, 0]), "shape"),
        (layer(pattern="2:x"), "pattern '2:x'"),
        (layer(nonzeros=-1), "nonzeros"),
    ],
)
def test_a_manifest_from_anywhere(change, message: str, folder) -> None:
    if isinstance(change, str):
        (folder / MANIFEST).write_text(change)
    else:
        edit_json(folder / MANIFEST, **change)
    with pytest.raises(ModelError, match=message):
        manifest.read(folder)


def test_folders_that_were_not_pruned_are_told(folder, tmp_path) -> None:
    with pytest.raises(ModelError, match="not made by `gblm-compress prune`"):
        manifest.read(tmp_path)
    assert manifest.is_pruned(folder)
    layers = manifest.read(folder)["layers"]
    edit_json(folder / MANIFEST, layers=layers | {"model.embed_tokens": layers[LAYER]})
    with pytest.raises(ModelError, match="lists 'model.embed_tokens'.*belongs to another model"):
        export(ModelSource("out", folder), tmp_path / "x", format="bitmask")
    edit_json(folder / MANIFEST, kind="export", prune=None, layers={})
    assert not manifest.is_pruned(folder)


def test_the_model_card_gives_its_origin_and_shares_and_obeys_no_name(tiny, tmp_path) -> None:
    """Names come from outside: none may add a line of YAML or Markdown."""
    place = tmp_path / "evil\nlicense: mine\n# [red]"
    shutil.copytree(tiny("llama").folder, place)
    settings = PruneSettings(method="magnitude", pattern="2:4", ignore=("*.0.self_attn.q_proj",), fit="none")
    result = prune(ModelSource(str(place), place), tmp_path / "out", settings)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "license" not in front and "\n" not in front["base_model"]
    assert ", magnitude, 2:4\n" in card and "AutoModelForCausalLM.from_pretrained" in card
    head, ignored = 257 * 64, 64 * 64
    assert f"with {100 * result.weights / (result.weights + head + ignored):.1f} % of all linear weights" in card
    assert f"embedding tied: 1 layer, {head:,} weights" in card
    assert f"ignored by pattern '*.0.self_attn.q_proj': 1 layer, {ignored:,} weights" in card


def test_the_card_of_the_demo_names_the_model_on_the_hub(tiny, tmp_path, monkeypatch) -> None:
    """A folder of the user's that is called demo is another model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny("llama").folder, "demo")
    settings = PruneSettings(method="magnitude", fit="none")
    for folder, named in ((tiny("llama").folder, "HuggingFaceTB/SmolLM2-135M-Instruct"), (Path("demo"), "./demo")):
        prune(ModelSource("demo", folder), tmp_path / "out", settings, force=True)
        card = (tmp_path / "out" / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == named


def test_what_a_manifest_says_is_text_on_the_card(folder, tmp_path) -> None:
    left = manifest.read(folder)["left_dense"]
    left["lm_head"]["reason"] = "head\n# INJECTED \x1b[2J <script> | `code` [x](javascript:)"
    name = "a/<img onerror=x>|[x](y)"
    edit_json(folder / MANIFEST, left_dense=left, base_model={"name": name, "sha256": "0"})
    export(ModelSource("out", folder), tmp_path / "export", format="bitmask")
    card = (tmp_path / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == name
    body = card.split("---", 2)[2]
    assert "\x1b" not in body and "<img" not in body and "<script" not in body and "\n# INJECTED" not in body
    assert r"head\\n# INJECTED \\x1b\[2J &lt;script> \| \`code\` \[x\](javascript:)" in body


def test_the_source_is_a_baseline_wherever_it_lies(folder, tiny, tmp_path) -> None:
    pruned = ModelSource("pruned", folder)
    check_baseline(pruned, ModelSource("copy", shutil.copytree(tiny("llama").folder, tmp_path / "copy")))
    check_baseline(pruned, pruned)  # it comes from the same model
    build_tiny("llama", tmp_path / "twin", seed=1)
    twin = ModelSource("twin", tmp_path / "twin")
    with pytest.raises(UsageError, match=r"'twin' is not a baseline of 'pruned', which was made from .* by its gblm_m"):
        check_baseline(pruned, twin)
    (folder / MANIFEST).unlink()
    check_baseline(pruned, twin)  # nothing but the shapes is known


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"hidden_size": 64}, {"hidden_size": 32}, "hidden_size is 32, the model's 64"),
        ({"architectures": ["Y"]}, {"architectures": ["X"]}, r"architectures is \['X'\], the model's \['Y'\]"),
        ({"text_config": {"num_experts": 4}}, {"text_config": {"num_experts": 8}}, "num_experts is 8, the model's 4"),
    ],
)
def test_another_architecture_is_named_by_its_first_difference(ours, theirs, message) -> None:
    models = (SimpleNamespace(name=name, config=config) for name, config in (("model", ours), ("other", theirs)))
    with pytest.raises(UsageError, match=rf"'other' is not a baseline of 'model': its {message}"):
        check_baseline(*models)


def test_evaluate_refuses_it_before_reading_anything(tiny, progress) -> None:
    settings = EvaluateSettings(dataset="./gone.txt")
    with pytest.raises(UsageError, match=r"(?s)4 faults.*'./gone.txt': no such file.*its model_type is 'mistral'"):
        evaluate(tiny("llama"), settings, baseline=tiny("mistral"), progress=progress)
