"""What each command says to people at its end: tables and lines made from the result's plain values."""

import re
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gblm_compress.cli.layout import plain
from gblm_compress.machine.environment import noisy
from gblm_compress.printing import printable

_PRODUCT = re.compile("MatMul|Gemm|Linear")


def _pairs(pairs: list[tuple[str, str]]) -> Table:
    table = plain(show_header=False)
    for pair in pairs:
        table.add_row(*pair)
    return table


def prune(result: dict[str, Any]) -> list[Any]:
    from gblm_compress.models.card import reasons

    layers, weights, nonzeros = result["layers"], result["weights"], result["nonzeros"]
    patterns = ", ".join(sorted({layer["pattern"] for layer in layers.values()}))
    dense = reasons(result["left_dense"])
    return [
        _pairs(
            [
                (
                    "pruned layers",
                    f"{len(layers)}, with {100 * weights / result['linear_weights']:.1f} % of all linear weights",
                ),
                ("pattern", f"{patterns}, verified on disk"),
                ("nonzeros", f"{nonzeros:,} of {weights:,} ({100 * nonzeros / weights:.2f} %)"),
                *([("grid", f"{result['grid']}; verified on disk")] if result["grid"] else []),
                *([("left dense", dense)] if dense else []),
                ("time", f"{result['seconds']:.1f} s"),
                ("peak memory", decimal(result["peak_memory_bytes"])),
                ("written to", result["folder"]),
            ]
        ),
        *(f"note: {warning}" for warning in result["warnings"]),
    ]


def advise(result: dict[str, Any]) -> list[Any]:
    table = plain("way")
    for name in ("weights", "ms per token", "from–to"):
        table.add_column(name, justify="right")
    for p in result["predictions"]:
        spread = f"{p['low']:.1f}–{p['high']:.1f}"
        table.add_row(p["name"], decimal(p["bytes"]), f"{p['ms_per_token']:.1f}", spread)
    pruning = f"about {_duration(result['pruning_seconds'])}, {decimal(result['pruning_memory_bytes'])} of memory, "
    return [
        table,
        *result["sentences"],
        f"Pruning so would take {pruning}{decimal(result['pruning_disk_bytes'])} of disk.",
        *(f"note: {way} cannot be had: {reason}" for way, reason in result["left_out"].items()),
    ]


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def generate(result: dict[str, Any]) -> Table:
    seconds, tokens = result["seconds"], result["tokens"]
    return _pairs(
        [
            ("texts", f"{result['texts']:,}, of {result['words']:,} words"),
            ("tokens", f"{tokens:,}, in {result['dtype']}"),
            ("time", f"{_duration(seconds)}, {tokens / seconds:,.0f} tokens/s"),
            ("peak memory", decimal(result["peak_memory_bytes"])),
            ("written to", result["file"]),
        ]
    )


def recover(result: dict[str, Any]) -> list[Any]:
    table = plain("tokens", "training loss", "loss, held out", "mask moved")
    for column in table.columns:
        column.justify = "right"
    for number, look in enumerate(result["curve"]):
        loss = "" if look["loss"] is None else f"{look['loss']:.4f}"
        mark = " *" if number == result["best"] else ""
        table.add_row(f"{look['tokens']:,}", loss, f"{look['held_out']:.4f}{mark}", f"{100 * look['moved']:.1f} %")
    kept = result["curve"][result["best"]]
    overlaps = [(f"overlap with {name}", f"{100 * share:.2f} %") for name, share in result["overlap"].items()]
    return [
        table,
        _pairs(
            [
                ("held-out loss", f"{result['before']:.4f} before, {result['after']:.4f} after, nats per token"),
                ("kept", f"the weights after {kept['tokens']:,} tokens (*)"),
                ("trained", f"{result['trained']:,} weights; the pattern is verified on disk"),
                ("text", f"each window read {result['passes']:.1f} times on average"),
                *overlaps,
                ("time", f"{result['seconds']:.1f} s"),
                ("peak memory", decimal(result["peak_memory_bytes"])),
                ("written to", result["folder"]),
            ]
        ),
    ]


def export(result: dict[str, Any]) -> Table:
    size = f"{decimal(result['bytes'])} (source {decimal(result['source_bytes'])})"
    checks = [(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
              for name, value in result["checks"].items()]  # fmt: skip
    return _pairs(
        [
            ("format", result["format"]),
            ("size", size),
            *checks,
            ("time", f"{result['seconds']:.1f} s"),
            ("written to", result["folder"]),
        ]
    )


def evaluate(result: dict[str, Any]) -> list[Any]:
    samples = f"{result['windows']} {result['sample']}{'s' * (result['windows'] != 1)}"
    length = f" of {result['sequence_length']} tokens" if result["sample"] == "window" else ""
    pairs = []
    for metric in result["metrics"][:1]:
        pairs.append((metric, _with_error(result[metric], result[f"{metric}_error"], 3)))
        if result["fidelity"] is not None:
            pairs.append((f"{metric}, dense", f"{result[f'baseline_{metric}']:.3f}"))
    pairs += [_fidelity(name, value, result["sample"]) for name, value in (result["fidelity"] or {}).items()]
    pairs += [
        ("data", f"{result['dataset']}: {samples}{length}"),
        ("computed in", f"{result['dtype']} on {result['provider']}"),
    ]
    return [_pairs(pairs), *([_tasks_table(result["zero_shot"])] if result["zero_shot"] else [])]


def _fidelity(name: str, value: float, sample: str) -> tuple[str, str]:
    known = {
        "mean_kl": ("mean KL from dense", f"{value:z.4f} nats per {'token' if sample == 'window' else sample}"),
        "top1_agreement": ("top-1 agreement", f"{100 * value:.2f} %"),
        "top10_agreement": ("dense top 10 kept", f"{100 * value:.2f} %"),
    }
    return known.get(name, (f"{name.replace('_', ' ')} with dense", f"{value:.4f}"))


def _tasks_table(zero_shot: dict[str, Any]) -> Table:
    table = plain("task", "metric")
    for name in ("questions", "accuracy", "dense", "recovery (95 %)"):
        table.add_column(name, justify="right")
    for t in zero_shot["tasks"]:
        error = "" if t["error"] is None else f" ± {t['error']:.3f}"
        dense = "" if t["dense_accuracy"] is None else f"{t['dense_accuracy']:.3f}"
        accuracy = f"{t['accuracy']:.3f}{error}"
        table.add_row(t["task"], t["metric"], str(t["questions"]), accuracy, dense, _recovery(t["recovery"]))
    table.add_row("mean", "", "", f"{zero_shot['mean_accuracy']:.3f}", "", _recovery(zero_shot["recovery"]))
    return table


def _recovery(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['ratio']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def compare(result: dict[str, Any]) -> list[Any]:
    table = plain("method", "pattern")
    for name in ("seeds", "perplexity", "KL from dense", "accuracy", "recovery", "time", "peak memory"):
        table.add_column(name, justify="right")
    for m in result["rows"]:
        table.add_row(
            m["method"],
            m["pattern"],
            str(m["seeds"]),
            _with_error(m["perplexity"], m["perplexity_error"], 2),
            _with_error(m["mean_kl"], m["mean_kl_error"], 3),
            "" if m["accuracy"] is None else f"{m['accuracy']:.3f}",
            "" if m["recovery"] is None else f"{m['recovery']:.3f}",
            f"{m['seconds']:.0f} s",
            decimal(m["peak_memory_bytes"]),
        )
    return [table, f"dense: perplexity {result['dense_perplexity']:.2f}", f"plot: {result['plot']}"]


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def benchmark(result: dict[str, Any]) -> list[Any]:
    generates = any(m["tpot_ms"] for m in result["measurements"])
    table = plain("model", "runtime")
    times = ("TTFT ms (p10–p90)", "TPOT ms (p10–p90)", "tokens/s") if generates else ("ms (p10–p90)", "samples/s")
    for name in ("batch", *times, "peak", "load s", "on disk"):
        table.add_column(name, justify="right")
    for name in ("prefill", "decode") if generates else ("against dense",):
        table.add_column(name)
    for m in result["measurements"]:
        speedups = (m["prefill_speedup"], m["decode_speedup"]) if generates else (m["prefill_speedup"],)
        table.add_row(
            m["model"],
            f"{m['runtime']} {m['dtype']} ({m['provider']})",
            str(m["batch"]),
            _spread(m["ttft_ms"]),
            *([_spread(m["tpot_ms"])] if generates else []),
            f"{m['tokens_per_second'] if generates else m['samples_per_second']:.1f}",
            decimal(m["peak_memory_bytes"]),
            f"{m['load_seconds']:.1f}",
            decimal(m["bytes_on_disk"]),
            *(speedup["verdict"] if speedup else "baseline" for speedup in speedups),
        )
    machine = result["environment"]
    return [
        table,
        *kernel_lines(result["measurements"]),
        f"{machine['cpu']}, {machine['threads']} threads, device {machine['device']}",
        *([f"warning: {warning}"] if (warning := noisy(machine)) else []),
    ]


def kernel_lines(measurements: list[dict[str, Any]]) -> list[str]:
    """What each model ran, with the batch sizes that it ran it for."""
    batches: dict[str, list[str]] = {}
    for m in measurements:
        batches.setdefault(f"{m['model']}: {_passes(m)}", []).append(str(m["batch"]))
    return [f"{line} (batch {', '.join(of)})" for line, of in batches.items()]


def _passes(m: dict[str, Any]) -> str:
    prefill = _products(m["prefill_kernels"])
    if m["decode_kernels"] is None:
        return f"forward pass on {prefill}"
    decode = _products(m["decode_kernels"])
    return f"prefill on {prefill}; decode on {decode}" if prefill != decode else f"prefill and decode on {decode}"


def _products(kernels: dict[str, int]) -> str:
    """The kernels that multiply by weights; what else a graph has is in the JSON."""
    products = {name: n for name, n in kernels.items() if "(" not in name or _PRODUCT.search(name)}
    return ", ".join(f"{n} × {name}" for name, n in products.items())


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['p10']:.1f}–{spread['p90']:.1f})"


def inspect(result: dict[str, Any]) -> list[Any]:
    table = plain("layer", "shape")
    for name in ("nonzero", "empty rows", "empty columns", "row spread", "column spread"):
        table.add_column(name, justify="right")
    table.add_column("patterns that hold")
    for layer in result["layers"]:
        rows, columns = layer["shape"]
        table.add_row(
            layer["name"],
            f"{rows}×{columns}",
            f"{100 * layer['nonzeros'] / (rows * columns):.2f} %",
            str(layer["empty_rows"]),
            str(layer["empty_columns"]),
            f"{layer['row_spread']:.3f}",
            f"{layer['column_spread']:.3f}",
            ", ".join(layer["patterns"]) or "none",
        )
    kinds = plain("kind of layer", "layers")
    for name in ("nonzero", "rows kept", "rows gone", "columns kept", "columns gone"):
        kinds.add_column(name, justify="right")
    for kind in result["kinds"]:
        shares = ("nonzeros", "kept_rows", "gone_rows", "kept_columns", "gone_columns")
        kinds.add_row(kind["kind"], str(kind["layers"]), *(f"{100 * kind[name]:.2f} %" for name in shares))
    share = 100 * result["nonzeros"] / result["weights"]
    total = f"{result['nonzeros']:,} of {result['weights']:,} weights are nonzero ({share:.2f} %)"
    return [table, kinds, total, *([f"heat map: {result['heat_map']}"] if result["heat_map"] else [])]


def doctor(content: dict[str, Any]) -> Table:
    table = plain("", "found", "enables")
    for finding in content["findings"]:
        mark = "" if finding["ok"] else "!! "
        found = Text.assemble((mark, "bold red"), printable(finding["found"]))
        table.add_row(finding["subject"], found, finding["enables"])
    return table
