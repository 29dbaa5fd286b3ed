"""The program that draws charts in a process of its own: JSON in, JSON out. Only this file knows vl-convert.

vl-convert runs Vega-Lite in V8, which reserves far more address space than it ever uses. A limit on the memory of the
calling process (`ulimit -v`) would end it, so that this one lifts its own as far as it may.
"""

import base64
import json
import sys

import vl_convert


def main() -> None:
    """Answer one request: {"charts": {name: specification}, "width": pixels, "scale": factor} with {name: PNG in
    base64}, or {} with the script that draws such specifications in a browser and fetches nothing.
    """
    request = json.load(sys.stdin)
    if request:
        drawn = {
            name: vl_convert.vegalite_to_png(spec | {"width": request["width"]}, scale=request["scale"])
            for name, spec in request["charts"].items()
        }
        answer = {name: base64.b64encode(picture).decode() for name, picture in drawn.items()}
    else:
        answer = {"script": vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")}
    json.dump(answer, sys.stdout)


def lift_limit() -> None:
    """Let this process reserve as much address space as its user may."""
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


if __name__ == "__main__":
    lift_limit()
    main()
