"""Models and processors in memory, devices and dtypes. Neither pickled weights nor code of a model is ever loaded."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gblm_compress import tasks
from gblm_compress.errors import MissingDependencyError, ModelError, UsageError, first_line, is_out_of_memory
from gblm_compress.models.files import GRAPH, shapes_of
from gblm_compress.models.source import ModelSource
from gblm_compress.tasks.task import Task

_FEW = 1 << 28  # values that a model may have beyond those in its files: missing ones, masks, tables of positions
_SAFELY = {"trust_remote_code": False, "local_files_only": True}


@contextmanager
def _named_errors(source: ModelSource, reason: str = "") -> Iterator[None]:
    """Add the model's name and `reason` to a library's error for bad files; without a reason, to our `ModelError`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or not (reason or isinstance(error, ModelError)):
            raise
        detail = f"{reason} ({first_line(error)})" if reason else error
        raise ModelError(f"model {source.name!r}: {detail}") from error


def load_model(source: ModelSource, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model in eval mode, with its experts as layers; "auto" is the checkpoint's dtype, which packed ones keep."""
    from gblm_compress.methods.zeros import is_finite
    from gblm_compress.models.checkpoint import Checkpoint

    auto_class = _auto_class(source)
    dtype = "auto" if source.is_packed else dtype
    config = _checked_config(source, auto_class)
    with _named_errors(source, "cannot be loaded"):
        model, info = auto_class.from_pretrained(
            source.folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **_SAFELY
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {source.name!r}: the checkpoint lacks {len(missing)} tensors the architecture needs, "
            f"first {missing[0]!r}; it is incomplete or of another architecture than config.json says"
        )
    model.eval().to(device)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            with _named_errors(source):
                raise Checkpoint(source.folder, model).not_finite(name, parameter.dtype)
    return _prepared_(model)


def load_skeleton(source: ModelSource, dtype: str = "auto") -> Any:
    """As `load_model`, with its parameters on the meta device; its buffers are real."""
    import torch
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    auto_class = _auto_class(source)
    dtype = stored_dtype(source) if dtype == "auto" else dtype
    config = _checked_config(source, auto_class)
    with _named_errors(source, "cannot be built"):
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
        model.tie_weights()  # making it empty has untied it
    # Without such a file, or with one that is not JSON, transformers takes what the config says.
    with _named_errors(source, "its generation_config.json cannot be read"), suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    return _prepared_(model.eval().requires_grad_(False))


def _checked_config(source: ModelSource, auto_class: Any) -> Any:
    """The config of a model; `ModelError` if the files cannot fill it, before any memory is taken for it."""
    import torch

    from gblm_compress.models.checkpoint import Checkpoint

    config = config_of(source)
    with _named_errors(source, "cannot be built"), torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    with _named_errors(source):
        Checkpoint(source.folder, model).check_shapes()
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    # Every layout of packed folders has at least a bit for each weight.
    held = 8 * source.bytes_on_disk if source.is_packed else sum(map(math.prod, shapes_of(source.folder)))
    if needed > max(2 * held, _FEW):
        raise ModelError(
            f"model {source.name!r}: its config.json describes {needed:,} values, and its files hold {held:,}; they "
            "are of different models, or damaged"
        )
    return config


def _prepared_(model: Any) -> Any:
    from gblm_compress.models.experts import unfuse_

    unfuse_(model)
    if getattr(model.config, "rescale_every", 0):  # RWKV would divide its weights when it first runs, for float16
        model.config.rescale_every = 0
    return model


def count_weights(source: ModelSource) -> float:
    """How many weights a folder holds, from its size; head and embedding count once if tied."""
    import torch

    return source.bytes_on_disk / getattr(torch, stored_dtype(source)).itemsize


def check_model(source: ModelSource, verb: str) -> None:
    """`ModelError` for an export, because `verb` needs its source, and for unknown tasks."""
    if source.is_export:
        hint = f", or remove {GRAPH} if it does not belong there" if source.is_onnx else ""
        raise ModelError(
            f"model {source.name!r} is an export; {verb} the Hugging Face folder that it was made from{hint}"
        )
    task_of(source)


def check_length(source: ModelSource, tokens: int, what: str = "sequence length") -> None:
    """`UsageError` if a model that generates has too few positions and no scaling of rotary embeddings."""
    if task_of(source).generates:
        check_positions(source.name, source.config, tokens, what)


def check_positions(name: str, config: dict[str, Any], tokens: int, what: str = "sequence length") -> None:
    config = config | (config.get("text_config") or {})
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    by_kind = [kind for kind in (rotary, *rotary.values()) if isinstance(kind, dict)]  # of attention, in some families
    scaled = any(kind.get("rope_type", kind.get("type", "default")) != "default" for kind in by_kind)
    if positions and tokens > positions and not scaled:
        raise UsageError(f"model {name!r} has {positions} positions; {what} is {tokens}, give {positions} or less")


def task_of(source: ModelSource) -> Task:
    """The task of a model, by the class that its config names and the rest of its folder."""
    import transformers

    found, architectures = tasks.TASKS[tasks.DEFAULT], source.config.get("architectures") or []
    with _named_errors(source):
        for architecture in architectures:
            model_class = getattr(transformers, architecture, None)
            if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
                raise ModelError(
                    f"transformers {transformers.__version__} does not know the architecture {architecture}; custom "
                    "code that ships with a model is not run"
                )
            found = tasks.task_of(model_class)
        return found.of_folder(source.folder)


def _auto_class(source: ModelSource) -> Any:
    import transformers

    if source.is_onnx:
        raise ModelError(f"model {source.name!r} is an export; give the Hugging Face folder that it was exported from")
    return getattr(transformers, task_of(source).auto_class)


def load_processor(source: ModelSource) -> Any:
    """The tokenizer or image processor of a model; `ModelError` if it is missing or unfit."""
    import transformers

    task = task_of(source)
    auto_class = getattr(transformers, task.processor.auto_class)
    advice = f"its {task.processor.name} cannot be loaded; copy the original model's into the folder"
    with _named_errors(source, advice):
        processor = auto_class.from_pretrained(source.folder, **_SAFELY)
    with _named_errors(source):
        task.check_processor(processor)
    return processor


def config_of(source: ModelSource) -> Any:
    """The config as transformers has it, with the architecture's defaults. A call returns no hidden states."""
    from transformers import AutoConfig

    with _named_errors(source, "its config cannot be loaded"):
        config = AutoConfig.from_pretrained(source.folder, **_SAFELY)
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config


def save_processor(processor: Any, folder: Path, source: ModelSource | None = None) -> None:
    """Write a model's processor, so that older libraries can read it, with the `Task.companions` of `source`."""
    processor.save_pretrained(folder)
    if (path := folder / "tokenizer.json").exists():  # indented, it takes twice the bytes
        content = json.loads(path.read_text(encoding="utf-8"))
        merges = content["model"].get("merges", [])
        if merges and all(isinstance(merge, list) and not any(" " in part for part in merge) for merge in merges):
            content["model"]["merges"] = [" ".join(merge) for merge in merges]  # as tokenizers before 0.20 read them
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name transformers 5 writes; others do not know it
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = processor.model_input_names  # theirs includes token_type_ids
        path.write_text(json.dumps(config, indent=2) + "\n")
    if source is None:
        return
    for companion in (path for pattern in task_of(source).companions for path in source.folder.glob(pattern)):
        copied = folder / companion.relative_to(source.folder)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(companion, copied)


def copy_settings(source: ModelSource, folder: Path, processor: Any) -> None:
    """Write the files besides the weights: the configs of the source, and the processor."""
    for name in ("config.json", "generation_config.json"):
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)
    save_processor(processor, folder, source)


def choose_device(requested: str) -> str:
    """ "auto" becomes "cuda" if there is one, else "cpu"; others are checked. Raises `MissingDependencyError`."""
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise UsageError(f"device {requested!r} is not supported; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"device {requested!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
            "give --device cpu, or see `gblm-compress doctor`"
        )
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise MissingDependencyError(
            f"device {requested!r} was asked for, and the last of {count} CUDA devices is cuda:{count - 1}"
        )
    return requested


def choose_dtype(requested: str, source: ModelSource, device: str) -> str:
    """The requested dtype; "auto" is float32 on a CPU, the checkpoint's own elsewhere."""
    if requested != "auto":
        return requested
    return "float32" if device == "cpu" else stored_dtype(source)


def stored_dtype(source: ModelSource) -> str:
    """The dtype that config.json states; float32 if it states none."""
    return source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
