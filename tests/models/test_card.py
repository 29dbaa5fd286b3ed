import json
import shutil

import yaml

from gblm_compress.exporters import export
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings
from gblm_compress.storage.outputs import MANIFEST


def test_the_model_card_gives_its_origin_and_shares_and_obeys_no_name(tiny, tmp_path, progress) -> None:
    """Names come from outside: none may add a line of YAML or Markdown."""
    place = tmp_path / "evil\nlicense: mine\n# [red]"
    shutil.copytree(tiny("llama").folder, place)
    source = ModelSource(str(place), place)
    settings = PruneSettings(method="magnitude", pattern="2:4", ignore=("*.0.self_attn.q_proj",), fit="none")
    result = prune(source, tmp_path / "out", settings, CalibrationSettings(), progress=progress)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "license" not in front and "\n" not in front["base_model"]
    total = sum(layer.shape[0] * layer.shape[1] for layer in result.layers.values())
    head, ignored = 257 * 64, 64 * 64
    assert f"with {100 * total / (total + head + ignored):.1f} % of all linear weights" in card
    assert f"embedding tied: 1 layer, {head:,} weights" in card
    assert f"ignored by pattern '*.0.self_attn.q_proj': 1 layer, {ignored:,} weights" in card


def test_what_a_manifest_says_is_text_on_the_card(tiny, tmp_path, progress) -> None:
    folder = tmp_path / "out"
    settings = PruneSettings(method="magnitude", pattern="2:4", fit="none")
    prune(tiny("llama"), folder, settings, CalibrationSettings(), progress=progress)
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    reason = "head\n# INJECTED \x1b[2J <script> | `code` [x](javascript:)"
    content["left_dense"]["lm_head"]["reason"] = reason
    content["base_model"]["name"] = "a/<img onerror=x>|[x](y)"
    path.write_text(json.dumps(content))
    export(ModelSource("out", folder), tmp_path / "export", ExportSettings(format="bitmask"), progress=progress)
    card = (tmp_path / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "a/<img onerror=x>|[x](y)"
    body = card.split("---", 2)[2]
    assert "\x1b" not in body and "<img" not in body and "<script" not in body and "\n# INJECTED" not in body
    assert r"head\\n# INJECTED \\x1b\[2J &lt;script> \| \`code\` \[x\](javascript:)" in body
