"""What is pushed to the hub: an artefact's own files and a card with what was measured, and nothing unasked."""

import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from huggingface_hub import ModelCard

from gblm_compress.errors import GblmError, ModelError, UsageError, VerificationError
from gblm_compress.runs import pushing
from tests.conftest import flip_a_bit
from tests.runs.reports import HOSTILE, report, write_artefact, write_report

CARD = """---
base_model: "demo"
library_name: transformers
tags: [pruned, sparse, gblm-compress]
---
# demo

| left dense | head: 1 layer, 100 weights |
"""


@pytest.fixture
def run(tiny, tmp_path: Path) -> Path:
    write_report(tmp_path / "run")
    write_artefact(tmp_path / "run", tiny("llama").folder, CARD)
    return tmp_path / "run"


def test_own_files_arrive_in_one_commit_with_a_complete_card(run: Path, tiny, tmp_path: Path) -> None:
    folder = run / "bitmask"
    for name in (".env", ".git/config", "id_rsa", "notes.txt", "optimizer.bin", "1_Pooling/secret.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "link.py").symlink_to(folder / "id_rsa")
    (folder / "folder").symlink_to(tmp_path)
    hub = MagicMock(**{"create_commit.return_value.commit_url": "https://hub/me/m/commit/0"})
    pushed = pushing.push(run, "bitmask", "me/m", private=True, api=hub)
    assert pushed.pushed_to == "https://hub/me/m/commit/0"
    hub.create_repo.assert_called_once_with("me/m", private=True, exist_ok=True)
    hub.create_commit.assert_called_once()
    files = {}
    for operation in hub.create_commit.call_args.args[1]:
        with operation.as_file() as file:
            files[operation.path_in_repo] = file.read()
    model = {path.name: path.read_bytes() for path in tiny("llama").folder.iterdir()}
    card = ModelCard(files.pop("README.md").decode())
    assert files == model | {"gblm_manifest.json": b"{}"} and [*files, "README.md"] == pushed.as_dict()["files"]
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found["piqa", "acc"] == 0.6 and found["unknown", "perplexity"] == 24
    assert card.data.base_model is None and card.data.library_name == "transformers" and "pruned" in card.data.tags
    for part in ("left dense", "## Measured", "2.00× as fast", "a CPU, 2 threads"):
        assert part in card.text


def linked(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


@pytest.mark.parametrize(
    ("name", "damage", "kind", "message"),
    [
        ("model.safetensors", flip_a_bit, VerificationError, "does not hold the files that report.json measured"),
        ("gblm_manifest.json", lambda path: path.write_text('{"files": [".env"]}'), VerificationError, "run the rec"),
        ("gblm_onnxruntime.so", Path.touch, VerificationError, "run the recipe"),
        ("../.stages/export-bitmask.json", Path.unlink, VerificationError, "the record of the run, has changed"),
        ("..", lambda run: write_report(run, stages=[]), VerificationError, "report.json measured"),
        ("config.json", linked, ModelError, "link out of the folder"),
        ("README.md", Path.unlink, ModelError, "model card '.*README.md' is missing"),
        ("README.md", linked, ModelError, "model card '.*README.md' is missing, a link"),
        ("README.md", lambda path: path.write_bytes(b"\xff"), ModelError, "is not UTF-8"),
        ("README.md", lambda path: path.write_text("---\ntags: 5\n---\n"), ModelError, "are not metadata that the hub"),
    ],
)
def test_nothing_is_sent_of_an_artefact_that_is_not_what_was_measured(run, name, damage, kind, message) -> None:
    damage(run / "bitmask" / name)
    hub = MagicMock()
    with pytest.raises(kind, match=message) as error:
        pushing.push(run, "bitmask", "me/m", api=hub)
    assert type(error.value) is kind and "\n" not in str(error.value) and not hub.mock_calls


def test_an_artefact_is_a_folder_of_the_run(run: Path, tmp_path: Path) -> None:
    for artefact in ("gone", "dense", "pruned"):
        with pytest.raises(UsageError, match="its artefacts are pruned, bitmask, semi-structured"):
            pushing.push(run, artefact)
    shutil.copytree(run / "bitmask", tmp_path / "secret")
    for name in ("../secret", "bitmask/../../secret", "."):
        write_report(run, name=name)
        with pytest.raises(UsageError, match="its artefacts are pruned, semi-structured"):
            pushing.push(run, name)
    write_report(run)
    linked(run / "bitmask")
    with pytest.raises(UsageError, match="'bitmask' is not in"):
        pushing.push(run, "bitmask")


def test_a_base_model_of_the_hub_stays_and_names_from_outside_are_text() -> None:
    card = ModelCard(pushing.complete(report(HOSTILE), HOSTILE, CARD.replace('"demo"', "owner/model")))
    assert card.data.base_model == "owner/model"
    assert "<script>" not in card.text and "\x1b" not in card.text


def test_a_hub_that_refuses_or_does_not_answer(run: Path) -> None:
    for error, kind, message in (
        (ValueError("403"), UsageError, "the hub refuses 'me/m' .*hf auth login"),
        (OSError("no route"), GblmError, "the hub does not take 'me/m' .*run the same command again"),
    ):
        with pytest.raises(kind, match=message):
            pushing.push(run, "bitmask", "me/m", api=MagicMock(**{"create_repo.side_effect": error}))


def test_nothing_is_sent_unasked_or_under_a_wrong_name(run: Path) -> None:
    hub = MagicMock()
    assert pushing.push(run, "bitmask", api=hub).pushed_to is None
    for repo in ("m", "me/m/x", "../x", "me/", "me m/x"):
        with pytest.raises(UsageError, match="give OWNER/NAME"):
            pushing.push(run, "bitmask", repo, api=hub)
    assert not hub.mock_calls
