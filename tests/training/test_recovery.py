"""Recovery: against a plain loop, interrupted, on two processes, on grids; what it reads, and what it refuses."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, kl_div

from gblm_compress.calibration.generation import Author
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.calibration.weights import StatePool
from gblm_compress.errors import DataError, GblmError, ModelError, OutputError, UsageError
from gblm_compress.models import manifest
from gblm_compress.models.loading import load_model, load_processor, task_of
from gblm_compress.models.source import ModelSource
from gblm_compress.progress import Progress
from gblm_compress.settings import RecoverSettings
from gblm_compress.tasks import TASKS
from gblm_compress.tasks.task import fingerprint
from gblm_compress.tasks.text import load_text
from gblm_compress.training import recovery, texts, trainer
from gblm_compress.training.checkpoints import Checkpoints
from gblm_compress.training.imitation import Teacher
from gblm_compress.training.recovery import Recovery, recover
from gblm_compress.training.texts import grams, windows_of
from gblm_compress.training.trainer import Trainer
from tests.conftest import CAUSAL_LM, Killed, edit_json, edit_weights, export, flip_a_bit, saved
from tests.tasks import families
from tests.tasks.test_image_classification import config_of, process
from tests.training.test_block_fits import by_adam, size

SMALL = {"sequence_length": 32, "batch": 2, "tokens": 640, "rate": 0.01}


@pytest.fixture(autouse=True)
def _float32(monkeypatch) -> None:
    monkeypatch.setattr(recovery, "faster_dtype", lambda device, group: "float32")


@pytest.fixture(scope="module")
def sparse(pruned) -> ModelSource:
    """The tiny Llama at 2:4."""
    return pruned(pattern="2:4")


@pytest.fixture
def train(sparse, tiny, tmp_path, prose):
    """train("out", rate=0.1): the tiny Llama at 2:4, recovered to that folder of the test's own."""

    def run(name: str = "out", data=prose, source=sparse, teacher=None, resume: bool | None = False, **settings):
        data = data if isinstance(data, tuple) else (str(data),)
        chosen = RecoverSettings(**(SMALL | {"data": data} | settings))
        what = Recovery(source, teacher or tiny("llama"), tmp_path / name, chosen)
        return recover(what, Progress(quiet=True), resume)

    return run


def windows_for(source, *data: Path | str, **settings) -> tuple[RecoverSettings, texts.Windows]:
    chosen = RecoverSettings(**(SMALL | {"data": tuple(map(str, data))} | settings))
    author = Author(source, "cpu", 1 << 30, Ranks(), Progress(quiet=True))
    return chosen, windows_of(author, load_processor(source), chosen)


def command(source, teacher, output: Path, prose: Path) -> list[str]:
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    models = [str(source.folder), "--teacher", str(teacher.folder)]
    return ["recover", *models, "-o", str(output), "--data", str(prose), *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def by_hand(source, teacher, windows, settings) -> tuple[float, dict[str, torch.Tensor]]:
    """The held-out loss before and the weights after all steps, by a loop of whole forward passes of both models."""
    student, dense = load_model(source, "float32"), load_model(teacher, "float32")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    trained = {name: parameter for name, parameter in student.named_parameters() if name not in tables}
    masks = {name: parameter.detach() != 0 for name, parameter in trained.items() if parameter.dim() == 2}

    def loss(index: int) -> torch.Tensor:
        ids = windows.samples[index]["input_ids"]
        own, target = (model(ids).logits[0, :-1].log_softmax(-1) for model in (student, dense))
        return kl_div(own, target.detach(), reduction="batchmean", log_target=True)

    def gradients(step: int) -> None:
        for index in windows.steps[step]:
            (loss(index) / settings.batch).backward()
        for name, mask in masks.items():
            trained[name].grad *= mask
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)

    before = sum(float(loss(index).detach()) for index in windows.held_out) / len(windows.held_out)
    by_adam({one: settings.rate * size(one.detach()) for one in trained.values()}, settings.steps, gradients)
    return before, {name: parameter.detach() for name, parameter in student.named_parameters()}


def test_it_is_adam_on_the_loss_of_looks_with_the_zeros_kept(train, sparse, tiny, tmp_path, prose) -> None:
    result = train()
    assert result.best == len(result.curve) - 1 and result.after < result.before  # so that the last weights are kept
    settings, windows = windows_for(sparse, prose)
    loss, expected = by_hand(sparse, tiny("llama"), windows, settings)
    assert result.before == pytest.approx(loss, rel=1e-4)
    got, before = weights(tmp_path / "out"), weights(sparse.folder)
    for name, tensor in got.items():
        assert torch.allclose(tensor.float(), expected[name], rtol=2e-2, atol=1e-3), name  # stored in bfloat16
        assert not torch.signbit(tensor[tensor == 0]).any()
    for name in manifest.read(tmp_path / "out")["layers"]:
        assert ((before[f"{name}.weight"] == 0) <= (got[f"{name}.weight"] == 0)).all()
        assert not torch.equal(before[f"{name}.weight"], got[f"{name}.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], got["model.embed_tokens.weight"])


def test_of_a_model_that_was_only_rounded_all_weights_are_trained(pruned, train, tmp_path) -> None:
    source = pruned("llama", "dense", quantise="int4", group=32)
    result = train(source=source, tokens=2560)
    assert result.after < result.before
    before, after = weights(source.folder), weights(tmp_path / "out")  # on its grid: that is verified at the end
    layers = [f"{name}.weight" for name in manifest.read(source.folder)["layers"]]
    assert any(((before[name] == 0) & (after[name] != 0)).any() for name in layers)
    assert result.trained == sum(after[name].numel() for name in after if "embed" not in name)


def dying(monkeypatch, at: int) -> None:
    """A checkpoint after every step; with number `at` the run ends."""
    original, saved = Checkpoints.save, []

    def dies(self, *args) -> None:
        original(self, *args)
        saved.append(args)
        if len(saved) == at:
            raise Killed

    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "save", dies)


def test_it_goes_on_to_the_same_bits_after_an_end_anywhere(train, pruned, tmp_path, monkeypatch) -> None:
    source = pruned(quantise="int8")
    train("whole", source=source)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch, 5)
        train(source=source)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.recovery").exists()
    with pytest.raises(UsageError, match="differs in settings"):
        train(source=source, resume=True, rate=0.02)
    resumed = train(source=source, resume=True)
    assert resumed.curve[0].tokens == 0 and len(resumed.curve) == 11 and resumed.after < resumed.before
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not (tmp_path / ".out.recovery").exists()


def test_a_checkpoint_that_was_not_written_is_refused_or_done_again(train, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch, 1)
        train()
    (state,) = (tmp_path / ".out.recovery").glob("state-*")
    flip_a_bit(state)
    with pytest.raises(UsageError, match=rf"{state.name}' is missing or was changed.*leave out --resume"):
        train(resume=True)
    train(resume=None)


def test_what_ends_before_the_first_checkpoint_leaves_nothing(train, tmp_path, prose, monkeypatch) -> None:
    full = OSError(28, "No space left on device")
    for raises, seen in ((KeyboardInterrupt, KeyboardInterrupt), (full, OutputError)):
        monkeypatch.setattr(Trainer, "run", Mock(side_effect=raises))
        with pytest.raises(seen) as raised:
            train()
        assert "kept" not in str(raised.value)
        assert [path.name for path in tmp_path.iterdir()] == [prose.name]


def test_too_little_memory_is_told_before_the_work(train, sparse, tiny, tmp_path, prose, monkeypatch) -> None:
    given = sparse, tiny("llama"), RecoverSettings(**SMALL, data=(str(prose),))
    needed, less = (recovery.memory_needed(*given, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert needed > less
    monkeypatch.setattr(recovery.psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(UsageError, match="GB of memory, and .* are free"):
        train()
    assert [path.name for path in tmp_path.iterdir()] == [prose.name]
    monkeypatch.setattr(recovery.psutil, "virtual_memory", lambda: SimpleNamespace(available=needed + 1))
    train()


def test_the_bytes_of_a_weight_are_those_of_the_documentations_table() -> None:
    dense = 2
    assert [recovery.bytes_a_weight(torch.bfloat16, 0.5, n) + dense for n in (1, 2, 4)] == [13, 10, 8.5]
    assert recovery.bytes_a_weight(torch.float32, 0.5, 1) == 13


def test_the_rate_follows_from_task_and_fit_unless_it_is_given(monkeypatch) -> None:
    source = SimpleNamespace(folder=Path("any"))
    for task, fit, rate in (
        ("causal-lm", "balanced", 0.0007), ("causal-lm", "best", 0.0007), ("causal-lm", "fast", 0.002),
        ("embedding", "balanced", 0.003),
    ):  # fmt: skip
        monkeypatch.setattr(recovery.manifest, "read", lambda folder, fit=fit: {"prune": {"fit": fit}})
        monkeypatch.setattr(recovery.loading, "task_of", lambda source, task=task: TASKS[task])
        assert recovery.rate_of(RecoverSettings(), source) == rate
        assert recovery.rate_of(RecoverSettings(rate=0.1), source) == 0.1


def test_a_folder_of_version_0_1_0_is_read_exported_and_recovered(train, sparse, tmp_path) -> None:
    """Its manifest has settings of `prune` that are gone."""
    old = shutil.copytree(sparse.folder, tmp_path / "old")
    gone = {"refine": "swap", "guidance": 0.5, "update": "reconstruct", "distillation_epochs": 2, "fit_dtype": "auto"}
    edit_json(old / manifest.MANIFEST, gblm_compress="0.1.0", prune=manifest.read(old)["prune"] | gone)
    result = train("recovered", source=ModelSource("old", old), rate=None)
    assert result.after < result.before
    for name in (old, tmp_path / "recovered"):
        export(ModelSource("m", name), tmp_path / f"{name.name}-exported", format="bitmask")
    assert manifest.read(tmp_path / "recovered-exported")["prune"]["guidance"] == 0.5


def test_the_disk_must_hold_what_finds_no_room_in_memory(train, sparse, tmp_path, prose, monkeypatch) -> None:
    (short := tmp_path / "short.txt").write_text(prose.read_text()[:400])
    _, windows = windows_for(sparse, short)
    usage, free = shutil.disk_usage(tmp_path), sparse.bytes_on_disk + recovery.checkpoint_bytes(sparse)
    assert windows.passes() > 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    result = train("in-memory", short)
    assert result.passes > 1 and result.after < result.before
    monkeypatch.setattr(recovery, "SHARE_FOR_STATES", 0)
    with pytest.raises(OutputError, match="may be needed for .* the dense model's predictions"):
        train("in-files", short)
    free += len(windows.used) * 32 * sparse.config["hidden_size"] * 4
    train("in-files", short)


def test_another_number_of_processes_goes_on(pair, train, pruned, tiny, tmp_path, prose, monkeypatch) -> None:
    change = "from tests.training.test_recovery import dying, pytest, recovery, torch\n"
    change += "recovery.faster_dtype = lambda device, group: 'float32'\n"
    dies, threads = "dying(pytest.MonkeyPatch(), 5)", "torch.set_num_threads(2)"
    source = pruned(quantise="int8")
    expected = train("whole", source=source)

    def check(name: str, curve: list[float]) -> None:
        assert curve == pytest.approx([look.held_out for look in expected.curve], rel=1e-4)
        got, whole = weights(tmp_path / name), weights(tmp_path / "whole")
        assert all(torch.allclose(got[key].float(), whole[key].float(), rtol=1e-2, atol=1e-3) for key in whole)

    assert pair(*command(source, tiny("llama"), tmp_path / "by one", prose), change=change + dies).code != 0
    assert len([*(tmp_path / ".by one.recovery").glob("state-5.*of2.safetensors")]) == 2
    check("by one", [look.held_out for look in train("by one", source=source, resume=True).curve])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch, 5)
        train("by two", source=source)
    given = command(source, tiny("llama"), tmp_path / "by two", prose)
    done = pair(*given, "--resume", "--json", change=change + threads)
    assert done.code == 0, done.stderr
    other = json.loads(done.stdout)
    assert (other["tokens"], other["trained"]) == (expected.tokens, expected.trained)
    check("by two", [look["held_out"] for look in other["curve"]])


def test_windows_that_are_never_read_need_no_room(tiny, two_texts, tmp_path) -> None:
    _, windows = windows_for(tiny("llama"), *two_texts(60_000, 400), tokens=32 * 100)
    assert windows.passes() > 1 and len(windows.used) < 150 < len(windows.samples) / 5
    teacher = Teacher(None, CAUSAL_LM, windows.samples, windows.used, "float32", StatePool(tmp_path, 0, "cpu"))
    assert len(teacher._kept) == len(windows.used)


@pytest.fixture
def two_texts(tmp_path):
    """two_texts(200, 20): the names of two files of that many letters."""

    def write(*lengths: int) -> list[Path]:
        prose, paths = io.StringIO(load_text("demo", "calibration")), [tmp_path / f"{n}.txt" for n in lengths]
        for path, length in zip(paths, lengths, strict=True):
            path.write_text(prose.read(length))
        return paths

    return write


def test_a_second_training_reads_nothing_that_the_first_has_held_out(tiny, two_texts) -> None:
    one, other = two_texts(60_000, 10_000)

    def pieces(first: int, second: int, tokens: int) -> tuple[set[bytes], set[bytes]]:
        _, windows = windows_for(tiny("llama"), f"{one}={first}", f"{other}={second}", tokens=tokens)
        bits = [each["input_ids"].numpy().tobytes() for each in windows.samples]
        read = {index for step in windows.steps for index in step}
        return {bits[index] for index in read}, {bits[index] for index in windows.held_out}

    mixtures = [pieces(9, 1, 32 * 600), pieces(1, 9, 32 * 400), pieces(1, 1, 32 * 80)]
    assert len({frozenset(held_out) for _, held_out in mixtures}) > 1
    for read, _ in mixtures:
        for _, held_out in mixtures:
            assert not read & held_out


def test_texts_give_their_shares_in_an_order_that_the_seed_decides(tiny, two_texts) -> None:
    one, other = two_texts(20_000, 2_000)
    given = tiny("llama"), f"{one}=3", f"{other}=1"
    size = {"batch": 4, "tokens": 32 * 400}
    windows, again, other = (windows_for(*given, **size, seed=seed)[1] for seed in (0, 0, 1))
    first = len(windows_for(*given[:2], **size)[1].samples)
    order = [index for step in windows.steps for index in step]
    assert len(order) == 400 and not set(order) & set(windows.held_out)
    for end in range(1, len(order) + 1):  # at any place the share is right to the nearest window
        assert abs(sum(index < first for index in order[:end]) - 0.75 * end) <= 1
    assert {index < first for index in windows.held_out} == {True, False}
    assert windows.steps == again.steps != other.steps
    few = texts.Windows([], [], [[0, 1], [2, 3], [0, 1], [2, 3]], {})
    assert [few.passes(steps) for steps in (4, 2, 3, 0)] == [2, 1, 1.5, 0]  # of a training that ends early


def test_grams_are_equal_where_all_their_words_are() -> None:
    words = [f"w{number}" for number in (*range(20), *range(5, 18), 99)]
    hashes = grams(" ".join(words).upper(), {"W7": 1}).tolist()
    assert len(hashes) == len(words) - texts.GRAM + 1
    for one in range(len(hashes)):
        for other in range(len(hashes)):
            same = words[one : one + texts.GRAM] == words[other : other + texts.GRAM]
            assert (hashes[one] == hashes[other]) == same
    assert len(grams("too few words", {})) == 0


@pytest.mark.parametrize("length", [16, 128])
def test_data_that_holds_the_evaluation_is_refused(length, train, tmp_path, prose) -> None:
    (tmp_path / "part.txt").write_text(prose.read_text()[2000:4000])
    part, other = ({"disjoint_from": (str(tmp_path / name),)} for name in ("part.txt", "other.txt"))
    with pytest.raises(DataError, match=r"13-grams of .*part.txt.* \((9\d\.\d|100\.0) %\)"):  # across windows, too
        train(**part, sequence_length=length)
    (tmp_path / "other.txt").write_text("0123456789 " * 40)
    result = train(**other)
    assert result.overlap == {str(tmp_path / "other.txt"): 0.0}


def test_bad_input_is_told_at_once(train, sparse, tiny, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 4)
    changed, name = shutil.copytree(sparse.folder, tmp_path / "changed"), "model.layers.0.self_attn.q_proj.weight"
    edit_weights(changed, lambda tensors: tensors[name][0, :4].fill_(1))
    broken = rf"'changed' is not what `prune` wrote: {name}: breaks pattern 2:4 at row 0, .*; prune again"
    for given, error, message in (
        ({"source": ModelSource("changed", changed)}, ModelError, broken),
        ({"source": tiny("llama")}, ModelError, "nothing says which zeros must stay"),
        ({"teacher": sparse}, UsageError, "is pruned itself"),
        ({"teacher": tiny("mistral")}, UsageError, "its (head|embedding) is not that of the pruned model"),
        ({"teacher": sparse, "data": tmp_path / "gone.txt"}, GblmError, r"^2 faults[\s\S]*gone\.txt"),
        ({"data": tmp_path / "short.txt"}, DataError, "holds 1 window of 32 tokens, and two are needed"),
        ({"rate": 1e30}, ModelError, "give a smaller --rate"),
    ):
        with pytest.raises(error, match=message):
            train(**given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "prose.txt", "short.txt"]


def test_tokens_and_weights_of_texts_are_read_and_checked() -> None:
    faults = [(SMALL | {"tokens": 63}, "one step takes 64"), ({"tokens": "2 million"}, "is not a number of tokens")]
    faults += [({"data": (f"a.txt={weight}",)}, "weight") for weight in ("0", "-1", "nan", "inf")]
    for given, message in faults:
        with pytest.raises(ValueError, match=message):
            RecoverSettings(**given)
    assert RecoverSettings(tokens="1.5M").tokens == 1_500_000
    found = RecoverSettings(data=("a=b.txt=1e3", "a=b.txt")).data
    assert [(text.dataset, text.weight) for text in found] == [("a=b.txt", 1000), ("a=b.txt", 1)]


def test_a_model_is_trained_on_what_the_dense_one_writes(train, tiny, tmp_path) -> None:
    done = train(data="self")
    _, windows = windows_for(tiny("llama"), "self")
    assert manifest.read(tmp_path / "out")["recovery"]["text"] == fingerprint(windows.samples)
    assert done.tokens == 640 and len(windows.samples) == 21 and windows.passes() <= 1


def of_texts(tmp_path, prose) -> tuple[ModelSource, tuple[str, ...]]:
    """A second dataset has shorter texts."""
    (tmp_path / "short.txt").write_text("\n".join(f"a b c d {number}" for number in range(64)))
    return families.written(tmp_path / "bert", "bert"), (str(prose), str(tmp_path / "short.txt"))


def of_images(tmp_path, prose) -> tuple[ModelSource, tuple[str, ...]]:
    generator = numpy.random.default_rng(0)
    for number in range(128):
        place = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)).save(place)
    config = config_of("vit")
    config.initializer_range = 0.3
    torch.manual_seed(0)
    source = saved(transformers.ViTForImageClassification(config), tmp_path / "vit")
    process(source.folder)
    return source, (str(tmp_path / "images"),)


def distance(task, dense, pruned) -> torch.Tensor:
    """Of one sample's outputs without padding."""
    if task.output == "logits":
        return kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
    return 1 - cosine_similarity(dense.mean(1), pruned.mean(1))[0]


@pytest.mark.parametrize("made", [of_texts, of_images])
def test_encoders_and_classifiers_learn_the_dense_output(made, train, pruning, tmp_path, prose) -> None:
    """The first look is the mean over samples one by one, without padding; training lowers it and keeps the zeros."""
    (source, data), more = made(tmp_path, prose), {"tokens": 16_384, "batch": 16, "rate": 0.003}
    pruning("pruned", source, method="magnitude", sparsity=0.7)
    pruned = ModelSource("pruned", tmp_path / "pruned")
    result = train(source=pruned, teacher=source, data=data, **more)
    task, dense, sparse = task_of(source), load_model(source, "float32"), load_model(pruned, "float32")
    _, windows = windows_for(source, *data, **more)
    expected = []
    for index in windows.held_out:
        sample = task.arguments(windows.samples[index])
        with torch.no_grad():
            outputs = (getattr(model(**sample), task.output) for model in (dense, sparse))
            expected.append(distance(task, *outputs))
    assert result.before == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)
    assert result.after < 0.9 * result.before
    trained = load_model(ModelSource("out", tmp_path / "out"), "float32")
    for name in manifest.read(tmp_path / "out")["layers"]:
        before, after = (model.get_submodule(name).weight for model in (sparse, trained))
        assert not after[before == 0].any() and not torch.equal(before, after)
