"""Under which conditions a run measured what it reports, in words; and the commands that do it again."""

import shlex
from pathlib import Path
from typing import Any

from gblm_compress.machine import environment, noisy
from gblm_compress.runs.job import Job
from gblm_compress.settings import Recipe
from gblm_compress.settings.stages import WRITTEN
from gblm_compress.storage import records

RECIPE = "recipe.json"
"""The recipe of a run in its folder, with what `--set` changed: JSON, which is YAML too."""


def method(recipe: Recipe, pruned: dict[str, Any]) -> str:
    """What was done to the model, in words."""
    zeros = 1 - pruned["nonzeros"] / pruned["weights"]
    pattern = "" if recipe.prune.pattern == "unstructured" else f", {recipe.prune.pattern}"
    fit = f", fit {recipe.prune.fit}" if recipe.prune.fit else ""
    grid = f", {pruned['grid']}" if pruned["grid"] else ""
    trained = ", recovered" if recipe.recover else ""
    return f"{100 * zeros:.0f} % zeros by {recipe.prune.method}{pattern}{fit}{grid}{trained}"


def of(
    recipe: Recipe, pruned: dict[str, Any], evaluation: dict[str, Any] | None, timings: dict[str, Any] | None
) -> dict[str, str]:
    """{what: in words}.

    Args:
        pruned, evaluation, timings: results of the stages; the last two None where there was no such stage.
    """
    found = {}
    if written := recipe.generate:
        begun = f", begun with words of {written.starts}" if written.starts else ""
        found[WRITTEN] = f"{written.tokens:,} tokens by the dense model{begun}, seed {written.seed}"
    if recipe.prune.needs_text:
        text = recipe.calibration
        found["calibration"] = (
            f"{text.dataset}: {text.samples} samples of {text.sequence_length} tokens, seed {text.seed}"
        )
    if evaluation:
        size = f"{evaluation['windows']} {evaluation['sample']}s of at most {evaluation['sequence_length']} tokens"
        found["evaluation"] = f"{evaluation['dataset']}: {size}"
    here = environment()
    if timings:
        settings, here = recipe.benchmark, timings["environment"]
        assert settings is not None
        found["timing"] = (
            f"a prompt of {settings.prompt} tokens, {settings.generate} generated; {settings.repeats} rounds after "
            f"{settings.warmup} of warm-up, models in turn"
        )
        found["machine"] = f"{here['cpu']}, {here['threads']} threads, {here['device']}"
        if warning := noisy(here):
            found["warning"] = warning
    else:
        found["machine"] = here["cpu"]
    found["system"] = f"{here['system']}, {here['cores']} cores, Python {here['python']}"
    found["packages"] = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    for note in pruned.get("warnings", ()):
        found["note"] = f"{found['note']}; {note}" if "note" in found else note
    return found


def commands(job: Job) -> list[str]:
    """What does the run again, from the recipe that lies in its folder."""
    recipe: Path = job.output / RECIPE
    return [f"gblm-compress run {shlex.quote(str(recipe))} -o {shlex.quote(str(job.output))}"]


def as_given(recipe: Recipe) -> str:
    """The keys of a recipe that were given, as the text of a recipe."""
    return records.as_json(recipe.model_dump(mode="json", exclude_unset=True))
