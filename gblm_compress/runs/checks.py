"""What can be known of a recipe before its work: every fault at once, as far as the file, this machine and a model that
is here tell. Nothing is fetched, converted or computed.
"""

from functools import partial
from pathlib import Path

from gblm_compress import errors, tasks
from gblm_compress.errors import GblmError
from gblm_compress.models import loading
from gblm_compress.models.finding import find_here
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.runs.job import Job, Recorded
from gblm_compress.runs.stages import stages_of
from gblm_compress.settings import Recipe
from gblm_compress.storage import outputs

ANYWHERE = Path()  # the folder of a run is no matter to what its stages check


def check(recipe: Recipe, progress: Progress) -> list[GblmError]:
    """Every fault of a run that shows before it; `unchecked` says what could not be looked at."""
    here: list[ModelSource | None] = []
    name, device = recipe.model.source, recipe.model.device
    found = errors.collect([lambda: here.append(find_here(name)), partial(loading.choose_device, device)])
    if here and here[0] is not None:
        return found + check_model(recipe, here[0], progress)
    return found + _check_stages(Job.without_model(recipe, ANYWHERE), progress)


def check_model(recipe: Recipe, dense: ModelSource, progress: Progress) -> list[GblmError]:
    """Every fault of a run of a model that is here."""
    if unusable := errors.collect([partial(loading.check_model, dense, "prune")]):
        return unusable + _check_stages(Job.without_model(recipe, ANYWHERE), progress)
    return _check_stages(Job(recipe, dense, True, ANYWHERE), progress)


def check_output(recipe: Recipe, output: Path) -> list[GblmError]:
    """What is in the way of a run: another folder than of a run, or in one a foreign file where a stage will write."""
    stages = stages_of(Job.without_model(recipe, output))
    return errors.collect([partial(outputs.check_workable, output, "run")]) or errors.collect(
        stage.check_place for stage in stages if isinstance(stage, Recorded)
    )


def unchecked(recipe: Recipe) -> list[str]:
    """What `check` does not look at, because it is on the hub or would have to be converted."""
    job = Job.without_model(recipe, ANYWHERE)
    datasets = [name for stage in stages_of(job) if isinstance(stage, Recorded) for name in stage.texts]
    model = [] if find_here(recipe.model.source) else [f"model {recipe.model.source}"]
    given = filter(job.is_given, dict.fromkeys(datasets))
    return model + [f"dataset {name}" for name in given if not tasks.is_here(name)]


def _check_stages(job: Job, progress: Progress) -> list[GblmError]:
    """What the stages find; what several of them find, once."""
    found = [fault for stage in stages_of(job) for fault in stage.check(progress)]
    return list({str(fault): fault for fault in found}.values())
