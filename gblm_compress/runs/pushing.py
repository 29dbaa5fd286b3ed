"""An artefact of a run on the Hugging Face hub, with a card that states what was measured of it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from gblm_compress.errors import GblmError, UsageError, first_line
from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report, tables
from gblm_compress.runs.run_report import RunReport, headline_of
from gblm_compress.runs.summary import ModelSummary
from gblm_compress.storage.outputs import MANIFEST

CARD = "README.md"
REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
SHOWN = ("Gates", "Quality and size", "Speed and memory", "Tasks")
"""The tables that a card has."""


@dataclass(frozen=True)
class PushResult:
    """What is pushed.

    Attributes:
        folder: of the artefact.
        card: its model card, complete.
        files: everything else in the folder, by the names that they have in the repository.
        pushed_to: the address of the commit; None where nothing left the machine.
    """

    folder: Path
    card: str
    files: dict[str, Path]
    pushed_to: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"card": self.card, "files": [*self.files, CARD], "pushed_to": self.pushed_to}


def push(
    run: Path, artefact: str, repo: str | None = None, *, private: bool = False, api: HfApi | None = None
) -> PushResult:
    """Put together what an artefact looks like on the hub, and push it if a repository is named.

    Args:
        run: folder of the run.
        artefact: the name of a folder in it.
        repo: OWNER/NAME; if None, nothing leaves the machine.
        private: whether a new repository is.
        api: the hub's client; that of the user's login if None.

    Raises:
        UsageError: as `prepare` and `upload`.
        GblmError: as `upload`.
    """
    prepared = prepare(run_report.read(run), run, artefact)
    if repo is None:
        return prepared
    return replace(prepared, pushed_to=upload(prepared, repo, private=private, api=api))


def prepare(report: RunReport, run: Path, artefact: str) -> PushResult:
    """Put together what would be pushed.

    Args:
        run: folder of the run.
        artefact: the name of a folder in it.

    Raises:
        UsageError: the run has no such artefact, or its folder is gone.
    """
    rows = [row for row in report.pruned_rows if row.model == artefact]
    folder = run / artefact
    if not rows or not (folder / MANIFEST).is_file():
        known = ", ".join(dict.fromkeys(row.model for row in report.pruned_rows))
        raise UsageError(f"artefact {artefact!r} is not in {str(run)!r}; its artefacts are {known}")
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != CARD
    }
    return PushResult(folder, complete(report, rows, (folder / CARD).read_text(encoding="utf-8")), files)


def complete(report: RunReport, rows: list[ModelSummary], card: str) -> str:
    """The card that came with an artefact, with what was measured: for people in tables, for the hub as `model-index`.

    Args:
        rows: of the artefact.
        card: as pruning or export wrote it, which says how to load it and what was left dense.
    """
    found = ModelCard(card, ignore_metadata_errors=True)
    if not REPO.fullmatch(str(found.data.base_model)):
        found.data.base_model = None  # a local name, which the hub has no page for
    found.data.model_name = rows[0].model
    found.data.eval_results = results(report, rows)
    lines = ["", "## Measured", "", documents.plain(headline_of(report, rows[0])), ""]
    for table in tables.of(report):
        if table.title in SHOWN:
            lines += documents.markdown_table(table)
    lines += [f"- {documents.plain(name)}: {documents.plain(value)}" for name, value in report.conditions.items()]
    found.text = found.text.rstrip() + "\n" + "\n".join(lines) + "\n"
    return str(found)


def results(report: RunReport, rows: list[ModelSummary]) -> list[EvalResult]:
    """What was measured, as the hub's `model-index` has it."""
    dataset = str((report.recipe.get("evaluate") or {}).get("dataset", "unknown"))
    task = {"task_type": "text-generation" if "perplexity" in rows[0].metrics else "other"}
    text = task | {"dataset_type": dataset, "dataset_name": dataset}
    found = [
        EvalResult(**text, metric_type=name, metric_value=round(metric.value, 4))
        for name, metric in rows[0].metrics.items()
        if metric.value is not None
    ]
    found += [
        EvalResult(**text, metric_type=name, metric_value=round(value, 4))
        for name, value in rows[0].fidelity.items()
        if value is not None
    ]
    for asked in rows[0].tasks.tasks if rows[0].tasks else ():
        names = task | {"dataset_type": asked.task, "dataset_name": asked.task}
        found.append(EvalResult(**names, metric_type=asked.metric, metric_value=round(asked.accuracy, 4)))
    return found


def upload(prepared: PushResult, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Create the repository where there is none, and commit all files at once.

    Returns:
        The address of the commit.

    Raises:
        UsageError: `repo` is no name of a repository, or the hub refuses it.
        GblmError: the hub does not answer, or an upload fails.
    """
    if not REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository; give OWNER/NAME, for example me/my-model-bitmask")
    hub = api or HfApi()
    operations = [CommitOperationAdd(name, path) for name, path in prepared.files.items()]
    operations.append(CommitOperationAdd(CARD, prepared.card.encode()))
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.create_commit(repo, operations, commit_message="Upload by gblm-compress").commit_url)
    except (HfHubHTTPError, ValueError) as error:
        raise UsageError(
            f"the hub refuses {repo!r} ({first_line(error)}); log in with `hf auth login`, with a token that may write "
            "to it"
        ) from error
    except Exception as error:  # the client, its transports and its ways to upload raise kinds of their own
        raise GblmError(f"the hub does not take {repo!r} ({first_line(error)}); run the same command again") from error
