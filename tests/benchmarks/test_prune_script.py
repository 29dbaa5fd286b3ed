"""The pruning benchmark at toy size; and its independent re-implementation of GBLM as an oracle of `prune_`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gblm_compress.models.tiny import VOCABULARY
from tests.conftest import prune_, samples, tiny_model
from tests.scripts import loaded
from tests.tasks.families import share_that_differs

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the benchmark reads /proc of Linux")


@pytest.mark.parametrize(("pattern", "norm"), [("2:4", "l1"), ("unstructured", "l2"), ("1:4", "l2")])
def test_pruning_gives_the_masks_of_the_reference(pattern, norm) -> None:
    given = samples(6, 48)
    ids = [sample["input_ids"] for sample in given]
    slow, fast = tiny_model("llama", seed=1), tiny_model("llama", seed=1)
    with loaded("reference_gblm") as reference:
        expected = reference.prune_(slow, ids, reference.gradient_norms(slow, ids)[norm], pattern, 100.0)
    results = prune_(fast, given, pattern=pattern, gradient_norm=norm, allocation="uniform")
    assert list(results) == list(expected)
    assert share_that_differs(fast, expected) <= 1e-3  # equal scores may change places by rounding


def test_a_random_llama_is_whole_and_computes(tmp_path) -> None:
    with loaded("random_llama") as script:
        shape = script.Shape(hidden=64, intermediate=96, blocks=3, heads=4, kv_heads=2, vocabulary=300)
        total = script.write_random(tmp_path / "one", shape.config())
        script.write_random(tmp_path / "two", shape.config())
        with pytest.raises(SystemExit, match=f"--vocab 256 is too small: the tokenizer has {VOCABULARY}"):
            script.write_random(tmp_path / "three", script.Shape(64, 96, 1, 4, 2, 256).config())
    one, two = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "two"))
    assert len(one) == 5 and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16 and sum(p.nbytes for p in model.parameters()) == total
    linear = {n: m for n, m in model.model.layers[2].named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name: tuple(layer.weight.shape) for name, layer in linear.items()} == shape.matrices()
    assert torch.isfinite(model(**samples(1, 512)[0]).logits).all()
