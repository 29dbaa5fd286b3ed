"""Which text to calibrate on: every text prunes with every pattern and seed, and texts of several kinds judge.

    python benchmarks/calibration.py result.json --calibration self c4.txt wiki.txt --judges wiki.test.txt demo

An interrupted run goes on where it stopped.
"""

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import gblm_compress
from gblm_compress.machine import environment

PATTERNS = ("unstructured", "2:4")


def perplexities(model: str, judges: list[str]) -> dict[str, float]:
    settings = {"sequence_length": 512, "max_windows": 20, "quiet": True}
    return {
        text: gblm_compress.evaluate(model, dataset=text, **settings).metrics["perplexity"].value for text in judges
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", nargs="+", default=["self", "wikitext2", "c4"])
    parser.add_argument("--judges", nargs="+", default=["wikitext2", "c4", "demo"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    found = (
        json.loads(given.output.read_text()) if given.output.exists() else {"environment": environment(), "rows": []}
    )
    done = {(row["calibration"], row["pattern"], row["seed"]) for row in found["rows"]}
    if "dense" not in found:
        found["dense"] = perplexities(given.model, given.judges)
    for seed, pattern, text in product(range(given.seeds), PATTERNS, given.calibration):
        if (text, pattern, seed) in done:
            continue
        settings = {"calibration": text, "pattern": pattern, "seed": seed, "samples": given.samples}
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/pruned"
            gblm_compress.prune(
                given.model, out, **settings, method="gblm", fit="fast", sequence_length=512, quiet=True
            )
            found["rows"].append({**settings, "perplexity": perplexities(out, given.judges)})
        given.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
