"""Take tiny models of all decoder families through every step: `python -m tests.families [FAMILY …] [--output FILE]`."""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from gblm_compress.errors import GblmError, first_line
from gblm_compress.exporters import export
from gblm_compress.models.finding import silence_libraries
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import byte_tokenizer
from gblm_compress.progress import Progress
from gblm_compress.pruning.stage import prune
from gblm_compress.settings import CalibrationSettings, ExportSettings, PruneSettings, ResourceSettings
from tests.families.tiny import families, tiny_family

QUIET = Progress(quiet=True)
TEXT = "The quick brown fox jumps over the lazy dog. 0123456789 Pack my box with five dozen liquor jugs!\n"
STEPS = ("build", "prune", "share", "offload", "bitmask", "onnx")


def take(name: str, folder: Path, steps=STEPS) -> dict[str, str]:
    """What became of each step of a family: "ok", or the reason why not."""
    done: dict[str, str] = {}

    def step(what, work) -> Any:
        start = time.time()
        try:
            result = work()
            done[what] = "ok"
            return result
        except GblmError as error:
            done[what] = f"refused: {error}"
        except Exception as error:
            done[what] = f"{type(error).__name__}: {first_line(error)}"
            if not isinstance(error, AssertionError): done[what] = "CRASH " + done[what]
        finally:
            done.setdefault("seconds", {})[what] = round(time.time() - start, 1)
        return None

    text = folder / "text.txt"
    text.write_text(TEXT * 40)
    dense, pruned = folder / "dense", folder / "pruned"

    def build() -> bool:
        tiny_family(name).save_pretrained(dense)
        byte_tokenizer().save_pretrained(dense)
        return True

    calibration = CalibrationSettings(dataset=str(text), samples=4, sequence_length=64)
    settings = PruneSettings(method="gblm", sparsity=0.5, fit="balanced")

    def run(output: Path, settings, offload: bool) -> Any:
        return prune(ModelSource(name, dense), output, settings, calibration, resources=ResourceSettings(offload=offload), progress=QUIET)

    if step("build", build):
        result = step("prune", lambda: run(pruned, settings, False))
        if result:
            dense_weights = sum(d.weights for d in result.left_dense.values() if d.reason in ("head", "embedding tied", "router", "outside the blocks"))
            share = result.weights / (result.linear_weights - dense_weights)
            zeros = 1 - result.nonzeros / result.weights
            done["share"] = "ok" if share >= 0.9 else f"{100*share:.1f} %: " + str({n: (d.weights, d.reason) for n, d in list(result.left_dense.items()) if d.reason not in ("head", "embedding tied", "router", "outside the blocks")})[:600]
            done["zeros"] = f"{zeros:.3f}"
            if "offload" in steps: step("offload", lambda: run(folder / "streamed", PruneSettings(method="gblm", sparsity=0.5, fit="fast"), True))
            source = ModelSource(name, pruned)
            if "bitmask" in steps: step("bitmask", lambda: export(source, folder / "bitmask", ExportSettings(format="bitmask"), progress=QUIET))
            if "onnx" in steps:
                step("onnx", lambda: export(source, folder / "onnx", ExportSettings(format="onnx", graph="plain"), progress=QUIET))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", nargs="*", default=list(STEPS))
    options = parser.parse_args()
    silence_libraries()
    warnings.simplefilter("ignore")
    results = {}
    for name in options.families or families():
        with tempfile.TemporaryDirectory(prefix=f"family-{name}-") as folder:
            start = time.time()
            results[name] = take(name, Path(folder), options.steps)
            print(name, f"{time.time() - start:.1f} s", flush=True)
            for what, outcome in results[name].items():
                if outcome != "ok" and what not in ("seconds", "zeros"): print("    ", what, outcome, flush=True)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1))
    print({s: sum(r.get(s) == "ok" for r in results.values()) for s in STEPS}, "all:", sum(all(r.get(s) == "ok" for s in STEPS) for r in results.values()), "of", len(results))

if __name__ == "__main__":
    main()
