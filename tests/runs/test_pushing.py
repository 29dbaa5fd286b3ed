"""Pushing to a stand-in of the hub: a server of this machine that takes what the hub's own client sends."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard

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
WEIGHTS = bytes(range(256)) * 8


@dataclass
class Hub:
    """What the stand-in was told.

    Attributes:
        refuse: the status that it answers everything with.
        created: repositories, with what was asked of each.
        files: {name: content} of the commits; a large file arrives on a way of its own.
    """

    api: Any = None
    refuse: int | None = None
    created: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The answer to a request, as the hub's documentation has it."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created[name] = asked
            return {"url": f"{self.api.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            return {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in files]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = {one["oid"]: {"upload": {"href": f"{self.api.endpoint}/large/{one['oid']}"}} for one in objects}
            return {"transfer": "basic", "objects": [one | {"actions": actions[one["oid"]]} for one in objects]}
        if method == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return {}
        assert "/commit/" in path, path
        self.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.api.endpoint}/me/m/commit/{'0' * 40}"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of the real hub alone
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Authorization"] == "Bearer hf_secret" or self.command == "PUT"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = {"error": "no"} if told.refuse else told.answer(self.command, self.path.partition("?")[0], body)
            encoded = json.dumps(content).encode()
            self.send_response(told.refuse or 200)
            self.send_header("Content-Length", str(len(encoded)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(encoded)

        do_PUT = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_secret")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield told
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "bitmask"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "gblm_manifest.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client beneath its own transport
def test_all_files_arrive_in_one_commit_with_a_complete_card(hub: Hub, run: Path) -> None:
    write_report(run)
    pushed = pushing.push(run, "bitmask", "me/m", private=True, api=hub.api)
    assert pushed.pushed_to == f"{hub.api.endpoint}/me/m/commit/{'0' * 40}" and hub.commits == 1
    assert list(hub.created) == ["me/m"] and hub.created["me/m"]["visibility"] == "private"
    assert set(hub.files) == {"README.md", "gblm_manifest.json", "model.safetensors"}
    assert hub.files["model.safetensors"] == WEIGHTS and hashlib.sha256(WEIGHTS).hexdigest() in hub.large
    card = ModelCard(hub.files["README.md"].decode())
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found[("piqa", "acc")] == 0.6 and {value for (_, name), value in found.items() if name == "perplexity"} == {
        24
    }
    assert card.data.base_model is None and card.data.library_name == "transformers" and "pruned" in card.data.tags
    for part in ("left dense", "from_pretrained", "## Measured", "decodes 2.00× as fast", "a CPU, 2 threads"):
        assert part in card.text


def test_a_base_model_of_the_hub_stays() -> None:
    card = pushing.complete(report(), [report().rows[2]], CARD.replace('"demo"', "owner/model"))
    assert ModelCard(card).data.base_model == "owner/model"


def test_names_from_outside_are_text_in_a_card() -> None:
    hostile = report(HOSTILE)
    card = pushing.complete(hostile, [hostile.rows[2]], CARD)
    assert "<script>" not in ModelCard(card).text and "\x1b" not in ModelCard(card).text


@pytest.mark.parametrize(("status", "kind"), [(401, UsageError), (403, UsageError), (500, UsageError)])
def test_a_hub_that_refuses(hub: Hub, run: Path, status: int, kind: type[GblmError]) -> None:
    hub.refuse = status
    with pytest.raises(kind, match=r"the hub refuses 'me/m' .*hf auth login"):
        pushing.upload(pushing.prepare(report(), run, "bitmask"), "me/m", private=False, api=hub.api)
    assert hub.files == {}


def test_a_hub_that_does_not_answer(run: Path) -> None:
    closed = HfApi(endpoint="http://127.0.0.1:9", token="hf_secret")
    with pytest.raises(GblmError, match="the hub does not take 'me/m' .*run the same command again"):
        pushing.upload(pushing.prepare(report(), run, "bitmask"), "me/m", private=False, api=closed)


@pytest.mark.parametrize("repo", ["m", "me/m/x", "../x", "me/", "me m/x"])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_sent(hub: Hub, run: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="give OWNER/NAME"):
        pushing.upload(pushing.prepare(report(), run, "bitmask"), repo, private=False, api=hub.api)
    assert not hub.created


@pytest.mark.parametrize("artefact", ["gone", "dense", "pruned", "../run/bitmask"])
def test_an_artefact_that_is_none(run: Path, artefact: str) -> None:
    with pytest.raises(UsageError, match="its artefacts are pruned, bitmask, semi-structured"):
        pushing.prepare(report(), run, artefact)
