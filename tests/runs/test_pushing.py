"""What is pushed to the hub: an artefact's own files and a card with what was measured, and nothing unasked."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest
from huggingface_hub import ModelCard

from gblm_compress.errors import GblmError, UsageError
from gblm_compress.runs import pushing
from tests.runs.reports import HOSTILE, report, write_report

CARD = """---
base_model: "demo"
library_name: transformers
tags: [pruned, sparse, gblm-compress]
---
# demo

| left dense | head: 1 layer, 100 weights |

```python
AutoModelForCausalLM.from_pretrained(folder)
```
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "bitmask"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "gblm_manifest.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    write_report(tmp_path / "run")
    return tmp_path / "run"


def test_own_files_arrive_in_one_commit_with_a_complete_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (run / "bitmask" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (run / "bitmask" / "folder").symlink_to(tmp_path)
    hub = MagicMock(**{"create_commit.return_value.commit_url": "https://hub/me/m/commit/0"})
    pushed = pushing.push(run, "bitmask", "me/m", private=True, api=hub)
    assert pushed.pushed_to == "https://hub/me/m/commit/0"
    hub.create_repo.assert_called_once_with("me/m", private=True, exist_ok=True)
    hub.create_commit.assert_called_once()
    files = {}
    for operation in hub.create_commit.call_args.args[1]:
        with operation.as_file() as file:
            files[operation.path_in_repo] = file.read()
    assert set(files) == {"README.md", "gblm_manifest.json", "model.safetensors"} == {*pushed.as_dict()["files"]}
    assert files["model.safetensors"] == bytes(range(256))
    card = ModelCard(files["README.md"].decode())
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found["piqa", "acc"] == 0.6 and found["unknown", "perplexity"] == 24
    assert card.data.base_model is None and card.data.library_name == "transformers" and "pruned" in card.data.tags
    for part in ("left dense", "from_pretrained", "## Measured", "decodes 2.00× as fast", "a CPU, 2 threads"):
        assert part in card.text


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
    for artefact in ("gone", "dense", "pruned", "../run/bitmask"):
        with pytest.raises(UsageError, match="its artefacts are pruned, bitmask, semi-structured"):
            pushing.push(run, artefact)
