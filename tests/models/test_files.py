"""Folders from anywhere: what is no model, leads elsewhere or is damaged is refused before anything reads it."""

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gblm_compress.errors import GblmError, ModelError, VerificationError
from gblm_compress.models import grids
from gblm_compress.models.files import bytes_of, check_folder, files_of, read_header, weight_files
from gblm_compress.models.finding import resolve_model
from gblm_compress.models.loading import load_model, load_processor
from gblm_compress.models.source import ModelSource
from tests.conftest import edit_json, edit_weights

ONE_SHARD = "model-00001-of-00001.safetensors"
NESTED = "[" * 100_000


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a tiny Llama, to be spoilt."""
    return shutil.copytree(tiny("llama").folder, tmp_path / "model")


@pytest.fixture
def pruned(folder, pruning):
    """pruned("out"): the folder pruned to another beside it."""
    return lambda name, **more: Path(pruning(name, ModelSource("model", folder), method="magnitude", **more).folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "config.json' is damaged: Expecting"),
        ("{}", "config.json' is damaged: model_type: Field required"),
        (NESTED, "nested too deeply"),
        ('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", "damaged"),
        ('{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "architectures: Input should be a valid list"),
        ('{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers: .*greater than or equal to 1, got -1"),
        ('{"model_type": "llama", "rope_scaling": 3}', "rope_scaling: "),
        ('{"model_type": "llama", "text_config": {"n_layer": "x"}}', r"text_config\.n_layer: .*got \"x\""),
        ('{"model_type": "gpt2", "n_layer": 100000}', "n_layer is 100000, but .* hold 20 tensors, room for 20 at most"),
        ('{"model_type": "mixtral", "num_local_experts": 100000}', "num_local_experts is 100000, .* for 257 at most"),
        ('{"model_type": "x", "v": {"w": {"num_decoder_layers": 99}}}', "num_decoder_layers is 99, .* for 20 at most"),
        ('{"model_type": "llama", "attn_implementation": "flex_attention"}', 'run here with eager, sdpa.*got "flex'),
        ('{"model_type": "llama", "_attn_implementation": {"text_config": "a/b:c"}}', "_attn_impl.*code.*not run"),
        ('{"model_type": "llama", "torch_dtype": "load"}', "torch_dtype is 'load'; models in float32, float16"),
        ('{"model_type": "llama", "transformers_weights": "../x.safetensors"}', "in the same folder"),
        ('{"model_type": "llama", "transformers_weights": "adapter_model.bin"}', "pickled weights are never loaded"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', r"quantised \(gptq\).*original"),
        ('{"model_type": "llama", "quantization_config": {"load_in_4bit": true}}', "quantised .*unknown.*original"),
    ],
)
def test_configs(folder, config: str | None, message: str) -> None:
    path = folder / "config.json"
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json' is damaged"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "pickled weights are never loaded"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "in the same folder"),
        ('{"weight_map": {"a": 5}}', "names the file 5"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors' is missing"),
    ],
)
def test_indices(folder, index: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_out_of_the_folder_and_special_files(name, folder, tmp_path) -> None:
    path = folder / name
    path.rename(tmp_path / "secret")
    for make, message in (
        (lambda: path.symlink_to(tmp_path / "secret"), f"{name}' is a link out of the folder"),
        (lambda: path.symlink_to(path), "leads nowhere"),
        (lambda: os.mkfifo(path), "not a regular file"),
    ):
        make()
        with pytest.raises(ModelError, match=message):
            check_folder(folder)
        path.unlink()


def test_links_inside_and_those_of_the_hubs_cache_are_followed(folder, tmp_path, progress) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    check_folder(folder)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert load_model(resolve_model(str(snapshot), progress)).config.num_hidden_layers == 2


def test_data_of_a_graph_is_in_the_folder_wherever_the_graph_names_it(tmp_path) -> None:
    branch = "g () => (float[1] y) { y = Constant <value = float[1] inner {1.0}> () }"
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> '
        f"g (bool c) => (float[1] z) {{ z = If (c) <then_branch = {branch}, else_branch = {branch}> }}"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.onnx_data").write_bytes(bytes(40))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    check_folder(tmp_path)
    assert bytes_of(tmp_path) == 40 + (tmp_path / "model.onnx").stat().st_size
    value = model.graph.node[0].attribute[1].g.node[0].attribute[0].t
    value.data_location = onnx.TensorProto.EXTERNAL
    value.external_data.add(key="location", value="/dev/zero")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="the data of 'inner' is in '/dev/zero', outside the folder"):
        check_folder(tmp_path)


def test_weights_that_are_truncated_missing_pickled_or_of_an_adapter(folder) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 7, 100, -1):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match="damaged safetensors file"):
            check_folder(folder)
    path.unlink()
    with pytest.raises(ModelError, match="has no model.safetensors and no model.safetensors.index.json"):
        check_folder(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        check_folder(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ModelError, match="LoRA adapter.*merge it into its base model"):
        check_folder(folder)


def test_a_header_without_metadata(folder, pruned) -> None:
    """`"__metadata__": null` is what the format's own reader takes for none."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": None}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert read_header(path)[1] == {}
    check_folder(folder)
    grids.verify(ModelSource("out", pruned("out")))


@pytest.mark.parametrize("offload", [False, True])
def test_the_set_of_weights_that_transformers_reads_is_pruned(offload, folder, pruned) -> None:
    wanted = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / ONE_SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(wanted, ONE_SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(folder)
    written = pruned("out", offload=offload)
    assert [path.name for path in weight_files(written)] == [ONE_SHARD]
    weight = AutoModelForCausalLM.from_pretrained(written).model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == 0.5
    files, size = files_of(folder), bytes_of(folder)
    shutil.copy(folder / ONE_SHARD, folder / "consolidated.safetensors")  # which transformers does not read
    assert files_of(folder) == files and bytes_of(folder) == size
    save_file({name: tensor + 1 for name, tensor in wanted.items()}, folder / "model.safetensors", {"format": "pt"})
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    written = pruned("two", offload=offload)
    assert {path.name for path in written.glob("*.safetensors*")} == {"model.safetensors"}
    got = load_file(written / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(got, wanted["model.embed_tokens.weight"] + 1)


@pytest.mark.parametrize(("dtype", "called"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_in_no_dtype_that_is_pruned_are_refused(dtype, called, folder, pruned) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ModelError, match=f"hold '{name}' in {called}, not as floating-point numbers of 16 bits"):
        pruned("out")


def test_what_is_written_must_load(folder, pruned, monkeypatch) -> None:
    """A folder that its users cannot load is no result, whatever its tensors are like."""
    monkeypatch.setattr(grids, "verify", lambda out: (out.folder / "model.safetensors").unlink())
    with pytest.raises(VerificationError, match=r"does not load: .*has no model\.safetensors"):
        pruned("out")
    assert not folder.with_name("out").exists()


def test_no_odd_folder_ends_in_anything_but_one_message(folder, progress) -> None:
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for spoilt in (b"", b"\xff\xfe\x00", b"[]", b"null", b"{}", NESTED.encode()):
            path.write_bytes(spoilt)
            try:
                source = resolve_model(str(folder), progress)
                load_model(source)
                load_processor(source)
            except GblmError as error:
                assert "\n" not in str(error)
        path.write_bytes(content)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil--modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit(99)")
    load_model(resolve_model(str(folder), progress))


def test_a_folder_whose_name_is_no_unicode_is_refused(tiny, tmp_path) -> None:
    """safetensors and tokenizers do not read from it, and say so in other words."""
    folder = shutil.copytree(tiny("llama").folder, tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ModelError, match=r"caf.udce9' is not a Unicode name, so no weights are read .*; rename it"):
        check_folder(folder)
