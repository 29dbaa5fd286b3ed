"""Settings of the stages other than pruning."""

from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gblm_compress.formats import FORMATS
from gblm_compress.methods.choices import describe
from gblm_compress.settings.fields import (
    DATA,
    MANY,
    SELF,
    SPARSITY,
    WHERE_ZEROS_GO,
    Count,
    Dtype,
    Fraction,
    GivenText,
    Memory,
    Mix,
    OneOf,
    Panel,
    PatternName,
    Seed,
    Settings,
    Several,
    Source,
    Threads,
    Tokens,
    budget_of,
    joined,
)

RuntimeName = Annotated[
    str,
    OneOf(
        ("torch", "vllm", "onnxruntime", "genai"),
        {"pytorch": "torch", "ort": "onnxruntime", "onnx": "onnxruntime", "onnxruntime-genai": "genai"},
    ),
]


class ComputeSettings(Settings):
    """Dtype and device."""

    dtype: Annotated[Dtype, Panel.RESOURCES] = Field(
        "auto",
        description="Dtype to compute in. auto: on CUDA the checkpoint's own, on a CPU float32; prune keeps bfloat16 "
        "on a CPU that supports it.",
    )
    device: Annotated[str, Panel.RESOURCES] = Field("auto", description="auto, cpu, cuda or cuda:N.")


class ModelSettings(ComputeSettings):
    """The dense model, with dtype and device."""

    source: str = Field(description="A hub id, a local folder, 'demo' or 'tiny'.")


class CalibrationSettings(Settings):
    """The data that pruning measures on."""

    dataset: Mix = Field(
        (Source(dataset=SELF),),
        description=f"self (a language model writes the text itself), {DATA}. Or several, each with a weight, such as "
        "mine.txt=1,self=2.",
    )
    samples: Count = Field(128, description="Number of windows, texts or images.")
    sequence_length: Several = Field(2048, description="Tokens in a window; longer texts are cut to it.")
    seed: Seed = Field(0, description="Random seed for sampling.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.dataset:
            raise ValueError("the dataset has no name")
        if twice := sorted({name for name in self.datasets if self.datasets.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is given twice; give it once, with a weight")
        if idle := [part.datasets[0] for part in self.parts if not part.samples]:
            raise ValueError(
                f"samples is {self.samples}, so {idle[0]!r} would give none; give more samples, or other weights"
            )
        return self

    @property
    def parts(self) -> tuple["CalibrationSettings", ...]:
        """The same for each dataset alone, with its share of the samples; `SELF` last, since it goes on from others."""
        shares = [*accumulate(source.weight for source in self.dataset)]
        ends = [round(self.samples * share / shares[-1]) for share in shares]
        alone = zip(self.dataset, [0, *ends], ends, strict=False)
        parts = (self.model_copy(update={"dataset": (s,), "samples": end - start}) for s, start, end in alone)
        return tuple(sorted(parts, key=lambda part: part.datasets == (SELF,)))

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(source.dataset for source in self.dataset)

    @property
    def name(self) -> str:
        return joined(self.dataset)


class ResourceSettings(Settings):
    """Memory for pruning; does not change the result."""

    memory: Annotated[Memory | None, Panel.RESOURCES] = Field(
        None,
        description="Host memory to use, for example 4GiB; 80 % of the free memory if unset. Hidden states that do not "
        "fit are kept on disk. On a CPU the model stays on disk too if it does not fit.",
    )
    offload: Annotated[bool | None, Panel.NO_OPTION] = Field(
        None, description="Keep the model on disk, and one block in memory; if unset, only when it does not fit."
    )


class RecoverSettings(Settings):
    """Training of a pruned model to predict as the dense one does."""

    data: tuple[Source, ...] = Field(
        (Source(dataset="c4"),),
        min_length=1,
        max_length=100,
        description="Data to train on, each with a weight, for example wiki.txt=0.5,c4=0.5: self (a dense language "
        f"model writes the text), {DATA}.",
    )
    tokens: Tokens = Field(
        2_000_000,
        description="Tokens to train on: 500k, 2M, … Shorter data is repeated. A text of an encoder counts as "
        "sequence_length tokens, an image as its patches.",
    )
    sequence_length: Several = Field(512, description="Tokens in a window; longer texts are cut to it.")
    batch: Annotated[Count, Panel.MORE] = Field(8, description="Windows, texts or images in a step.")
    rate: Annotated[float | None, Panel.MORE] = Field(
        None,
        gt=0,
        description="Peak learning rate, relative to a tensor's root mean square weight. If unset: 0.003 for encoders "
        "and images; for language models 0.0007 after the fits balanced and best, else 0.002.",
    )
    seed: Seed = Field(0, description="Random seed for the order of the windows, and for self.")
    disjoint_from: Annotated[tuple[GivenText, ...], Panel.MORE] = Field(
        (),
        max_length=100,
        description="Texts that the data must not contain, such as evaluation texts. Training is refused if the data "
        "has over 2 % of their 13-word sequences. Only the first ten million tokens of a hub dataset are checked.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokens < self.batch * self.sequence_length:
            raise ValueError(
                f"tokens is {self.tokens:,}, but one step takes {self.batch * self.sequence_length:,}: {self.batch} "
                f"windows of {self.sequence_length}; give more tokens, or smaller steps"
            )
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        return (*(source.dataset for source in self.data), *self.disjoint_from)

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.sequence_length)


class ExportSettings(Settings):
    """One export."""

    format: Annotated[str, OneOf.of(FORMATS)] = Field(description=f"What to write. {describe(FORMATS)}.")
    dtype: Dtype = Field("auto", description="Dtype of the exported weights; auto: the checkpoint's own.")
    graph: Annotated[Literal["fused", "plain"] | None, Panel.MORE] = Field(
        None,
        description="ONNX: fused has few large operators, plain has one node per operation. If unset: fused if the "
        "model has such a graph that runs, else plain.",
    )
    kernels: Literal[False, True, "auto"] = Field(
        False,
        description="ONNX: multiply by the packed weights directly, with this package's operators for CPUs. With dtype "
        "float16, they store float16 and compute in float32. auto (recipes and Python): use them if they were "
        "compiled; else export dense, with a note.",
    )
    quantise: Literal["int8", "int4"] | None = Field(
        None,
        description="ONNX: store weights in 8 or 4 bits, head and embedding in 8. Without kernels, ONNX Runtime's own "
        "operators compute with all weights, zeros included.",
    )
    group: Annotated[Literal[32, 64, 128] | None, Panel.MORE] = Field(
        None,
        description="Columns that share a scale in 8 and 4 bits: 32, 64 or 128. If unset: the whole row in 8 bits, 64 "
        "in 4 bits, and 32 for ONNX Runtime's MatMulNBits.",
    )
    keep_head: Annotated[bool, Panel.MORE] = Field(
        False,
        description="Sparse PyTorch: leave head and embedding as they are. Else 8 and 4 bits store them in 8 bits.",
    )

    @property
    def folder_name(self) -> str:
        """The name of the export's folder in a run."""
        options = (name if value in (True, "auto") else f"{name}-{value}" for name, value in self.own.items())
        return "-".join([self.format, *options, *([] if self.dtype == "auto" else [self.dtype])])

    @property
    def own(self) -> dict[str, Any]:
        """The set options, without the dtype; not all formats read them."""
        return self.model_dump(exclude={"format", "dtype"}, exclude_defaults=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        format = FORMATS[self.format]
        if self.dtype not in ("auto", *format.dtypes):
            raise ValueError(f"{self.format} does not support {self.dtype}; give {' or '.join(format.dtypes)}")
        for name in self.own:
            readers = [other for other, entry in FORMATS.items() if name in entry.reads]
            if self.format not in readers:
                raise ValueError(f"{name} would do nothing: only format {' or '.join(readers)} reads it")
        if self.quantise and self.dtype not in ("auto", "float32"):
            raise ValueError("quantise computes in float32; give no other dtype")
        if self.group and "quantise" in format.reads and not self.quantise:
            raise ValueError("group would do nothing without quantise")
        return self


class AdviseSettings(Settings):
    """Settings of a prediction of size and speed."""

    pattern: PatternName = Field("unstructured", description=f"Where the zeros go: {WHERE_ZEROS_GO}.")
    sparsity: Fraction | None = Field(None, description=SPARSITY)
    blocks: Annotated[Several | None, Panel.MORE] = Field(
        None, description="Blocks of the larger timed model. If unset: five, or more if they are small."
    )
    threads: Threads | None = Field(None, description="CPU threads; as many as torch uses if unset.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        budget_of(self.pattern, self.sparsity)
        return self


class EvaluateSettings(Settings):
    """Data and tasks of an evaluation."""

    dataset: GivenText = Field(
        "wikitext2", description=f"Data to evaluate on: {DATA}. The part for evaluation is read."
    )
    sequence_length: Several = Field(2048, description="Tokens in a window; longer texts are cut to it.")
    max_windows: Count | None = Field(
        None, description="At most this many windows or rows from the start, or random images; all if unset."
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="Zero-shot tasks of lm-eval, for example arc_easy, piqa. The command evaluate then reads a text "
        "only if dataset or max_windows is given.",
    )
    limit: Annotated[Count | None, Panel.MORE] = Field(
        None, description="At most this many questions per task; all if unset."
    )
    include_path: Annotated[str | None, Panel.MORE] = Field(
        None, description="A folder with lm-eval task files of your own."
    )


class BenchmarkSettings(Settings):
    """Shapes, rounds and runtimes of a benchmark."""

    batch: tuple[Count, ...] = Field((1,), min_length=1, description="Batch sizes.")
    prompt: Count = Field(128, description="Tokens in a prompt, or in a text for encoders.")
    generate: Several = Field(
        32, description="Tokens to generate; the prefill gives the first. Encoders generate none."
    )
    repeats: Annotated[int, Panel.MORE] = Field(7, ge=5, le=MANY, description="Timed rounds.")
    warmup: Annotated[int, Panel.MORE] = Field(2, ge=0, le=MANY, description="Warm-up rounds before the timed ones.")
    runtimes: tuple[RuntimeName, ...] = Field(
        ("torch", "onnxruntime"),
        min_length=1,
        description="Runtimes: torch and vllm (in its own environment) for Hugging Face folders, onnxruntime and "
        "genai (onnxruntime-genai) for ONNX exports.",
    )
    float_baseline: Annotated[bool | None, Panel.MORE] = Field(
        None,
        description="Time ONNX exports in 8 and 4 bits against the dense model in float32, not in as many bits. The "
        "speed-up then includes that of quantisation. If unset: only if a recipe prunes nothing.",
    )
    threads: Annotated[Threads | None, Panel.RESOURCES] = Field(
        None, description="CPU threads; as many as torch uses if unset."
    )
