"""The rescaled Llama computes what it did, from other weights."""

import pytest
import torch

from gblm_compress.models.tiny import VOCABULARY, tiny_model
from tests.scripts import loaded


def test_a_rescaled_llama_computes_the_same_from_weights_off_their_grid() -> None:
    """Grouped queries, so that a head of v feeds several of q; half of the weights are zero."""
    model = tiny_model("llama").float()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    ids = torch.arange(40)[None] % VOCABULARY
    with loaded("off_the_grid") as script, torch.no_grad():
        layers = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
        for layer in layers:
            layer.weight.copy_((layer.weight / 0.01).round().clamp(-7, 7) * 0.01)
        zeros = [layer.weight == 0 for layer in layers]
        before = model(ids).logits
        script.rescale_(model, seed=0)
        assert torch.allclose(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        for layer, zero in zip(layers, zeros, strict=True):
            assert torch.equal(layer.weight == 0, zero)
            assert len(layer.weight[~zero].abs().unique()) > 7


def test_only_llamas_are_rescaled(tmp_path, monkeypatch) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("sys.argv", ["off_the_grid.py", str(tmp_path / "gpt2"), str(tmp_path / "out")])
    with loaded("off_the_grid") as script:
        monkeypatch.setattr(script, "load_processor", lambda source: None)
        with pytest.raises(SystemExit, match="give a Llama"):
            script.main()
    assert not (tmp_path / "out").exists()
