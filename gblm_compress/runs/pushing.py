"""Push an artefact of a run to the Hugging Face hub, with its measurements on the card."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from gblm_compress.errors import GblmError, UsageError, first_line
from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report
from gblm_compress.runs.run_report import RunReport, headline
from gblm_compress.storage.outputs import MANIFEST

CARD = "README.md"
REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
SHOWN = ("Gates", "Quality and size", "Speed and memory", "Tasks")
"""The tables of a card."""


@dataclass(frozen=True)
class PushResult:
    """The model card, the other files {name in the repository: path}, and the commit's address if pushed."""

    card: str
    files: dict[str, Path]
    pushed_to: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"card": self.card, "files": [*self.files, CARD], "pushed_to": self.pushed_to}


def push(run: Path, artefact: str, repo: str | None = None, *, private: bool = False, api: Any = None) -> PushResult:
    """Prepare the upload of an artefact; upload it in one commit if `repo` (OWNER/NAME) is given.

    Raises:
        UsageError: no such artefact, or the hub refuses it.
        GblmError: the upload fails.
    """
    report, folder = run_report.read(run), run / artefact
    known = [row.artefact for row in report.find("bytes") if not row.dense]
    if artefact not in known or not (folder / MANIFEST).is_file() or not (folder / CARD).is_file():
        raise UsageError(f"artefact {artefact!r} is not in {str(run)!r}; its artefacts are {', '.join(known)}")
    if repo is not None and not REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository; give OWNER/NAME, for example me/my-model-bitmask")
    own = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink() and path.name != CARD]
    files = {str(path.relative_to(folder)): path for path in own}
    prepared = PushResult(complete(report, artefact, (folder / CARD).read_text(encoding="utf-8")), files)
    if repo is None:
        return prepared
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations.append(CommitOperationAdd(CARD, prepared.card.encode()))
    hub = api or HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        commit = hub.create_commit(repo, operations, commit_message="Upload by gblm-compress")
        return replace(prepared, pushed_to=str(commit.commit_url))
    except (HfHubHTTPError, ValueError) as error:
        raise UsageError(
            f"the hub refuses {repo!r} ({first_line(error)}); log in with `hf auth login`, with a token that may write "
            "to it"
        ) from error
    except Exception as error:  # the client, its transports and its ways to upload raise kinds of their own
        raise GblmError(f"the hub does not take {repo!r} ({first_line(error)}); run the same command again") from error


def complete(report: RunReport, artefact: str, card: str) -> str:
    """The artefact's card, with measurements: tables for people, `model-index` for the hub."""
    found = ModelCard(card, ignore_metadata_errors=True)
    if not REPO.fullmatch(str(found.data.base_model)):
        found.data.base_model = None  # a local name, which the hub has no page for
    found.data.model_name = artefact
    dataset = str((report.recipe.get("evaluate") or {}).get("dataset", "unknown"))
    found.data.eval_results = []
    for name in (*report.metrics, *report.fidelity, "accuracy"):
        for row in report.find(name, artefact):
            task, _, metric = row.part.removesuffix(")").rpartition(" (")  # "piqa (acc)", or nothing
            result = EvalResult(
                task_type="text-generation" if "perplexity" in report.metrics else "other",
                dataset_type=task or dataset,
                dataset_name=task or dataset,
                metric_type=metric or name,
                metric_value=round(row.value or 0.0, 4),
            )
            found.data.eval_results.append(result)
    lines = ["", "## Measured", "", documents.plain(headline(report, artefact)), ""]
    found.text = "\n".join([found.text.rstrip(), *lines, *documents.markdown_tables(report, SHOWN), ""])
    return str(found)
