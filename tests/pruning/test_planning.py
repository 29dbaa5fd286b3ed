"""What a run plans to need, and where it puts things; what it costs, and which fit does more."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gblm_compress.calibration import ranks
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.machine import cost
from gblm_compress.methods.fits import FEW_STEPS
from gblm_compress.models import loading
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning import planning
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from tests.conftest import CAUSAL_LM
from tests.families.tiny import tiny_family

SETTINGS = PruneSettings(fit="none")


def size_of(source: ModelSource, length: int = 64, **settings) -> planning.Size:
    text = CalibrationSettings(samples=2, sequence_length=length)
    return planning.Size(source, "float32", SETTINGS.model_copy(update=settings), text)


def test_fits_plan_with_gram_matrices_copies_of_the_block_logits_and_all_blocks(tiny) -> None:
    size = partial(size_of, tiny("llama"), method="wanda", allocation="uniform")

    def working(**chosen) -> int:
        return size(**chosen).working

    inputs, block = 3 * 64**2 + 128**2, size().block  # three inputs of the hidden size, one of the intermediate size
    layer = 64 * 128  # the largest one is kept as it was; for a fit of the block, the block
    # Least squares takes more of a layer than selection.
    solution, grams = (planning.SOLVING_BYTES + 12 - planning.SELECTION_BYTES) * layer, 4 * inputs + 4 * layer
    assert working(fit="fast") - working() == solution + grams
    placement = planning.Placement(offload=False, states=0, by_sample=False)
    assert size(fit="fast").peak(placement) - size().peak(placement) == solution + grams
    assert working(fit="obs") - working(fit="fast") == planning.FACTOR_BYTES * 128**2
    # A fit of the block begins when the matrices are put away; with rounds they stay, as `obs` would read them again.
    whole = size(64, fit="balanced")
    one, two = (working(fit="balanced", rounds=rounds, quantise="int4") for rounds in (1, 2))
    assert one == whole.activations // 2 + (planning.FIT_BYTES + planning.GRID_BYTES) * block // 4
    grams = 4 * inputs + block
    assert two - one == planning.ROUND_BYTES * block // 4 + grams
    roomy, narrow = (planning.Placement(True, states, False) for states in (10**9, 0))
    assert whole.on_disk(PruneSettings(), narrow, 0) - whole.on_disk(PruneSettings(), roomy, 0) > grams
    # At the end, where distillation needs the most, the rounds need nothing.
    assert working(fit="best", rounds=1) == working(fit="best", rounds=2)
    whole, logits = size(512, fit="best"), planning.LOGIT_BYTES * 512 * tiny("llama").config["vocab_size"]
    fit = planning.FIT_BYTES * whole.weights // 4
    assert whole.working == fit + logits + whole.activations > working(length=512, fit="balanced")


def test_a_multimodal_model_is_as_large_as_its_part_for_text(tmp_path) -> None:
    """Beside what the files weigh, which include the other parts."""
    model = tiny_family("gemma3")
    for name in ("both", "text"):
        model.save_pretrained(tmp_path / name)
    text = {**model.config.get_text_config().to_dict(), "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "text" / "config.json").write_text(json.dumps(text))
    both, alone = (vars(size_of(ModelSource(name, tmp_path / name), fit="best")) for name in ("both", "text"))
    assert both == alone
    assert both["outside_blocks"] == 257 * 64 * 4 + both["activations"] // 2 + 12 * 64 * 257  # logits with gradients
    assert both["block"] == (both["weights"] // 4 - 257 * 64) // 2 * 4
    assert both["activations"] == 2 * 64 * (16 * 64 + 4 * 96 + 2 * 4 * 64) * 4


def test_every_expert_has_gram_matrices_of_its_own(tmp_path) -> None:
    (model := tiny_family("qwen3_moe")).save_pretrained(tmp_path)
    source, hidden, inner, each = ModelSource("mixture", tmp_path), 64, 96, model.config.moe_intermediate_size
    none, fast = (size_of(source, method="wanda", allocation="uniform", fit=fit) for fit in ("none", "fast"))
    solution = (planning.SOLVING_BYTES + 12 - planning.SELECTION_BYTES) * hidden * inner
    grams = 4 * (2 * hidden**2 + model.config.num_experts * (hidden**2 + each**2))
    assert fast.working - none.working == solution + grams + 4 * hidden * inner
    assert none.idle == 2 * 3 * each * hidden * (model.config.num_experts - model.config.num_experts_per_tok) > 0
    assert none.saving == 2.5 * 3 * each * hidden * model.config.num_experts * 4


def test_experts_that_get_few_tokens_are_solved_in_fewer_steps(tmp_path) -> None:
    (model := tiny_family("qwen3_moe")).save_pretrained(tmp_path)
    config = model.config

    def solving(chosen: int) -> int:
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "num_experts_per_tok": chosen}))
        return size_of(ModelSource("mixture", tmp_path), method="wanda", allocation="uniform", fit="fast").solving

    hidden, each = config.hidden_size, config.moe_intermediate_size
    assert 2 * hidden <= 2 * 64  # tokens: enough for all, too few for one of several experts
    of_experts = config.num_experts * (2 * each * hidden**2 + hidden * each**2)
    saved = 2 * config.num_hidden_layers * of_experts * (planning.STEPS - FEW_STEPS)
    assert solving(config.num_experts) - solving(1) == saved


@pytest.fixture
def size(tiny) -> planning.Size:
    return size_of(tiny("llama"))


def placed(size: planning.Size, **resources) -> planning.Placement:
    return planning.choose_placement(size, ResourceSettings(**resources), SETTINGS, "cpu", Ranks())


def test_gradients_go_sample_by_sample_only_where_there_is_room(size) -> None:
    enough = size.held(offload=False) + size.gradients + size.activations
    chosen, less = placed(size, memory=enough), placed(size, memory=enough - 1)
    assert chosen.by_sample and not less.by_sample and not (chosen.offload or less.offload)
    assert not placed(size, memory=enough, offload=True).by_sample


def test_processes_on_one_machine_plan_with_their_part_of_its_memory(size, monkeypatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10 * 10**9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placed(size).states + size.weights + size.working == 2 * 10**9  # 0.8 of a fourth
    assert placed(size, memory=10**9).states + size.weights + size.working == 10**9


@pytest.mark.parametrize(("rate", "takes"), [(1e15, "less than a second"), (1e3, "about ")])
def test_the_estimate_is_said_in_words(rate, takes, size, tiny, monkeypatch) -> None:
    monkeypatch.setattr(cost, "operations_per_second", lambda device, dtype: rate)
    placement = planning.Placement(offload=False, states=0, by_sample=True)
    plan = planning.Plan(SETTINGS, CAUSAL_LM, [], {}, torch.device("cpu"), "float32", "float32", placement, Ranks())
    _, line = planning.cost_of(tiny("llama"), plan, size, CalibrationSettings())
    assert line.startswith(f"this takes {takes}") and "GB of memory on this machine" in line


@pytest.mark.parametrize(("fit", "of_blocks", "of_head"), [("fast", 0, 0), ("balanced", 9, 0), ("best", 21, 12)])
def test_the_products_of_fits_are_counted_in_their_own_dtype(fit, of_blocks, of_head, tiny, monkeypatch) -> None:
    monkeypatch.setattr(cost, "operations_per_second", lambda _, dtype: 4e6 if dtype is torch.bfloat16 else 1e6)
    monkeypatch.setattr(cost, "bytes_per_second", lambda _: 1e9)
    placement = planning.Placement(offload=False, states=0, by_sample=True)
    settings, text = PruneSettings(method="wanda", fit=fit), CalibrationSettings(samples=2, sequence_length=64)
    size, source = size_of(tiny("llama"), method="wanda", fit=fit), tiny("llama")
    slow, fast = (
        planning.cost_of(
            source,
            planning.Plan(settings, CAUSAL_LM, [], {}, torch.device("cpu"), "float32", products, placement, Ranks()),
            size,
            text,
        )[0].seconds
        for products in ("float32", "bfloat16")
    )
    # Of a fit's time three quarters are products, here four times as fast: 0.75 * 3 / 4 of it goes.
    expected = 2 * 2 * 64 * (of_blocks * size.in_blocks + of_head * size.head) / 1e6 * 0.5625
    assert slow - fast == pytest.approx(expected)


def test_bfloat16_checkpoints_are_computed_in_what_the_cpus_of_all_ranks_have(size, tiny, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "has_bfloat16", lambda device: True)
    settings = PruneSettings()
    for others, fast in ((True, "bfloat16"), (False, "float32")):
        group = Ranks(0, 2)
        monkeypatch.setattr(group, "sum_", lambda tensors, others=others: [t.add_(int(others)) for t in tensors])
        for stored, dtype in (("bfloat16", fast), ("float16", "float32"), ("float32", "float32")):
            monkeypatch.setattr(loading, "stored_dtype", lambda source, stored=stored: stored)
            assert planning.choose_dtypes("auto", tiny("llama"), settings, "cpu", group) == (dtype, fast)
            assert planning.choose_dtypes("float32", tiny("llama"), settings, "cpu", group) == ("float32", "float32")
        assert planning.choose_placement(size, ResourceSettings(), settings, "cpu", group).by_sample is others


@pytest.mark.parametrize("has", [True, False])
def test_fits_compute_in_no_float16(has: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    planning.check_float16("float16", PruneSettings(fit="fast"), "cuda:0")
    with nullcontext() if has else pytest.raises(UsageError, match="fits in float16 lose gradients"):
        planning.check_float16("float16", PruneSettings(), "cuda:0")
