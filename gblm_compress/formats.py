"""The formats of exports: one line in `FORMATS` and one file in `exporters/` each.

See docs/adding-an-exporter.md. Importing this registry loads no torch.
"""

from dataclasses import dataclass

from gblm_compress.layouts import LAYOUTS, Layout

MOST_NONZEROS = 0.75  # of a layer that kernels run packed, if another tool pruned its model
FOLDER_RUNTIMES = ("torch", "vllm")  # Runtimes of a Hugging Face folder; the first evaluates it.


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format, known before its exporter is imported."""

    exporter: str  # the module with its `check` and `export`
    help: str  # half a sentence for `--help`
    runtimes: tuple[str, ...] = FOLDER_RUNTIMES  # the first evaluates it
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")  # the first, if the checkpoint's own is absent
    reads: tuple[str, ...] = ()  # the options of `ExportSettings` that it takes; it refuses the others
    passes: float = 300.0  # its time, in reads of the float32 weights by a CPU
    layout: str | None = None  # a name in `LAYOUTS`
    synonyms: tuple[str, ...] = ()

    @property
    def runtime(self) -> str:
        return self.runtimes[0]

    @property
    def needs_cuda(self) -> bool:
        return self.layout is not None and LAYOUTS[self.layout].needs_cuda

    @property
    def needs_zeros(self) -> bool:
        return self.layout is not None and LAYOUTS[self.layout].needs_zeros


def _packed(name: str, layout: Layout) -> Format:
    kernels = " and ".join(device.upper() for device in layout.kernels)
    width = f" in {layout.width} bits" if layout.width else ""
    weights = "packed weights" if layout.needs_zeros else "all weights, zeros included,"
    help = f"{weights}{width} for PyTorch, {layout.pattern or 'any pattern'}, kernels for {kernels or 'no device'}"
    pattern = None if layout.width else layout.pattern
    synonyms = tuple(other for other in (name, pattern) if other and other != layout.format)
    reads = (*(("group",) if layout.width else ()), *(("keep_head",) if layout.tables else ()))
    return Format(
        exporter="gblm_compress.exporters.sparse",
        help=help,
        reads=reads,
        passes=1100.0 if layout.width else 300.0,
        layout=name,
        synonyms=synonyms,
    )


FORMATS = {
    "onnx": Format(
        exporter="gblm_compress.exporters.onnx",
        help="one graph for ONNX Runtime, in float32 or float16, or 8 or 4 bits with quantise",
        runtimes=("onnxruntime", "genai"),
        dtypes=("float32", "float16"),
        reads=("graph", "kernels", "quantise", "group"),
        passes=1100.0,
    ),
    **{layout.format: _packed(name, layout) for name, layout in LAYOUTS.items()},
}
