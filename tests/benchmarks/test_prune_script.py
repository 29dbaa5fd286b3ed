"""The pruning benchmark at toy size; and its independent re-implementation of GBLM as an oracle of `prune_`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gblm_compress.cli.app import main as command_line
from gblm_compress.models.tiny import VOCABULARY, tiny_model
from gblm_compress.pruning import stage
from gblm_compress.pruning.in_memory import prune_
from gblm_compress.settings import PruneSettings
from tests.conftest import samples
from tests.scripts import loaded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the benchmark reads /proc of Linux")


@pytest.fixture(scope="module")
def script():
    with loaded("prune") as module:
        yield module


@pytest.fixture(scope="module")
def reference():
    with loaded("reference_gblm") as module:
        yield module


@pytest.fixture(scope="module")
def random_llama():
    with loaded("random_llama") as module:
        yield module


@pytest.mark.parametrize(
    ("kind", "pattern", "norm"),
    [
        *(("llama", pattern, norm) for pattern in ("2:4", "unstructured", "1:4") for norm in ("l1", "l2")),
        ("qwen2", "2:4", "l1"),
        ("qwen3", "unstructured", "l2"),
    ],
)
def test_pruning_gives_the_masks_of_the_reference(reference, kind, pattern, norm, progress) -> None:
    given = samples(6, 48)
    ids = [sample["input_ids"] for sample in given]
    slow, fast = tiny_model(kind, seed=1), tiny_model(kind, seed=1)
    expected = reference.prune_(slow, ids, reference.gradient_norms(slow, ids)[norm], pattern, 100.0)
    results = prune_(fast, given, PruneSettings(pattern=pattern, gradient_norm=norm, fit="none"), progress)
    assert list(results) == list(expected)
    same = [(fast.get_submodule(name).weight != 0) == mask for name, mask in expected.items()]
    agreement = sum(int(layer.sum()) for layer in same) / sum(layer.numel() for layer in same)
    assert agreement >= 0.999  # all but equal scores may change places by rounding


def test_the_reference_keeps_the_highest_scores_of_each_group(reference) -> None:
    """Against sorted lists; with many ties, of the score alone and of score and magnitude."""
    generator = torch.Generator().manual_seed(0)
    score, weight = (torch.randint(0, 3, (5, 8), generator=generator).float() for _ in range(2))
    for pattern, keep, group in (("2:4", 2, 4), ("unstructured", 4, 8)):
        mask = reference.survivors(score, weight, pattern)
        for row, start in ((row, start) for row in range(5) for start in range(0, 8, group)):
            own = range(start, start + group)
            best = sorted(own, key=lambda j, row=row: (-float(score[row, j]), -float(weight[row, j]), j))[:keep]
            assert [j for j in own if mask[row, j]] == sorted(best)


def test_a_random_llama_is_whole_and_computes(random_llama, tmp_path) -> None:
    shape = random_llama.Shape(hidden=64, intermediate=96, blocks=3, heads=4, kv_heads=2, vocabulary=300)
    total = random_llama.write_random_llama(tmp_path / "one", shape)
    random_llama.write_random_llama(tmp_path / "two", shape)
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) == 5 and all(
        (tmp_path / "two" / n).read_bytes() == (tmp_path / "one" / n).read_bytes() for n in shards
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16 and sum(p.nbytes for p in model.parameters()) == total
    found = {
        n: tuple(m.weight.shape) for n, m in model.model.layers[2].named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert found == shape.matrices()
    ids = samples(1, 512)[0]["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(SystemExit, match=f"--vocab 256 is too small: the tokenizer has {VOCABULARY}"):
        random_llama.write_random_llama(tmp_path / "three", random_llama.Shape(64, 96, 1, 4, 2, 256))


def test_a_tied_head_is_stored_once(random_llama, tmp_path) -> None:
    shape = random_llama.Shape(hidden=32, intermediate=48, blocks=1, heads=2, kv_heads=1, vocabulary=300, tied=True)
    total = random_llama.write_random_llama(tmp_path / "model", shape, "float16")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.nbytes for p in model.parameters()) == total and model.dtype == torch.float16


def test_the_presets_have_the_parameters_they_are_called_after(random_llama) -> None:
    parameters = {
        name: sum(torch.Size(size).numel() for shard in shape.shards() for size in shard.values())
        for name, shape in random_llama.PRESETS.items()
    }
    assert parameters["1.1b"] == 1_100_048_384  # TinyLlama's
    assert 1.0e9 < parameters["1b"] < 1.05e9


def test_side_by_side_with_the_reference_in_processes_of_their_own(tmp_path) -> None:
    arguments = ["--toy", "--rounds", "1", "--sections", "reference", "--json", str(tmp_path / "result.json")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "prune.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    section = json.loads((tmp_path / "result.json").read_text())["sections"]["reference"]
    base, *ours = section["rows"]
    assert base["execution"] == "reference" and base["times_faster"] == base["share_of_reference_memory"] == 1
    assert len(ours) == 4
    for row in ours:
        assert row["mask_agreement"] >= (0.999 if "float32" in row["execution"] else 0.9)
        assert row["times_faster"] == pytest.approx(base["seconds"] / row["seconds"])
    for row in section["rows"]:
        assert row["seconds"] > 0 and 0 < row["peak_anonymous_bytes"] < row["peak_rss_bytes"] < 1e9


def test_what_is_measured_is_what_was_taken(script, tmp_path) -> None:
    """A process that holds 300 MB for itself and reads 200 MB of a mapped file, and sleeps half a second."""
    (tmp_path / "file").write_bytes(bytes(200 << 20))
    (tmp_path / "job.py").write_text(
        "import mmap, sys, time\n"
        "held = bytearray(300 << 20)\n"
        "with open(sys.argv[1]) as file:\n"
        "    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "    sum(mapped[i] for i in range(0, len(mapped), 4096))\n"
        "time.sleep(0.5)\n"
    )
    cost = script.measured([str(tmp_path / "job.py"), str(tmp_path / "file")])
    assert 300 << 20 <= cost.peak_anonymous_bytes < 330 << 20
    assert 500 << 20 <= cost.peak_rss_bytes < 540 << 20
    assert cost.seconds > 0.5
    with pytest.raises(SystemExit, match=r"ended with 2:(?s:.*)No such option"):
        script.measured(["prune", "--no-such-option"])


def test_every_section_runs(script, tmp_path, monkeypatch) -> None:
    """The command line is read and then not carried out, and the costs are made up; all else is real."""

    def cost_of(source, output, settings, calibration, **options):
        costs.append(script.Cost(20.0 if settings.method == "magnitude" else 50.0 + calibration.samples, 1.0, 7, 1))
        raise SystemExit(0)

    def measured(arguments: list[str]):
        monkeypatch.setattr(sys, "argv", ["gblm-compress", *arguments])
        with pytest.raises(SystemExit, match="0"):
            command_line()
        return costs[-1]

    costs: list = []
    monkeypatch.setattr(stage, "prune", cost_of)
    monkeypatch.setattr(script, "measured", measured)
    bench = script.Bench(script.TOY, tmp_path, 1, Console(quiet=True))
    results = {name: script.SECTIONS[name](bench) for name in ("blocks", "large", "methods", "gemm")}
    assert [row["blocks"] for row in results["blocks"]["rows"]] == [1, 2, 3]
    assert results["blocks"]["per_block"]["peak_rss_bytes"]["slope"] == pytest.approx(0)
    for row in results["large"]["rows"]:
        assert row["share_of_checkpoint"] == row["peak_rss_bytes"] / row["checkpoint_bytes"]
    assert results["methods"]["seconds_over"]["gblm, tokens"]["r2"] == pytest.approx(1)
    for row in results["gemm"]["rows"]:
        assert row["floor_seconds"] == pytest.approx(
            row["block_gflop"] / row["gemm_gflop_per_second"] + row["of_it_head_seconds"]
        )
        assert row["share_of_gemm"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["share_of_gemm"] < row["share_of_gemm_less_magnitude"]
    script.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name, result in results.items():
        assert script.show(name, result["rows"]).row_count == len(result["rows"])


def test_line(script) -> None:
    fit = script.line([1, 2, 3, 4], [5.0, 7.0, 9.0, 11.0])
    assert fit == pytest.approx({"start": 3, "slope": 2, "r2": 1, "points": 4})
    assert script.line([0, 1, 2], [0.0, 1.0, 0.0])["r2"] == pytest.approx(0)


def test_mask_agreement_counts_weights_of_the_masked_layers_that_were_not_zero(script, tmp_path) -> None:
    save_file({"a": torch.tensor([[True, False, True], [True, True, False]])}, tmp_path / "masks.safetensors")
    others = {"b.weight": torch.zeros(3, 3)}
    for name, weight in (
        ("dense", torch.tensor([[0.5, 1.0, 0.0], [2.0, -1.0, 0.0]])),
        ("pruned", torch.tensor([[0.5, 0.0, 0.0], [0.0, -1.0, 0.0]])),
    ):
        (tmp_path / name).mkdir()
        save_file({"a.weight": weight} | others, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "m"}')
    folders = (tmp_path / "pruned", tmp_path / "masks.safetensors", tmp_path / "dense")
    assert script.mask_agreement(*folders) == 0.75
