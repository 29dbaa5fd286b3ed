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
from tests.families.page import PAGE, RESULTS, page
from tests.families.steps import STEPS, take
from tests.families.tiny import families


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="all if none is given")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS), help="those after the first two")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} from the outcomes that there are")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.page:
        silence_libraries()
        warnings.simplefilter("ignore")
        for name in options.families or families():
            with TemporaryDirectory(prefix=f"family-{name}-") as folder:
                outcomes = take(name, Path(folder), options.steps)
            results[name] = results.get(name, {}) | outcomes
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(
                name, *(f"\n    {step}: {outcome}" for step, outcome in outcomes.items() if outcome != "ok"), flush=True
            )
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
