"""The commands on whole runs and their recipes: parse, call, print."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gblm_compress.cli import options as o
from gblm_compress.cli import run_summaries, session
from gblm_compress.errors import GateError, GblmError, UsageError
from gblm_compress.storage import outputs, records

DOCUMENT = "gblm-compress"  # which every document of this program begins with


def run(
    recipe: o.RecipeFile,
    set_: o.Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the artefacts; runs/RECIPE if unset.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="File to write: the gates as JUnit's XML.")] = None,
    summary: Annotated[Path | None, typer.Option(help="File to write: verdict and tables in Markdown.")] = None,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Carry out a recipe: prune, export, evaluate, benchmark, check gates."""
    from gblm_compress.runs.recipe import find_recipe, load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, tuple(set_ or ()))
    folder = output or Path("runs") / path.stem
    outputs.check_workable(folder, "run")
    written = [document for document in (junit, summary) if document is not None]
    if dry_run and written:
        raise UsageError("--junit and --summary would do nothing with --dry-run, which measures nothing")
    for document in written:
        outputs.check_document(document, DOCUMENT)
    progress = session.progress(quiet)

    from gblm_compress import faults
    from gblm_compress.runs import checks, pipeline
    from gblm_compress.runs import dry_run as looking
    from gblm_compress.runs import report as documents

    if dry_run:
        faults.raise_all(checks.check(loaded, progress) + checks.check_output(loaded, folder))
        return session.show(looking.dry_run(loaded, folder, progress).as_dict(), run_summaries.dry_run, json_)
    result = pipeline.run(loaded, folder, progress)
    if junit is not None:
        records.write_text(junit, documents.junit(result))
    if summary is not None:
        records.write_text(summary, documents.markdown(result))
    session.show(result, run_summaries.run, json_)
    if failed := result.failed_gates:
        count = f"{len(failed)} of {len(result.gates)} gates failed"
        raise faults.together(GateError, count, [documents.sentence(gate) for gate in failed])


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `run` wrote, the newest last.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")] = Path("report.html"),
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="End with exit code 6 if a figure of the last run got worse.")
    ] = False,
    json_: o.Json = False,
) -> None:
    """Join the reports of several runs on one page: the last one against the one before it, and all over time."""
    from gblm_compress import faults
    from gblm_compress.runs import history

    result = history.report(runs, output)
    session.show(result, run_summaries.report, json_)
    if (worse := result.regressions) and fail_on_regression:
        raise faults.together(GateError, f"{len(worse)} figures got worse", worse)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `run` wrote.")],
    artefact: Annotated[str, typer.Argument(metavar="ARTEFACT", help="The name of a folder in it: pruned, bitmask, …")],
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Repository to push to. If unset, nothing leaves the machine."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json_: o.Json = False,
) -> None:
    """Show the complete model card and the files of an artefact; with --push-to-hub, push them to the hub."""
    from gblm_compress.runs import pushing

    result = pushing.push(run, artefact, push_to_hub, private=private)
    session.show(result.as_dict(), run_summaries.push, json_)


def validate(recipe: o.RecipeFile, set_: o.Set = None, json_: o.Json = False) -> None:
    """Check a recipe, and whether this machine can carry it out; report all faults. Nothing is downloaded."""
    from gblm_compress import faults
    from gblm_compress.runs.recipe import find_recipe, load_recipe

    def look() -> Any:
        path = find_recipe(recipe)
        loaded = load_recipe(path, tuple(set_ or ()))
        progress = session.progress(quiet=json_)

        from gblm_compress.runs import checks

        faults.raise_all(checks.check(loaded, progress))
        notes = run_summaries.unchecked(checks.unchecked(loaded))
        content = {"valid": True, "faults": [], "recipe": loaded.model_dump(mode="json")}
        session.show(content, lambda content: [f"{path}: valid", *notes], json_)

    try:
        look()
    except GblmError as error:
        if json_:
            session.show({"valid": False, "faults": faults.listed(error), "recipe": None}, None, json_)
        raise


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from gblm_compress.runs.recipe import schema

    print(json.dumps(schema(), indent=2))


COMMANDS = (run, report, push, validate, schema)
