"""`docs/families.md`, from the outcomes of the matrix."""

from collections import Counter
from pathlib import Path

from tests.families.steps import BUILD, PRUNE, STEPS

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = """\
# Model families

`make test-families` builds a tiny model of every decoder family that the installed transformers knows, from the
family's own config class and with random weights, and takes it through every step. This page is its result. A tiny
model shows that a family works, and nothing about speed or quality.

- **prune**: `--method gblm --fit balanced`, at 50 %. At least 90 % of the linear weights in the blocks are pruned,
  routers apart. The folder is reopened by transformers and its zeros are counted.
- **offload**: the same with `--fit fast`, the model on disk and a block at a time in memory.
- **bitmask**: the pruned folder packed, loaded again by transformers, compared bit for bit and by its logits.
- **onnx**: the plain graph in ONNX Runtime against torch, at once and token by token.

How mixtures of experts are pruned is in [Mixtures of experts](mixtures-of-experts.md).
"""
_SHOWN = STEPS[1:]


def page(results: dict[str, dict[str, str]]) -> str:
    """The page as Markdown.

    Args:
        results: {family: {step: outcome}}.
    """
    built = {name: steps for name, steps in results.items() if steps.get(BUILD) == "ok"}
    lines = [_HEAD, f"| {len(built)} families | {' | '.join(_SHOWN)} |", "| --- |" + " --- |" * len(_SHOWN)]
    counts = Counter(step for steps in built.values() for step in _SHOWN if steps.get(step) == "ok")
    lines.append("| **work** | " + " | ".join(f"**{counts[step]}**" for step in _SHOWN) + " |")
    for name, steps in built.items():
        lines.append(f"| {name} | " + " | ".join(_mark(steps, step) for step in _SHOWN) + " |")
    lines += ["", "## What is refused, and why", ""]
    lines += [
        f"- **{name}**, {step}: {_plain(steps[step])}"
        for name, steps in built.items()
        for step in _SHOWN
        if steps.get(step, "ok") != "ok"
    ]
    left = {name: steps[BUILD] for name, steps in results.items() if steps.get(BUILD) != "ok"}
    if left:
        lines += ["", "## What was not built", ""]
        lines += [f"- **{name}**: {_plain(reason)}" for name, reason in left.items()]
    return "\n".join(lines) + "\n"


def _mark(steps: dict[str, str], step: str) -> str:
    if step in steps:
        return "yes" if steps[step] == "ok" else "no"
    return "–" if steps.get(PRUNE) != "ok" else "not tried"


def _plain(reason: str) -> str:
    """A reason in one line that Markdown shows as it is."""
    return " ".join(reason.split()).replace("<", "&lt;").replace("|", "\\|")
