"""The matrix of decoder families: `python -m tests.families [FAMILY …] [--steps STEP …] [--page]`.

Every family is built tiny and taken through every step; the outcomes are kept in `results.json`, from which
`docs/families.md` is made. Families and steps that are not asked for keep the outcomes they have.
"""

import argparse
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from gblm_compress.models.finding import silence_libraries
from tests.families.steps import BUILD, PRUNE, STEPS, take
from tests.families.tiny import families
from tests.scripts import ROOT

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "families.md"

_HEAD = """\
# Model families

`make test-families` builds a tiny model of every decoder family that the installed transformers knows, with random
weights, and takes it through every step. This page is the result. A tiny
model shows that a family works, and nothing about speed or quality.

- **prune**: `--method gblm --fit balanced`, at 50 %. At least 90 % of the linear weights in the blocks are pruned,
  routers apart. The folder is reopened by transformers and its zeros are counted.
- **offload**: the same with `--fit fast`, the model on disk and a block at a time in memory.
- **bitmask**: the pruned folder packed, loaded again by transformers, compared bit for bit and by its logits.
- **onnx**: the plain graph in ONNX Runtime against torch, at once and token by token.

How mixtures of experts are pruned is in [Mixtures of experts](mixtures-of-experts.md).
"""


def page(results: dict[str, dict[str, str]]) -> str:
    """The page as Markdown, from {family: {step: outcome}}."""
    shown = STEPS[1:]
    built = {name: steps for name, steps in sorted(results.items()) if steps.get(BUILD) == "ok"}
    work = (sum(steps.get(step) == "ok" for steps in built.values()) for step in shown)
    rows = [
        [f"{len(built)} families", *shown],
        ["---"] * (1 + len(shown)),
        ["**work**", *(f"**{count}**" for count in work)],
        *([name, *(_mark(steps, step) for step in shown)] for name, steps in built.items()),
    ]
    lines = [_HEAD, *(f"| {' | '.join(row)} |" for row in rows), "", "## What is refused, and why", ""]
    refused = ((name, step, steps.get(step, "ok")) for name, steps in built.items() for step in shown)
    lines += [f"- **{name}**, {step}: {_plain(reason)}" for name, step, reason in refused if reason != "ok"]
    if left := {name: steps[BUILD] for name, steps in results.items() if name not in built}:
        lines += ["", "## What was not built", "", *(f"- **{name}**: {_plain(why)}" for name, why in left.items())]
    return "\n".join(lines) + "\n"


def _mark(steps: dict[str, str], step: str) -> str:
    if step in steps:
        return "yes" if steps[step] == "ok" else "no"
    return "–" if steps.get(PRUNE) != "ok" else "not tried"


def _plain(reason: str) -> str:
    return " ".join(reason.split()).replace("<", "&lt;").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="all if none is given")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS), help="those after the first two")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} from the outcomes that there are")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    silence_libraries()
    warnings.simplefilter("ignore")
    for name in [] if options.page else options.families or families():
        with TemporaryDirectory(prefix=f"family-{name}-") as folder:
            outcomes = take(name, Path(folder), options.steps)
        results[name] = results.get(name, {}) | outcomes
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        print(name, *(f"\n    {step}: {outcome}" for step, outcome in outcomes.items() if outcome != "ok"), flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
