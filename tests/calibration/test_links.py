"""Links: what is found in families of different shapes, and that nothing else is taken for one."""

import pytest
import torch
import transformers

from gblm_compress.calibration.blocks import Block
from gblm_compress.calibration.links import Heads, Link, _holds, _outputs, find_links, heads_of, moved
from gblm_compress.models.architecture import prunable_layers
from gblm_compress.models.loading import load_model
from gblm_compress.models.tiny import VOCABULARY
from tests.conftest import replay


def first_block(model) -> tuple[Block, dict[str, torch.nn.Module]]:
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    return replay(model.eval(), [{"input_ids": ids}]).block(0), prunable_layers(model)[0]


def ignore() -> None:
    """No progress is shown."""


LLAMA = [
    Link("model.layers.0.self_attn.o_proj", ("model.layers.0.self_attn.v_proj",), runs=2, copies=2),
    Link("model.layers.0.mlp.down_proj", ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")),
]
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,  # with biases
    "qwen3": LLAMA,
    "gpt2": [Link("transformer.h.0.mlp.c_proj", ("transformer.h.0.mlp.c_fc",))],  # values are in one layer with queries
    "opt": [
        Link("model.decoder.layers.0.self_attn.out_proj", ("model.decoder.layers.0.self_attn.v_proj",), runs=4),
        Link("model.decoder.layers.0.fc2", ("model.decoder.layers.0.fc1",)),
    ],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_belongs_together_is_found(kind, tiny) -> None:
    model = load_model(tiny(kind))
    block, layers = first_block(model)
    others: list[None] = []
    assert find_links(block, layers, heads_of(model.config), 4, lambda: others.append(None)) == EXPECTED[kind]
    assert len(others) + len(EXPECTED[kind]) == len(layers)


def test_gate_and_values_in_one_layer_move_alike() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    config = transformers.Phi3Config(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = transformers.Phi3ForCausalLM(config)
    block, layers = first_block(model)
    mlp = "model.layers.0.mlp"
    link = Link(f"{mlp}.down_proj", (f"{mlp}.gate_up_proj",), parts=2)
    assert find_links(block, layers, heads_of(config), 4, ignore) == [link]
    before, order = block.run(0), torch.randperm(48)[None]
    with moved(layers, link.moves(layers, order)):
        assert torch.equal(layers[f"{mlp}.gate_up_proj"].weight[48:], model.get_submodule(mlp).gate_up_proj.weight[48:])
        assert torch.allclose(block.run(0), before, atol=1e-6)
    with moved(layers, link.moves(layers, order)[:1]):
        assert not torch.allclose(block.run(0), before, atol=1e-3)
    assert torch.equal(block.run(0), before)


def test_channels_stay_in_their_run(tiny) -> None:
    link = LLAMA[0]
    layers = first_block(load_model(tiny("llama")))[1]
    size = link.size(layers)
    order = torch.stack([torch.arange(size).flip(0), torch.arange(size)])  # of the two heads of values
    columns, rows = (places for _, _, places in link.moves(layers, order))
    first, second = list(range(size))[::-1], list(range(size, 2 * size))
    assert rows.tolist() == first + second
    assert columns.tolist() == first + [size + place for place in first] + list(range(2 * size, 4 * size))


def test_runs_must_hold_whole_groups(tiny) -> None:
    model = load_model(tiny("llama"))  # heads of 16 channels, 128 channels in the MLP
    block, layers = first_block(model)
    assert find_links(block, layers, heads_of(model.config), 32, ignore) == LLAMA[1:]
    assert find_links(block, layers, None, 4, ignore) == LLAMA[1:]
    assert find_links(block, layers, heads_of(model.config), 3, ignore) == []


@pytest.mark.parametrize("wrong", ["k_proj", "q_proj", "o_proj"])
def test_others_do_not_hold(wrong, tiny) -> None:
    block, layers = first_block(load_model(tiny("opt")))
    attention = "model.decoder.layers.0.self_attn"
    consumer = f"{attention}.out_proj"
    before = _outputs(block, layers)
    name = f"{attention}.{wrong.replace('o_proj', 'out_proj')}"
    assert not _holds(block, layers, Link(consumer, (name,), runs=4), before)
    assert _holds(block, layers, Link(consumer, (f"{attention}.v_proj",), runs=4), before)


def test_channels_that_others_read_too_stay(tiny) -> None:
    """Nothing after the consumer moves, and yet the block gives something else."""
    model = load_model(tiny("llama"))
    mlp = model.model.layers[0].mlp
    mlp.beside = torch.nn.Linear(128, 64, bias=False)
    mlp.forward = lambda x: mlp.down_proj(h := mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) + mlp.beside(h)
    block, layers = first_block(model)
    assert [link.consumer for link in find_links(block, layers, None, 4, ignore)] == []
    mlp.forward = lambda x: mlp.down_proj(h := mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) + h[..., :64]
    del mlp.beside
    block, layers = first_block(model)
    assert find_links(block, layers, None, 4, ignore) == []


def test_heads() -> None:
    assert heads_of(transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=2)) == Heads(8, 2)
    assert heads_of(transformers.GPT2Config(n_head=12)) == Heads(12, 12)
    assert heads_of(transformers.MambaConfig()) is None
