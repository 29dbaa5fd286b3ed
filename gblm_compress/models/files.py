"""Which files of a folder make a model, and whether they are safe to read: asked once, before anything else reads them.

transformers reads one set of weights of a folder, and everything here reads the same: what `config.json` names, else
`model.safetensors`, else the files in `model.safetensors.index.json`. What lies beside them (an original
`consolidated.safetensors`, say) is no part of the model. Importing this module loads neither torch nor transformers.
"""

import json
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gblm_compress.errors import ModelError, first_line
from gblm_compress.storage.records import read_json

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SPARSE_SINGLE, SPARSE_INDEX = "gblm_sparse.safetensors", "gblm_sparse.safetensors.index.json"
"""What the weights of packed folders are called: names that transformers finds only once this package is imported."""

SPARSE_METHOD = "gblm_sparse"
GRAPH = "model.onnx"
FLOATS = ("float32", "float16", "bfloat16")
_LIGHT = re.compile(
    r"(config|generation_config|genai_config|special_tokens_map|added_tokens|gblm_manifest)\.json"
    r"|(preprocessor_config|processor_config|modules|sentence_bert_config)\.json"
    r"|(tokenizer|vocab|chat_template).*|merges\.txt|.*\.(jinja|model|tiktoken)"
)
"""What beside weights or graph decides what a model computes; a note or a license does not."""

_READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".onnx", ".data", ".onnx_data")
_OF_GRAPHS = (".onnx", ".data", ".onnx_data")
_FOLDERS = ("additional_chat_templates", "[0-9]_*")  # those that transformers and sentence-transformers read
_LARGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no more


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's `config.json`, of which the keys that are read here have the right types.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from pydantic import ValidationError

    from gblm_compress.models.config_keys import ConfigKeys

    path = folder / CONFIG
    try:
        content = read_json(path)
        ConfigKeys.model_validate(content)
    except FileNotFoundError as error:
        raise ModelError(f"{str(folder)!r} has no {CONFIG}, so it is no Hugging Face model") from error
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        given = json.dumps(fault["input"], default=str)[:80]
        reason = "it names no model_type" if fault["type"] == "missing" else f"{key}: {fault['msg']}, got {given}"
        raise ModelError(f"{str(path)!r} is damaged: {reason}") from error
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    for name in ("dtype", "torch_dtype"):
        if content.get(name) not in (None, *FLOATS):
            raise ModelError(
                f"{str(path)!r}: {name} is {str(content[name])!r}; models in {', '.join(FLOATS)} can be read here"
            )
    return content


def check_folder(folder: Path) -> None:
    """Make sure that a model's folder can be read without reading anything else.

    Raises:
        ModelError: a file that loading would open is no regular file, leads out of the folder, is no model's, or is
            damaged; the folder holds an adapter, or a model that another tool has quantised.
    """
    for path in _files(folder):
        _check_file(path, folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{str(folder)!r} holds a LoRA adapter, not a whole model; merge it into its base model first "
            "(peft: `merge_and_unload()`, then `save_pretrained`)"
        )
    config = read_config(folder)
    quantised = config.get("quantization_config") or {}
    method = quantised.get("quant_method")
    if quantised and method != SPARSE_METHOD:
        raise ModelError(
            f"{str(folder)!r} is quantised ({method or 'by an unknown method'}), and its weights are no plain numbers; "
            "prune the original model"
        )
    if (folder / GRAPH).exists():
        check_graph(folder)
    else:
        _check_sizes(folder, config, weight_files(folder))


def _check_sizes(folder: Path, config: dict[str, Any], weights: list[Path]) -> None:
    """A model is built from its config before a tensor is read: one layer or expert after the other, however many.

    Raises:
        ModelError: the config names more layers than there are tensors, or more experts than there are tensors, and
            rows in the largest.
    """
    from gblm_compress.models.config_keys import EXPERTS, LAYERS

    tensors = [entry for path in weights for entry in read_header(path)[0].values()]
    widest = max((size for entry in tensors for size in entry["shape"]), default=0)  # of a router, or of fused experts
    limits = dict.fromkeys(LAYERS, len(tensors)) | dict.fromkeys(EXPERTS, max(len(tensors), widest))
    for part in (config, config.get("text_config") or {}):
        for key, most in limits.items():
            given = part.get(key)
            if max(given if isinstance(given, list) else [given or 0], default=0) > most:
                raise ModelError(
                    f"{str(folder / CONFIG)!r}: {key} is {given}, but the weight files hold {len(tensors)} tensors, "
                    f"room for {most} at most; config.json and weights are of different models, or damaged"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder, in order.

    Raises:
        ModelError: there are none, the index is damaged, or a file is missing, outside the folder or no safetensors.
    """
    index = index_file(folder)
    if index is None:
        return [_single(folder)]
    try:
        weight_map = read_json(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(index)!r} is damaged: {first_line(error)}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{str(index)!r} is damaged: it has no weight_map of tensors to files")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{str(index)!r} names the file {name!r}; it must be a .safetensors file in the same folder (pickled "
                "weights are never loaded)"
            )
    files = [folder / name for name in sorted(set(names))]
    for path in files:
        _check_safetensors(path, folder)
    return files


def index_file(folder: Path) -> Path | None:
    """The index through which transformers reads a folder's weights; None where it reads a single file."""
    named = _named_weights(folder)
    if named is not None:
        return folder / named if named.endswith(".index.json") else None
    single, index = (SPARSE_SINGLE, SPARSE_INDEX) if _is_packed(folder) else (SINGLE, INDEX)
    return folder / index if not (folder / single).exists() and (folder / index).exists() else None


def check_graph(folder: Path) -> None:
    """Raises:
    ModelError: the ONNX graph cannot be parsed, or its data lies outside the folder.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    path = folder / GRAPH
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise their own kinds for bytes that are no graph
        raise ModelError(f"{str(path)!r} is no ONNX graph, or a truncated one ({first_line(error)})") from error
    for tensor in _tensors(graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        name = ExternalDataInfo(tensor).location
        if not name or Path(name).name != name:
            raise ModelError(f"{str(path)!r}: the data of {tensor.name!r} is in {name!r}, outside the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{str(path)!r}: the data of {tensor.name!r} is in {name!r}, which is missing")
        _check_file(folder / name, folder)


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors of an ONNX model, those of its functions, of subgraphs and of attributes too."""
    import onnx

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, Sequence) else (value,):
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from _tensors(part)


def files_of(folder: Path) -> list[Path]:
    """The files that make a model, in order of their names: weights or graph, configs, tokenizer.

    Raises:
        ModelError: as `weight_files`.
    """
    index = index_file(folder)
    light = [path for path in _files(folder) if path.is_file() and _LIGHT.fullmatch(path.name)]
    return sorted({*_heavy(folder), *light, *([index] if index else [])})


def bytes_of(folder: Path) -> int:
    """Size of the weights, or of an ONNX graph and its data, in bytes.

    Raises:
        ModelError: as `weight_files`.
    """
    return sum(path.stat().st_size for path in _heavy(folder))


def _heavy(folder: Path) -> list[Path]:
    if (folder / GRAPH).exists():
        return [path for path in folder.iterdir() if path.suffix in _OF_GRAPHS]
    return weight_files(folder)


def _named_weights(folder: Path) -> str | None:
    """The file that `config.json` names as the weights; transformers looks there alone."""
    named = read_config(folder).get("transformers_weights")
    if named is None:
        return None
    if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{str(folder / CONFIG)!r} names {named!r} as its weights; it must be a .safetensors file, or the index of "
            "some, in the same folder (pickled weights are never loaded)"
        )
    return named


def _is_packed(folder: Path) -> bool:
    """Whether the weights have the names of packed ones; `save_pretrained` gives them the ordinary names again."""
    return any((folder / name).exists() for name in (SPARSE_SINGLE, SPARSE_INDEX))


def _single(folder: Path) -> Path:
    path = folder / (_named_weights(folder) or (SPARSE_SINGLE if _is_packed(folder) else SINGLE))
    if not path.exists():
        hint = ""
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            hint = "; pickled weights are never loaded: convert the model with save_pretrained first"
        elif other := sorted(folder.glob("*.safetensors")):
            hint = f"; {other[0].name!r} is not a name that transformers reads"
        raise ModelError(f"{str(folder)!r} has no {path.name} and no {INDEX}{hint}")
    _check_safetensors(path, folder)
    return path


def _files(folder: Path) -> list[Path]:
    """What loading a model may open: files of the folder by their suffix, links and special files included."""
    try:
        entries = sorted(folder.iterdir())
        for below in sorted(path for pattern in _FOLDERS for path in folder.glob(pattern) if path.is_dir()):
            entries += sorted(below.iterdir())
    except OSError as error:
        raise ModelError(f"{str(folder)!r} cannot be read: {error.strerror}") from error
    return [path for path in entries if path.suffix in _READ]


def _check_file(path: Path, folder: Path) -> None:
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelError(f"{str(path)!r} leads nowhere: a broken link, or a missing file") from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{str(path)!r} is no regular file; nothing of this folder is read")
    if not target.is_relative_to(folder.resolve()) and not _is_hub_blob(target, folder):
        raise ModelError(f"{str(path)!r} is a link out of the folder, to {str(target)!r}; put the file itself there")


def _is_hub_blob(target: Path, folder: Path) -> bool:
    """Whether a link leads where the cache of the Hugging Face hub keeps its files: snapshots/REVISION beside blobs."""
    folder = folder.resolve()
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"


def _check_safetensors(path: Path, folder: Path) -> None:
    """What of a safetensors file is read here rather than by its library: the length and the JSON of its header."""
    if not path.exists():
        raise ModelError(f"{str(path)!r} is missing; the checkpoint is incomplete")
    _check_file(path, folder)
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The header of a safetensors file: its tensors' entries, its metadata, and where its data begins.

    Raises:
        ModelError: the file is damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks lengths, types, shapes and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r}: damaged safetensors file ({first_line(error)})") from error
    metadata = header.pop("__metadata__", None) or {}
    return header, metadata, 8 + length
