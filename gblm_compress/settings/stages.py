"""The settings of the stages beside pruning: computing, model, text, resources, export, evaluation, benchmark."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from gblm_compress.formats import FORMATS
from gblm_compress.methods.choices import describe
from gblm_compress.settings.fields import MANY, Dtype, Memory, Panel, Settings, Synonyms, synonyms_of

if TYPE_CHECKING:  # a type checker cannot read a registry
    FormatName: TypeAlias = str
else:
    FormatName = Literal[*FORMATS]
RuntimeName = Literal["torch", "vllm", "onnxruntime", "genai"]
RUNTIME_SYNONYMS = Synonyms(
    {"pytorch": "torch", "ort": "onnxruntime", "onnx": "onnxruntime", "onnxruntime-genai": "genai"}
)


class ComputeSettings(Settings):
    """How to compute with a model."""

    dtype: Annotated[Dtype, Panel.RESOURCES] = Field(
        "auto",
        description="To compute in; auto is the checkpoint's own on CUDA and float32 on a CPU, where prune computes in "
        "bfloat16 if the checkpoint is and the CPU is faster at it.",
    )
    device: Annotated[str, Panel.RESOURCES] = Field("auto", description="auto, cpu, cuda or cuda:N.")


class ModelSettings(ComputeSettings):
    """The dense model, and how to compute with it."""

    source: str = Field(description="A hub id, a local folder, a .gguf file, or 'demo'.")


class CalibrationSettings(Settings):
    """Which data the statistics are measured on."""

    dataset: str = Field(
        "c4",
        description="wikitext2, c4, a hub dataset, a .txt/.raw/.tokens/.jsonl/.parquet file (.csv, too, for encoders), "
        "a folder of images, or 'demo'.",
    )
    samples: int = Field(128, ge=1, le=MANY, description="Number of windows, or of texts or images.")
    sequence_length: int = Field(2048, ge=2, le=MANY, description="Tokens in a window, or at most in a text.")
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed for sampling.")
    experts: Literal["routed", "all"] = Field(
        "routed",
        description="Mixtures of experts: measure each expert on the tokens that are routed to it, or on all tokens.",
    )


class ResourceSettings(Settings):
    """What pruning may use. None of it changes the result."""

    memory: Annotated[Memory | None, Panel.RESOURCES] = Field(
        None,
        description="Memory of the host to plan with, for example 4GiB: hidden states that do not fit stay on disk, "
        "and so does the model where a CPU prunes; 80 % of what is free if unset.",
    )
    offload: Annotated[bool | None, Panel.RESOURCES] = Field(
        None, description="Keep the model on disk and one block at a time in memory; if unset, where it would not fit."
    )


class ExportSettings(Settings):
    """One export."""

    format: Annotated[FormatName, synonyms_of(FORMATS)] = Field(description=f"What to write. {describe(FORMATS)}.")
    dtype: Dtype = Field("auto", description="Dtype of the exported weights; auto is the checkpoint's own.")
    graph: Literal["fused", "plain"] | None = Field(
        None,
        description="ONNX: fused has few large operators, plain a node for each operation; fused if unset, where the "
        "architecture has one.",
    )
    sparse: bool = Field(False, description="ONNX: store pruned weights packed; ONNX Runtime unpacks them at load.")
    kernels: bool = Field(
        False,
        description="ONNX: multiply by packed weights as they are, on operators of this package (CPU; with dtype "
        "float16 the weights are stored in it and the arithmetic is float32).",
    )
    quantise: Literal["int8", "int4"] | None = Field(
        None,
        description="ONNX: store weights as levels of 8 or 4 bits, those of head and embedding of 8; without kernels "
        "on ONNX Runtime's own operator, which spares no zeros.",
    )
    group: Literal[32, 64, 128] | None = Field(
        None,
        description="Columns that share a scale, of levels of 8 and 4 bits: 32, 64 or 128; if unset, all of a row in 8 "
        "bits and 64 in 4 bits, and 32 on ONNX Runtime's own operator.",
    )

    keep_head: bool = Field(
        False,
        description="Leave head and embedding as they are; formats of 8 and 4 bits store them in 8 bits otherwise.",
    )

    @property
    def folder_name(self) -> str:
        """What the folder of the export is called in a run."""
        options = (name if value is True else f"{name}-{value}" for name, value in self.own.items())
        return "-".join([self.format, *options, *([] if self.dtype == "auto" else [self.dtype])])

    @property
    def own(self) -> dict[str, Any]:
        """The options beside the dtype that differ from their defaults; not all formats read them."""
        return self.model_dump(exclude={"format", "dtype"}, exclude_defaults=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        format = FORMATS[self.format]
        if self.dtype not in ("auto", *format.dtypes):
            raise ValueError(f"{self.format} has no {self.dtype}; give {' or '.join(format.dtypes)}")
        for name in self.own:
            readers = [other for other, entry in FORMATS.items() if name in entry.reads]
            if self.format not in readers:
                raise ValueError(f"{name} would do nothing: it is read with format {' or '.join(readers)}")
        if self.quantise and self.dtype not in ("auto", "float32"):
            raise ValueError("quantise: the arithmetic beside the levels is float32; give no other dtype")
        if self.quantise and self.sparse:
            raise ValueError("quantise writes weights as levels, and sparse as floats; leave one out")
        if self.group and "quantise" in format.reads and not self.quantise:
            raise ValueError("group would do nothing without quantise")
        if self.sparse and self.kernels:
            raise ValueError("each is a way of its own to write the pruned weights; choose sparse or kernels")
        return self


class AdviseSettings(Settings):
    """What advice is asked for."""

    target: Literal["bytes", "latency", "quality"] = Field(
        "latency",
        description="What comes first: few bytes of the weights, low latency (time for a token), or quality (by what "
        "is lost of the weights, which is not measured).",
    )
    blocks: int | None = Field(
        None,
        ge=2,
        le=MANY,
        description="Blocks of the larger of the two models that are tried; five, or more of small ones, if unset.",
    )
    threads: int | None = Field(None, ge=1, le=MANY, description="Threads on the CPU; as many as torch takes if unset.")


class EvaluateSettings(Settings):
    """What to evaluate on."""

    dataset: str = Field("wikitext2", description="As calibration.dataset; the part meant for evaluation is read.")
    sequence_length: int = Field(
        2048, ge=2, le=MANY, description="Tokens in a window of the evaluation, or at most in a text."
    )
    max_windows: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="At most this many windows or rows, from the start, or images, drawn at random; all if unset.",
    )
    tasks: tuple[str, ...] = Field((), description="Zero-shot tasks of lm-eval, for example arc_easy, piqa.")
    limit: int | None = Field(None, ge=1, le=MANY, description="At most this many questions of a task; all if unset.")
    include_path: str | None = Field(None, description="A folder with lm-eval task files of your own.")


class BenchmarkSettings(Settings):
    """What to time."""

    batch: tuple[Annotated[int, Field(ge=1, le=MANY)], ...] = Field((1,), min_length=1, description="Batch sizes.")
    prompt: int = Field(128, ge=1, le=MANY, description="Tokens in a prompt, or in a text for encoders.")
    generate: int = Field(
        32, ge=2, le=MANY, description="Tokens to generate; the prefill gives the first. Encoders generate none."
    )
    repeats: int = Field(7, ge=5, le=MANY, description="Counted rounds.")
    warmup: int = Field(2, ge=0, le=MANY, description="Rounds before them, dropped.")
    runtimes: Annotated[tuple[RuntimeName, ...], RUNTIME_SYNONYMS] = Field(
        ("torch", "onnxruntime"),
        min_length=1,
        description="Where models are timed: Hugging Face folders in torch and vllm (which needs an environment of its "
        "own), ONNX exports in onnxruntime and genai (onnxruntime-genai).",
    )
    threads: Annotated[int | None, Panel.RESOURCES] = Field(
        None, ge=1, le=1024, description="Intra-op threads on the CPU; as many as torch takes if unset."
    )
