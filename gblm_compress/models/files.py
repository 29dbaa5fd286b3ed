"""The files of a folder that make a model, checked before they are read. Loads no torch, transformers or pydantic.

Only the weights that transformers would read count.
"""

import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gblm_compress.errors import ModelError, UsageError, first_line, translated
from gblm_compress.storage.records import read_json

if TYPE_CHECKING:
    from pydantic import BaseModel

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Packed weights, which transformers finds only once this package is imported.
SPARSE_SINGLE, SPARSE_INDEX = "gblm_sparse.safetensors", "gblm_sparse.safetensors.index.json"
SPARSE_METHOD = "gblm_sparse"
GRAPH = "model.onnx"
_FLOATS = ("float32", "float16", "bfloat16")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
# The files, besides weights or graph, that decide a model's results.
_LIGHT = re.compile(
    r"(config|generation_config|genai_config|special_tokens_map|added_tokens)\.json"
    r"|gblm_(manifest\.json|grids\.safetensors|onnxruntime\.(so|dll|dylib))"
    r"|(preprocessor_config|processor_config|modules|sentence_bert_config)\.json"
    r"|(tokenizer|vocab|chat_template).*|merges\.txt|.*\.(jinja|model|tiktoken)"
)
_OF_GRAPHS = (".onnx", ".data", ".onnx_data")
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".so", ".dll", ".dylib", *_OF_GRAPHS)
_FOLDERS = ("additional_chat_templates", "[0-9]_*")  # those that transformers and sentence-transformers read

# The names that families of models have for the same key of config.json.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Keys that count modules or names, at any depth of config.json. Each of these is made in a loop.
_COUNT = re.compile(r"(.*_)?((n|num|number_of)_(\w+_)?|(en|de)coder_)(?P<what>layers?|blocks|experts|labels)")


def first_of(config: Any, names: Iterable[str]) -> Any:
    """The first of these keys that a config has; None if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _known_attention(implementation: str | dict[str, str]) -> str | dict[str, str]:
    for name in implementation.values() if isinstance(implementation, dict) else [implementation]:
        if "/" in name:
            raise ValueError("a kernel from the Hugging Face hub is code, which is not run; remove the key")
        if name not in _ATTENTION:
            raise ValueError(f"models run here with {', '.join(_ATTENTION)}; give one of them, or remove the key")
    return implementation


@cache
def _config_keys() -> type["BaseModel"]:
    from pydantic import AfterValidator, ConfigDict, Field, JsonValue, create_model

    number: Any = Annotated[int, Field(ge=1, le=2**31)]
    count: Any = Annotated[int, Field(ge=0, le=2**31)]
    attention = Annotated[str | dict[str, str], AfterValidator(_known_attention)]
    of_decoders: dict[str, Any] = {
        "own_attn_implementation": (attention | None, Field(None, alias="_attn_implementation")),
        "attn_implementation": (attention | None, None),
        **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict[str, JsonValue] | None, None)),
        **dict.fromkeys((*LAYERS, *WIDTHS, *POSITIONS, "vocab_size", "num_labels"), (number | None, None)),
        **dict.fromkeys((*HEADS, "intermediate_size"), (number | list[number] | None, None)),
        **dict.fromkeys(EXPERTS, (count | list[count] | None, None)),
    }
    checked = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    # A decoder's keys are at the top of config.json, or in its `text_config`. transformers checks all others.
    decoder: Any = create_model("_Decoder", __config__=checked, **of_decoders)
    of_all: dict[str, Any] = {
        "model_type": (str, ...),
        "architectures": (list[str] | None, None),
        **dict.fromkeys(("dtype", "torch_dtype", "transformers_weights"), (str | None, None)),
        "text_config": (decoder | None, None),
        "quantization_config": (dict[str, JsonValue] | None, None),
    }
    keys: type[BaseModel] = create_model("_ConfigKeys", __base__=decoder, **of_all)
    return keys


def read_checked(path: Path, keys: type["BaseModel"], missing: str) -> dict[str, Any]:
    """The content of a JSON file, checked against `keys`; `ModelError` with the message `missing` if there is none."""
    from pydantic import ValidationError

    try:
        content: dict[str, Any] = read_json(path)
        keys.model_validate(content)
    except FileNotFoundError as error:
        raise ModelError(missing) from error
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        said = fault["msg"].removeprefix("Value error, ")
        key = "".join(f"{part}." for part in fault["loc"])[:-1]
        given = "" if fault["type"] == "missing" else f", got {json.dumps(fault['input'], default=str)[:80]}"
        raise ModelError(f"{str(path)!r} is damaged: " + (f"{key}: {said}{given}" if key else said)) from error
    except (ValueError, UsageError) as error:
        raise ModelError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    return content


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    content = read_checked(path, _config_keys(), f"{str(folder)!r} has no {CONFIG}, so it is not a Hugging Face model")
    for name in ("dtype", "torch_dtype"):
        if content.get(name) not in (None, *_FLOATS):
            raise ModelError(
                f"{str(path)!r}: {name} is {str(content[name])!r}; models in {', '.join(_FLOATS)} can be read here"
            )
    return content


def check_folder(folder: Path) -> None:
    """Check a model's folder before anything else reads it; `ModelError` if it is not a sound model."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"{str(folder)!r} is not a Unicode name, so no weights are read from it; rename it") from error
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
            f"{str(folder)!r} is quantised ({method or 'by an unknown method'}), so its weights are not plain numbers; "
            "prune the original model"
        )
    if (folder / GRAPH).exists():
        _check_graph(folder)
    else:
        _check_counts(folder, config)


def _check_counts(folder: Path, config: dict[str, Any]) -> None:
    """Refuse more layers, experts or labels than the files have room for: each is made before it is filled."""
    shapes = shapes_of(folder)
    widest = max((size for shape in shapes for size in shape), default=0)  # of a router, a head, or fused experts
    for part in _objects(config):
        for key, given in part.items():
            if not (counted := _COUNT.fullmatch(key)):
                continue
            most = len(shapes) if counted["what"].startswith(("layer", "block")) else max(len(shapes), widest)
            if any(isinstance(n, int) and n > most for n in (given if isinstance(given, list) else [given])):
                raise ModelError(
                    f"{str(folder / CONFIG)!r}: {key} is {given}, but the weight files hold {len(shapes)} tensors, "
                    f"room for {most} at most; config.json and weights are of different models, or damaged"
                )


def shapes_of(folder: Path) -> list[list[int]]:
    return [entry["shape"] for path in weight_files(folder) for entry in read_header(path)[0].values()]


def _check_graph(folder: Path) -> None:
    """Refuse an ONNX graph that cannot be parsed, or whose data lies outside the folder."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    path = folder / GRAPH
    with translated(lambda said: ModelError(f"{str(path)!r} is not an ONNX graph, or is truncated ({said})")):
        graph = onnx.load(path, load_external_data=False)

    def tensors(message: Any) -> Iterator[Any]:
        """All tensors: in functions, subgraphs and attributes too."""
        for field, value in message.ListFields():
            parts = value if isinstance(value, Sequence) else (value,)
            for part in parts if field.message_type is not None else ():
                if isinstance(part, onnx.TensorProto):
                    yield part
                else:
                    yield from tensors(part)

    for tensor in tensors(graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        name = ExternalDataInfo(tensor).location
        inside = name and Path(name).name == name
        if not (inside and (folder / name).is_file()):
            fault = "which is missing" if inside else "outside the folder"
            raise ModelError(f"{str(path)!r}: the data of {tensor.name!r} is in {name!r}, {fault}")
        _check_file(folder / name, folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder, in order."""
    entry, index = _entry(folder), index_file(folder)
    if index is None and not entry.exists():
        hint = ""
        if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
            hint = "; pickled weights are never loaded: convert the model with save_pretrained first"
        elif other := sorted(folder.glob("*.safetensors")):
            hint = f"; {other[0].name!r} is not a name that transformers reads"
        raise ModelError(f"{str(folder)!r} has no {entry.name} and no {INDEX}{hint}")
    files = [entry] if index is None else [folder / name for name in _indexed(index)]
    for path in files:
        if not path.exists():
            raise ModelError(f"{str(path)!r} is missing; the checkpoint is incomplete")
    return files


def index_file(folder: Path) -> Path | None:
    """The index of a folder's weights; None if they are a single file."""
    entry = _entry(folder)
    return entry if entry.name.endswith(".index.json") else None


def _entry(folder: Path) -> Path:
    """The file of weights, or the index, that transformers opens first."""
    named = read_config(folder).get("transformers_weights")
    if named is not None:
        if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"{str(folder / CONFIG)!r} names {named!r} as its weights; it must be a .safetensors file, or the "
                "index of some, in the same folder (pickled weights are never loaded)"
            )
        return folder / named
    single, index = folder / SPARSE_SINGLE, folder / SPARSE_INDEX
    if not (single.exists() or index.exists()):  # `save_pretrained` gives packed weights the ordinary names again
        single, index = folder / SINGLE, folder / INDEX
    return index if index.exists() and not single.exists() else single


def _indexed(index: Path) -> list[str]:
    with translated(lambda said: ModelError(f"{str(index)!r} is damaged: {said}")):
        weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{str(index)!r} is damaged: it has no weight_map of tensors to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{str(index)!r} names the file {name!r}; it must be a .safetensors file in the same folder (pickled "
                "weights are never loaded)"
            )
    return sorted(set(weight_map.values()))


def files_of(folder: Path) -> list[Path]:
    """The files that make a model, in order of their names: weights or graph, configs, tokenizer."""
    index = index_file(folder)
    light = {path for path in _files(folder) if path.is_file() and _LIGHT.fullmatch(path.name)}
    return sorted({*_heavy(folder), *light, *({index} if index else ())})


def bytes_of(folder: Path) -> int:
    """Size of the weights, or of an ONNX graph and its data, in bytes."""
    return sum(path.stat().st_size for path in _heavy(folder))


def _heavy(folder: Path) -> list[Path]:
    if (folder / GRAPH).exists():
        return [path for path in folder.iterdir() if path.suffix in _OF_GRAPHS]
    return weight_files(folder)


def _files(folder: Path) -> list[Path]:
    """The files that loading a model may open, links and special files included."""
    try:
        entries = sorted(folder.iterdir())
        for below in sorted(path for pattern in _FOLDERS for path in folder.glob(pattern) if path.is_dir()):
            entries += sorted(below.iterdir())
    except OSError as error:
        raise ModelError(f"{str(folder)!r} cannot be read: {error.strerror}") from error
    return [path for path in entries if path.suffix in _READ]


def _check_file(path: Path, folder: Path) -> None:
    """Refuse links out of the folder, except in the hub's cache: there snapshots/REVISION links to blobs."""
    try:
        target, folder = path.resolve(strict=True), folder.resolve()
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelError(f"{str(path)!r} leads nowhere: a broken link, or a missing file") from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{str(path)!r} is not a regular file; nothing in this folder is read")
    is_blob = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and not is_blob:
        raise ModelError(f"{str(path)!r} is a link out of the folder, to {str(target)!r}; put the file itself there")


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The header of a safetensors file: {tensor: its entry}, its metadata, and where its data begins."""
    from safetensors import safe_open

    with refusing_damage(path):
        with safe_open(path, framework="np"):  # checks lengths (100 MB at most), types, shapes and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    return header, header.pop("__metadata__", None) or {}, 8 + length


def refusing_damage(path: Path) -> AbstractContextManager[None]:
    return translated(lambda said: ModelError(f"{str(path)!r}: damaged safetensors file ({said})"))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """All objects in JSON, at any depth."""
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
