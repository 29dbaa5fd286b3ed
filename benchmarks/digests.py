"""SHA-256 of weights, packed tensors and graphs, to hold two versions of the program against each other.

    python benchmarks/digests.py tiny before.json        # half a minute
    python benchmarks/digests.py demo before.json        # about fifteen
    python benchmarks/digests.py tiny after.json --against before.json

Prunes by {none, fast, balanced} x {2:4, 50 %, int4} and exports those of none. Both files must come from one machine
with the same packages, under one PYTHONHASHSEED: another CPU adds up in another order. Manifests, model cards and the
compiled library of an export are left out.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

from gblm_compress.cli.app import main

FITS = ("none", "fast", "balanced")
PATTERNS = {"2:4": ["--pattern", "2:4"], "50": [], "int4": ["--quantise", "int4"]}
TEXTS = {"tiny": ["--samples", "4", "--sequence-length", "64"], "demo": ["--samples", "4", "--sequence-length", "128"]}
EXPORTS = {
    "2:4": [["--format", "bitmask"], ["--format", "onnx", "--graph", "plain"]],
    "50": [
        ["--format", "bitmask"],
        ["--format", "bitmask-int8"],
        ["--format", "onnx", "--graph", "plain", "--kernels", "--quantise", "int8"],
    ],
    "int4": [["--format", "bitmask-int4"], ["--format", "onnx", "--graph", "plain", "--kernels", "--quantise", "int4"]],
}
LEFT_OUT = (
    "gblm_manifest.json",
    "README.md",
    "config.json",
    "genai_config.json",
    "tokenizer_config.json",
    "gblm_onnxruntime.so",
)


def call(*arguments: str) -> None:
    """Run the program, in this process: it would take longer to start than to do its work."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*arguments, "--quiet", "--json"])
        except SystemExit as end:
            if end.code:
                sys.exit(f"gblm-compress {' '.join(arguments)} failed")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that holds weights or a graph, {file name: digest}."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in LEFT_OUT
    }


def compare() -> None:
    """Prune, export, write the digests, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=TEXTS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for pattern, options in PATTERNS.items():
            for fit in FITS:
                pruned = home / f"{fit}-{pattern.replace(':', '-')}"
                text = ["--calibration", "demo", *TEXTS[asked.model], "--dtype", "float32", "--allocation", "uniform"]
                call("prune", asked.model, "-o", str(pruned), "--device", "cpu", "--fit", fit, *options, *text)
                found[pruned.name] = digests(pruned)
                for export in EXPORTS[pattern] if fit == "none" else []:
                    exported = home / "export"
                    call("export", str(pruned), "-o", str(exported), "--force", *export)
                    found[f"{pruned.name} {' '.join(export)}"] = digests(exported)
    asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if asked.against:
        before = {
            what: {file: digest for file, digest in files.items() if file not in LEFT_OUT}
            for what, files in json.loads(asked.against.read_text(encoding="utf-8")).items()
        }
        changed = [what for what in before | found if before.get(what) != found.get(what)]
        print(f"{len(before) - len(changed)} of {len(before)} artefacts have the same bytes")
        sys.exit("changed: " + "; ".join(changed) if changed else 0)


if __name__ == "__main__":
    compare()
