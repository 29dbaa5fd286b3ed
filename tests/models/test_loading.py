"""Models and processors in memory: what is missing or unknown is one message; devices, dtypes, lengths."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from gblm_compress.calibration.weights import StreamedWeights
from gblm_compress.errors import MissingDependencyError, ModelError, UsageError
from gblm_compress.models import loading
from gblm_compress.models.loading import check_model, choose_device, load_model, load_processor
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import byte_tokenizer
from tests.conftest import edit_json, edit_weights
from tests.families.tiny import tiny_family


@pytest.fixture
def source(tiny, tmp_path) -> ModelSource:
    """A copy of a tiny Llama, to be spoilt."""
    return ModelSource("m", shutil.copytree(tiny("llama").folder, tmp_path / "model"))


UP = "model.layers.1.mlp.up_proj.weight"


def as_a(architecture: str, model_type: str = "bert"):
    return lambda folder: edit_json(folder / "config.json", architectures=[architecture], model_type=model_type)


@pytest.mark.parametrize(
    ("change", "load", "message"),
    [
        (
            lambda folder: (folder / "model.onnx").write_bytes(b""), lambda source: check_model(source, "prune"),
            r"is an export; prune the .* or remove model\.onnx if",
        ),
        *(
            (lambda folder: edit_weights(folder, lambda tensors: tensors.pop(UP)), load, f"{said}.*{UP}.*incomplete")
            for load, said in (
                (load_model, "lacks 1 tensors"),
                (lambda source: StreamedWeights(source, loading.load_skeleton(source), "cpu"), "no tensor"),
            )
        ),
        *((as_a(name), load_model, f"does not know the architecture {name};") for name in ("Martian", "utils")),
        (as_a("BertForMaskedLM"), load_model, "BertForMaskedLM is for fill-mask; a causal"),
        (as_a("PreTrainedModel"), load_model, "PreTrainedModel is for no task"),
        (as_a("ViTForImageClassification", "vit"), load_processor, "its image processor cannot be loaded"),
        (
            lambda folder: (folder / "generation_config.json").write_text("[1]"), loading.load_skeleton,
            r"its generation_config\.json cannot be read",
        ),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_or_incomplete_is_told_what_it_lacks(change, load, message: str, source) -> None:
    change(source.folder)
    with pytest.raises(ModelError, match=f"model 'm'.*{message}"):
        load(source)


def test_a_tokenizer_that_is_missing_or_without_its_vocabulary(source) -> None:
    """transformers makes an empty one of tokenizer_config.json alone."""
    (source.folder / "tokenizer.json").unlink()
    for kind in ("BertTokenizer", "GPT2Tokenizer"):
        (source.folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        with pytest.raises(ModelError, match="model 'm': .*tokenizer files are missing or do not fit"):
            load_processor(source)
    (source.folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer cannot be loaded; copy the original model's into the folder"):
        load_processor(source)


BAD = "model.norm.weight"


@pytest.mark.parametrize("name", [BAD, "model.embed_tokens.weight", UP])
def test_a_weight_that_is_not_finite_is_named_with_its_file(name, source, pruning) -> None:
    """In memory, and on disk where each tensor is read once for each use."""
    bad = torch.tensor([float("nan"), float("-inf")])
    edit_weights(source.folder, lambda tensors: tensors[name].view(-1)[1:3].copy_(bad))
    message = rf"model\.safetensors': 2 of [\d,]+ values of '{name}' are NaN or infinite; .* fetch the model again"
    with pytest.raises(ModelError, match=message):
        load_model(source)
    with pytest.raises(ModelError, match=message):
        pruning("out", source, method="magnitude", offload=True)


def test_large_values_and_infinite_masks_are_no_damage(source, tiny, tmp_path) -> None:
    edit_weights(source.folder, lambda tensors: tensors[BAD][0].fill_(1e6))
    load_model(source)
    with pytest.raises(ModelError, match=f"{BAD} holds values beyond the range of torch.float16; give --dtype float32"):
        load_model(source, "float16")
    masked = ModelSource("masked", shutil.copytree(tiny("gpt2").folder, tmp_path / "masked"))
    mask = {"transformer.h.0.attn.masked_bias": torch.tensor(float("-inf"))}
    edit_weights(masked.folder, lambda tensors: tensors.update(mask))
    load_model(masked)


@pytest.mark.parametrize("load", [load_model, loading.load_skeleton])
@pytest.mark.parametrize("config", [{"vocab_size": 10**9}, {"attention_bias": True, "head_dim": 2**40}])
def test_sizes_of_another_model_are_refused_before_memory_is_taken(load, config, source) -> None:
    edit_json(source.folder / "config.json", **config)
    with pytest.raises(ModelError, match=r"weight has the shape \[\d+, 64\] .* config.json needs \[\d+, 64\]"):
        load(source)


def test_tables_that_are_in_no_file_stay_small(tmp_path) -> None:
    """GPT-J computes a table of positions, which no file holds."""
    tiny_family("gptj").save_pretrained(tmp_path)
    source = ModelSource("m", tmp_path)
    loading.load_skeleton(source)
    edit_json(tmp_path / "config.json", n_positions=2**31)
    with pytest.raises(ModelError, match="describes 17,1.* values, and its files hold"):
        loading.load_skeleton(source)


@torch.no_grad()
def test_a_config_does_not_choose_what_a_call_returns(source) -> None:
    chosen = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    edit_json(source.folder / "config.json", **chosen)
    model = load_model(source)
    output = model(input_ids=torch.arange(5)[None])
    assert output.logits.shape == (1, 5, 257) and output.hidden_states is output.attentions is None
    model.config.save_pretrained(source.folder)  # as exporters do; no attention but eager gives its weights out
    load_model(source)


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu:0") == "cpu"
    with pytest.raises(MissingDependencyError, match="finds no CUDA device"):
        choose_device("cuda")
    for other in ("gpu9", "meta"):
        with pytest.raises(UsageError, match=f"'{other}' is not supported; give auto, cpu, cuda or cuda:N"):
            choose_device(other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(MissingDependencyError, match="the last of 2 CUDA devices is cuda:1"):
        choose_device("cuda:2")


def test_no_more_tokens_than_positions_unless_these_are_scaled() -> None:
    few, more = ({"max_position_embeddings": count} for count in (512, 1024))
    default, linear = ({"rope_type": kind} for kind in ("default", "linear"))
    limited = {"n_positions": 512}, few | {"rope_parameters": default}, {"text_config": few, "vision_config": more}
    for config in limited:
        loading.check_positions("m", config, 512)
        with pytest.raises(UsageError, match="'m' has 512 positions; sequence length is 513, give 512 or less"):
            loading.check_positions("m", config, 513)
    for scaled in ({"rope_scaling": {"type": "dynamic"}}, {"rope_parameters": {"full_attention": linear}}):
        loading.check_positions("m", few | scaled, 513)
    loading.check_positions("m", {}, 513)


@pytest.mark.parametrize("spaced", [False, True])
def test_a_saved_tokenizer_is_the_same_and_older_clients_read_it(spaced, tmp_path: Path) -> None:
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    if not spaced:
        learnt.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["?"])
    learnt.train_from_iterator(["the hares sat in the grass and the hares ate the clover"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=learnt, unk_token="?")
    loading.save_processor(tokenizer, tmp_path)
    stored = (tmp_path / "tokenizer.json").read_text()
    merges = json.loads(stored)["model"]["merges"]
    assert merges and {type(merge) for merge in merges} == {list if spaced else str}
    assert "\n" not in stored.strip()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("the clover ate")["input_ids"] == tokenizer("the clover ate")["input_ids"]
    loading.save_processor(byte_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
