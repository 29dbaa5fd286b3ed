"""A model whose blocks come from disk one at a time, against the same model in memory."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from gblm_compress.calibration.weights import HiddenStates, StatePool, StreamedWeights
from gblm_compress.errors import ModelError
from gblm_compress.models.loading import load_model, load_skeleton
from gblm_compress.models.source import ModelSource
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from tests.conftest import ARCHITECTURES, edit_weights, prune, samples


def streamed_weights(source: ModelSource, dtype: str = "auto") -> StreamedWeights:
    return StreamedWeights(source, load_skeleton(source, dtype), "cpu")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_with_everything_in_place_it_is_the_model(kind: str, dtype: str, tiny) -> None:
    streamed, (ids, *_) = streamed_weights(tiny(kind), dtype), samples()
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(streamed.outer())
        for index in range(len(streamed.blocks)):
            stack.enter_context(streamed.block(index))
        got = streamed.model(**ids).logits
        expected = load_model(tiny(kind), dtype)(**ids).logits
    assert torch.equal(got, expected)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_only_the_block_at_work_has_weights_and_changes_to_it_do_not_last(tiny) -> None:
    before = {path.name: path.read_bytes() for path in tiny("llama").folder.iterdir()}
    streamed = streamed_weights(tiny("llama"))
    for _ in range(2):
        with streamed.block(1) as block:
            real = [name for name, parameter in streamed.model.named_parameters() if not parameter.is_meta]
            assert real and all(name.startswith("model.layers.1.") for name in real)
            assert block.mlp.up_proj.weight.count_nonzero() > 0
            with torch.no_grad():
                block.mlp.up_proj.weight.zero_()
    assert {path.name: path.read_bytes() for path in tiny("llama").folder.iterdir()} == before


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").folder, tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'.*incomplete"):
        streamed_weights(ModelSource("broken", tmp_path))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4"},
        {"method": "wanda", "pattern": "unstructured", "allocation": "sensitivity"},
        {"method": "gradient", "allocation": "sensitivity"},
        {"method": "regional", "fit": "fast", "pattern": "2:4"},
        {"method": "magnitude"},
        {"method": "obs", "fit": "balanced", "pattern": "2:4"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)  # fmt: skip
def test_pruning_from_disk_gives_the_same_bytes(kind, settings, tiny, tmp_path, prose, progress) -> None:
    folders = []
    for offload, memory in ((False, None), (True, 1)):  # with one byte of memory every hidden state is a file, too
        prune(
            tiny(kind), tmp_path / str(offload), PruneSettings(**({"fit": "none"} | settings)),
            CalibrationSettings(dataset=str(prose), samples=3, sequence_length=32),
            resources=ResourceSettings.model_construct(offload=offload, memory=memory), progress=progress,
        )  # fmt: skip
        folders.append({path.name: path.read_bytes() for path in (tmp_path / str(offload)).iterdir()})
    assert folders[0] == folders[1]


@pytest.mark.parametrize("room", [1200, 1199])  # of three states of 400 bytes; whole or not at all
def test_states_are_given_back_when_they_are_released(room: int, tmp_path: Path) -> None:
    pool = StatePool(tmp_path, room, torch.device("cpu"))
    states = HiddenStates(pool, 3)
    tensors = [torch.randn(1, 10, 10) for _ in range(3)]
    for index, tensor in enumerate(tensors):
        states[index] = tensor
    assert (pool.left, len(list(tmp_path.iterdir()))) == ((0, 0) if room == 1200 else (1199, 3))
    assert all(torch.equal(got, tensor) for got, tensor in zip(states, tensors, strict=True))
    states[2] = tensors[0]
    assert torch.equal(states[2], tensors[0]) and torch.equal(states[1], tensors[1])
    states.release()
    assert pool.left == room and not list(tmp_path.iterdir())
