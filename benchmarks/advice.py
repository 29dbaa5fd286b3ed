r"""Is `advise` right? Its predictions beside measurements of the whole model, made and timed in the same way.

python benchmarks/advice.py MODEL --json advice.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from cpu_decode import show
from ending import exit_after

from gblm_compress.exporters import export
from gblm_compress.machine import environment
from gblm_compress.measure.benchmarking import generate
from gblm_compress.measure.runtimes import Runtime, load_runtime
from gblm_compress.models.finding import resolve_model, silence_libraries
from gblm_compress.models.loading import config_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import PruneJob, prune
from gblm_compress.runs.advice import PROMPT, WAYS, advise
from gblm_compress.settings import AdviseSettings, ExportSettings, PruneSettings

QUIET = Progress(quiet=True)
ROUNDS, TOKENS = 10, 12


def measured(way: str, dense: ModelSource, pruned: ModelSource, scratch: Path) -> float:
    """Milliseconds that a decode step of the whole model takes."""
    kind, dtype, exported = WAYS[way]
    source = pruned if kind == "pruned" else dense
    if exported is not None:
        artefact = ModelSource(way, scratch / way.replace(", ", "-").replace(" ", "-"))
        export(source, artefact.folder, ExportSettings(**exported), progress=QUIET)
        source = artefact
    runtime = cast(Runtime, load_runtime(source, dtype, "cpu", torch.get_num_threads()))
    config = config_of(dense)
    runs = [generate(runtime, config, 1, PROMPT, TOKENS, seed)["decode_seconds"] for seed in range(ROUNDS + 1)]
    return 1000 * median(runs[1:]) / (TOKENS - 1)


def main() -> None:
    """Ask, measure, print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    silence_libraries()
    dense = resolve_model(options.model, QUIET)
    chosen = PruneSettings(method="magnitude", fit="none")
    advice = advise(dense, AdviseSettings(), progress=Progress())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pruned = ModelSource("pruned", Path(folder) / "pruned")
        prune(PruneJob(dense, chosen), pruned.folder, QUIET)
        for way in WAYS:
            found = next((each for each in advice.predictions if each.name == way), None)
            if found is not None:
                ms = measured(way, dense, pruned, Path(folder))
                error = found.ms_per_token / ms - 1
                rows.append({"way": way, "predicted_ms": found.ms_per_token, "measured_ms": ms, "error": error})
    show(f"{options.model}, advice after {advice.seconds:.0f} s", rows)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    exit_after(main)
