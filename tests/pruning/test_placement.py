"""What a run plans to need, and where it puts things."""

import json
from types import SimpleNamespace

from gblm_compress.calibration.ranks import Ranks
from gblm_compress.models.source import ModelSource
from gblm_compress.pruning import placement
from gblm_compress.settings import CalibrationSettings, PruneSettings, ResourceSettings
from tests.families.tiny import tiny_family


def test_distillation_plans_with_the_logits_of_a_whole_sample_and_all_blocks(tiny) -> None:
    text = CalibrationSettings(samples=2, sequence_length=512)
    one, whole = (
        placement.Size(tiny("llama"), "float32", PruneSettings(method="wanda", distillation_epochs=epochs), text)
        for epochs in (0, 1)
    )
    vocabulary = tiny("llama").config["vocab_size"]
    fit = placement.FIT_BYTES * whole.weights // 4
    assert whole.working == fit + placement.LOGIT_BYTES * 512 * vocabulary + whole.activations > one.working


def test_updates_plan_with_gram_matrices_and_rounds_with_copies(tiny) -> None:
    text = CalibrationSettings(samples=2, sequence_length=64)

    def working(**chosen) -> int:
        return placement.Size(
            tiny("llama"), "float32", PruneSettings(**({"method": "wanda", "update": "none"} | chosen)), text
        ).working

    inputs = 3 * 64**2 + 128**2  # three inputs of the hidden size, one of the intermediate size
    block = placement.Size(tiny("llama"), "float32", PruneSettings(fit="none"), text).block
    # The block as it was is kept beside them, for the errors of its layers' outputs.
    assert working(update="least-squares") - working() == 4 * inputs + block
    assert working(update="obs") - working(update="least-squares") == placement.FACTOR_BYTES * 128**2
    one, two = (working(update="reconstruct", reconstruction_rounds=rounds) for rounds in (1, 2))
    assert two - one == placement.ROUND_BYTES * block // 4
    assert working(update="reconstruct", quantise="int4") - one == placement.GRID_BYTES * block // 4
    # At the end, where distillation needs the most, neither is there any more.
    one, two = (working(update="reconstruct", reconstruction_rounds=rounds, distillation_epochs=1) for rounds in (1, 2))
    assert one == two == working(distillation_epochs=1)


def test_a_multimodal_model_is_as_large_as_its_part_for_text(tmp_path) -> None:
    """Beside what the files weigh, which include the other parts."""
    model = tiny_family("gemma3")
    model.save_pretrained(tmp_path / "both")
    text = {**model.config.get_text_config().to_dict(), "architectures": ["Gemma3ForCausalLM"]}
    assert "text_config" in model.config.to_dict() and text["hidden_size"] == 64
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(text))
    weights = "model.safetensors"
    (tmp_path / "text" / weights).write_bytes((tmp_path / "both" / weights).read_bytes())
    settings, samples = PruneSettings(fit="best"), CalibrationSettings(samples=2, sequence_length=64)
    both, alone = (
        vars(placement.Size(ModelSource(name, tmp_path / name), "float32", settings, samples))
        for name in ("both", "text")
    )
    assert both == alone
    assert both["outside_blocks"] == 2 * 257 * 64 * 4 and both["block"] == both["weights"] // 2
    assert both["activations"] == 2 * 64 * (16 * 64 + 4 * 96 + 2 * 4 * 64) * 4


def test_gradients_go_sample_by_sample_only_where_there_is_room(tiny) -> None:
    settings, text = PruneSettings(fit="none"), CalibrationSettings(samples=2, sequence_length=64)
    size = placement.Size(tiny("llama"), "float32", settings, text)
    enough = size.weights + size.working + size.gradients + size.activations
    chosen = placement.choose_placement(size, ResourceSettings(memory=enough), settings, "cpu", Ranks())
    assert chosen.by_sample and not chosen.offload
    chosen = placement.choose_placement(size, ResourceSettings(memory=enough - 1), settings, "cpu", Ranks())
    assert not chosen.by_sample and not chosen.offload
    assert not placement.choose_placement(
        size, ResourceSettings(memory=enough, offload=True), settings, "cpu", Ranks()
    ).by_sample


def test_processes_on_one_machine_plan_with_their_part_of_its_memory(tiny, monkeypatch) -> None:
    settings, text = PruneSettings(fit="none"), CalibrationSettings(samples=2, sequence_length=64)
    size = placement.Size(tiny("llama"), "float32", settings, text)
    monkeypatch.setattr(placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * 10**9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    chosen = placement.choose_placement(size, ResourceSettings(), settings, "cpu", Ranks())
    assert chosen.states + size.weights + size.working == 2 * 10**9  # 0.8 of a fourth
    chosen = placement.choose_placement(size, ResourceSettings(memory=10**9), settings, "cpu", Ranks())
    assert chosen.states + size.weights + size.working == 10**9
