"""Push an artefact of a run to the Hugging Face hub, with its measurements on the card."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from gblm_compress.errors import GblmError, ModelError, UsageError, VerificationError, first_line, translated
from gblm_compress.models import files
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.runs import report as documents
from gblm_compress.runs import run_report
from gblm_compress.runs.run_report import RunReport, headline
from gblm_compress.storage import records

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
NAME = re.compile(r"[\w][\w.-]*", re.ASCII)
REPO = re.compile(rf"{NAME.pattern}/{NAME.pattern}", re.ASCII)


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

    It sends the card, and the files that make the model. Their hashes must be those that the run recorded.

    Raises:
        UsageError: no such artefact, or the hub refuses it.
        ModelError: a file or the card is damaged, or is not a regular file in the folder.
        VerificationError: the files are not those that the report measured.
        GblmError: the upload fails.
    """
    report, folder = run_report.read(run), run / artefact
    known = [row.artefact for row in report.find("bytes") if not row.dense and NAME.fullmatch(row.artefact)]
    if artefact not in known or folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"artefact {artefact!r} is not in {str(run)!r}; its artefacts are {', '.join(known)}")
    if repo is not None and not REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is not the name of a repository; give OWNER/NAME, for example me/my-model-bitmask")
    own = {path.relative_to(folder).as_posix(): path for path in verified(report, run, artefact)}
    prepared = PushResult(complete(report, artefact, _card(folder / CARD)), own)
    if repo is None:
        return prepared
    operations = [CommitOperationAdd(name, path) for name, path in own.items()]
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
    except Exception as error:  # the client and its transports raise many kinds
        raise GblmError(f"the hub does not take {repo!r} ({first_line(error)}); run the same command again") from error


def verified(report: RunReport, run: Path, artefact: str) -> list[Path]:
    """The files of an artefact, after the check that the report measured them."""
    from gblm_compress.runs.job import read_record  # loads torch

    source = ModelSource(artefact, run / artefact)
    stage = {"pruned": "prune", "recovered": "recover"}.get(artefact, f"export {artefact}")
    files.check_folder(source.folder)
    results = [records.as_json(outcome.result) for outcome in report.stages if outcome.name == stage]
    record = read_record(stage, run, Progress(quiet=True))
    if record is None or record.content != source.fingerprint or records.as_json(record.result) not in results:
        raise VerificationError(
            f"{str(source.folder)!r} does not hold the files that {run_report.REPORT} measured: one of them, or the "
            "record of the run, has changed; run the recipe again"
        )
    return files.files_of(source.folder)


def _card(path: Path) -> str:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_CARD:
        raise ModelError(
            f"model card {str(path)!r} is missing, a link, not a regular file or larger than {LARGEST_CARD >> 20} MiB; "
            f"remove {str(path.parent)!r}, and run the recipe again"
        )
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"model card {str(path)!r} is not UTF-8 ({first_line(error)}); save it as UTF-8") from error


def complete(report: RunReport, artefact: str, card: str) -> str:
    """The artefact's card, with measurements: tables for people, `model-index` for the hub."""
    fault = f"the first lines of {artefact}/{CARD}, between '---', are not metadata that the hub reads"
    with translated(lambda said: ModelError(f"{fault} ({said}); correct them")):
        found = ModelCard(card, ignore_metadata_errors=True)
        str(found)
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
    found.text = "\n".join([found.text.rstrip(), *lines, *documents.markdown_tables(report), ""])
    return str(found)
