"""Recipes: YAML 1.2 within limits; every fault is found at once, with its place and a suggestion."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.runs.recipe import SHIPPED, find_recipe, load_recipe, read_yaml, schema
from gblm_compress.settings import Recipe


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def faults_of(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value)


def test_all_faults_at_once_with_line_and_suggestion(tmp_path) -> None:
    text = "model: demo\nprune:\n  methd: gblm\n  pattern: 4:2\nexport:\n  - format: onx\n  - frmat: onnx\n"
    message = faults_of(tmp_path, f"{text}benchmark:\n  batch: [1, 0]\nevalute: {{}}\n")
    path = tmp_path / "r.yaml"
    for expected in (
        f"{path}:3: prune.methd: unknown key; did you mean 'method'?",
        f"{path}:4: prune.pattern: pattern '4:2' is not known",
        f"{path}:6: export.0.format: input should be 'onnx', 'bitmask', 'semi-structured', 'bitmask-int8', "
        "'bitmask-int4' or 'int8', got \"onx\"",
        f"{path}:7: export.1.frmat: unknown key; did you mean 'format'?",
        f"{path}:7: export.1.format: missing; it is required",
        f"{path}:9: benchmark.batch.1: input should be greater than or equal to 1, got 0",
        f"{path}:10: evalute: unknown key; did you mean 'evaluate'?",
        "7 faults",
    ):
        assert expected in message


GATES = "evaluate: {}\ngates"
ONNX = "export: [{format: onnx}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: {max_perplexity_increase: 0.1}", "needs an 'evaluate' section"),
        ("gates: {min_decode_speedup: 1.3}", "needs a 'benchmark' section"),
        ("prune: {pattern: 2:4, sparsity: 0.6}", "contradicts pattern 2:4"),
        ("export: [{format: onnx}, {format: onnx}]", "listed twice"),
        ("resources: {memory: 4}", "memory 4 has no known unit; give for example 4GiB"),
        ('prune: {pattern: "2:4\\n"}', "prune.pattern: pattern '2:4\\n' is not known"),
        ("prune: " + "y" * 5000, 'got "yyy'),
        ("export: [{format: bitmask, graph: plain}]", "graph would do nothing: only format onnx reads it"),
        (f"{ONNX}gates: {{max_bytes: 1MB, artefact: bitmask}}", "of the recipe, which makes pruned, onnx"),
        ("benchmark: {}\ngates: {min_decode_speedup: 0.9}", "name its artefact"),
        ("gates: {artefact: pruned}", "gates.0.artefact: would do nothing"),
        (f"{GATES}: {{max_mean_k: 1}}", "r.yaml:3: gates.0.max_mean_k: unknown key; did you mean"),
        ("gates:\n  - max_tpot_ms: 9\n  - max_bytes: 1GB", "gates.0.max_tpot_ms: needs a 'benchmark' section"),
        ("gates:\n  - max_bytes: 1GB\n  - max_bytes: 1", "r.yaml:4: gates.1.max_bytes: memory 1 has no known unit"),
        (f"{GATES}: {{min_task_accuracy: 0.5}}", "needs an 'evaluate' section with tasks"),
        (f"evaluate: {{tasks: [piqa]}}\n{ONNX}gates: {{min_task_accuracy: 0.5, artefact: onnx}}", "torch only"),
        ("prune: {method: sparsegpt}", "got \"sparsegpt\"; did you mean 'obs'?"),
        ("prune: {pattern: dense}", "'dense' prunes nothing; add quantise int4 or int8"),
        ("prune: {pattern: dense, quantise: int4, method: wanda}", "method and allocation would do nothing"),
        ("prune: {fit: balancd}", "did you mean 'balanced'?"),
        ("benchmark: {runtimes: [torch, ort]}", "did you mean 'onnxruntime'?"),
        ("prune: none", 'prune: a section is a mapping of keys, or null to leave it out, got "none"'),
        ("prune: null", "r.yaml:2: prune: null without an export leaves nothing to do"),
        (f"prune: null\nevaluate: {{tasks: [piqa]}}\n{ONNX}", "evaluate.tasks: tasks run in torch only"),
    ],
)
def test_faults(tmp_path, text: str, message: str) -> None:
    assert message in faults_of(tmp_path, f"model: demo\n{text}\n")


def test_all_that_needs_a_pruned_model_is_refused_without_one(tmp_path) -> None:
    message = faults_of(
        tmp_path,
        "model: demo\nrecover: {}\nbenchmark: {float_baseline: false}\nexport:\n  - {format: onnx, kernels: auto}\n"
        "  - {format: int8}\n  - format: bitmask-int8\n  - {format: onnx, quantise: int8,\n     kernels: true}\n"
        "gates:\n  - {max_bytes: 1GB, artefact: pruned}\n",
        "prune=null",
    )
    _, *faults, of_gate = message.splitlines()
    assert [fault.partition(" needs a pruned model, but prune is null; leave it out")[0] for fault in faults] == [
        f"{tmp_path}/r.yaml:{said}" for said in (
            "2: recover:", "5: export.0.kernels: kernels", "7: export.2.format: bitmask-int8",
            "9: export.3.kernels: kernels", "3: benchmark.float_baseline: false",
        )
    ]  # fmt: skip
    assert "r.yaml:11: gates.0.artefact: 'pruned' is not an artefact of the recipe, which makes onnx-k" in of_gate


def test_overrides_are_yaml_with_dotted_keys(tmp_path) -> None:
    path = write(tmp_path, "model: demo\nexport: [{format: onnx}]\n")
    changes = ("prune.pattern=2:4", "model.device=cpu", "export.0.dtype=float16", "benchmark.batch=[1, 8]")
    assert load_recipe(path, changes) == Recipe.model_validate({
        "model": {"source": "demo", "device": "cpu"}, "prune": {"pattern": "2:4"}, "benchmark": {"batch": (1, 8)},
        "export": ({"format": "onnx", "dtype": "float16"},),
    })  # fmt: skip


def test_places_are_lines_and_overrides(tmp_path) -> None:
    assert "a recipe is a mapping with a key 'model'; this is null" in faults_of(tmp_path, "")
    assert "r.yaml:1: model: missing; it is required" in faults_of(tmp_path, "prune: {}")
    message = faults_of(tmp_path, "model: demo\nprune: {alpha: 1}\n", "prune.alpha=x", "calibration.samples=0")
    assert "--set prune.alpha: prune.alpha: input should be a valid number" in message
    assert "--set calibration.samples: calibration.samples: input should be greater" in message


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is not a file"):
            find_recipe(str(path))
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "gone.yaml")
    for name in ("a\0b", "a" * 5000, "no-such"):
        with pytest.raises(UsageError, match="no such file; shipped recipes are best-quality, ci-smoke"):
            find_recipe(name)


def test_malformed_overrides(tmp_path) -> None:
    path = write(tmp_path, "model: demo\nexport: [{format: onnx}]\n")
    for override in ("prune.alpha", "=3", "export.5.dtype=float16", "model.source.deeper=1", "prune=[", "a..b=1",
                     "prune.alpha=!!int x", "prune=&a [*a]", "model=\udcff", ".".join("a" * 5000) + "=1"):  # fmt: skip
        with pytest.raises(UsageError, match="--set"):
            load_recipe(path, (override,))


def test_schema_describes_every_key() -> None:
    for definition in json.loads(json.dumps(schema()))["$defs"].values():
        assert all("description" in field for field in definition["properties"].values())


VALID = [
    "model: demo",
    "model: {source: demo, dtype: bfloat16, device: cpu}\nprune: null\nexport: [{format: onnx, quantise: int8}]",
    'model: demo\nprune: {pattern: "16:32", preset: paper, fit: best}\nresources: {memory: 4GiB, offload: true}',
    "model: demo\nprune: {pattern: unstructured-per-matrix, sparsity: 0.6, alpha: 100, preset: null, ignore: [a, b]}",
    'model: demo\nprune: {overrides: [{layers: a, pattern: dense}, {layers: b, pattern: "1:4"}], sparsity: null}',
    "model: demo\ncalibration: {samples: 2.0}\nexport: []\nevaluate: null\nbenchmark: {batch: [1], runtimes: [torch]}",
]
INVALID = [
    "{}",
    "model: demo\nmodell: demo",
    "model: 3",
    "model: {source: demo, dtype: fp16}",
    "model: demo\nprune: none",
    "model: demo\nprune: {pattern: 124}",
    'model: demo\nprune: {pattern: "2:04"}',
    'model: demo\nprune: {pattern: "٢:٤"}',
    'model: demo\nprune: {pattern: "1:4000000"}',
    'model: demo\nprune: {overrides: [{layers: a, pattern: "x"}]}',
    "model: demo\nprune: {ignore: a}",
    "model: demo\ncalibration: {sequence_length: 64.5}",
    "model: demo\nresources: {memory: 4 bananas}",
    "model: demo\nexport: {format: onnx}",
]


@pytest.mark.parametrize("text", VALID + INVALID)
def test_schema_and_loader_agree(tmp_path, text: str) -> None:
    """An editor that checks with the schema, on values read as JSON has them, says what the loader says."""
    content = json.loads(json.dumps(read_yaml(text.encode(), str).plain()))
    in_editor = jsonschema.Draft202012Validator(schema()).is_valid(content)
    assert in_editor == (text in VALID)
    if in_editor:
        load_recipe(write(tmp_path, text))
    else:
        faults_of(tmp_path, text)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_in_yaml_1_1_too_and_open_with_their_command(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(path.stem) == find_recipe(f"recipes/{path.name}") == path
    assert path.read_text().splitlines()[0] == f"# gblm-compress run recipes/{path.name}"
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema())
    assert Recipe.model_validate(content) == load_recipe(path)


def test_values_are_those_of_the_core_schema() -> None:
    """Not those of YAML 1.1, which reads 2:4 as 124, yes as true, 010 as 8 and 2024-01-01 as a date."""
    found = read_yaml(b"[2:4, yes, 010, 2024-01-01, 0o17, 1e2, 2.0, 1e400, True, ~, '12', [a, {b: }]]", str).plain()
    expected = ("2:4", "yes", 10, "2024-01-01", 15, 100, 2, float("inf"), True, None, "12", ("a", {"b": None}))
    assert repr(found) == repr(expected)
    found = read_yaml(b"\xef\xbb\xbf%YAML 1.2\n---\n1: x\r\ntrue: y\n<<: {a: 1}\n...\n", str).plain()
    assert found == {"1": "x", "true": "y", "<<": {"a": 1}}


def faults_of_yaml(content: str | bytes) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read_yaml(content if isinstance(content, bytes) else content.encode(), str)
    return caught.value.faults


def test_what_json_cannot_say_is_a_fault_with_its_line() -> None:
    content = (
        "a: &a [x, *a]\nb: !!python/object/apply:os.system [true]\nc: !!binary aGk=\nd:\n e: 1\n e: 2\n? [a, b]\n: 1\n"
        f'f: {"9" * 5000}\ng: "\\ud800"\n'
    )
    expected = (
        "1: &a is an anchor", "2: 'python/object/apply:os.system' is a tag", "3: 'binary' is a tag",
        "6: key 'e' appears twice", "7: a key is a mapping or a sequence", "9: a number of 5,000 characters",
        "10: '\\ud800' holds NUL or half a character",
    )  # fmt: skip
    for found, said in zip(faults_of_yaml(content), expected, strict=True):
        assert found.startswith(said)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[" * 500, "1: nested too deeply"),
        ("x" * 100_000, "1: not valid YAML: more than 65,536 bytes"),
        ("b: *x", "1: not valid YAML: found undefined alias"),
        ("a:\n  b: !!int abc", "1: not valid YAML: invalid literal for int"),
        ("a: [\n\n", "3: not valid YAML: while parsing a flow node, expected the node content"),
        ("a: 1\nb: \0", "2: not valid YAML: unacceptable character #x0000"),
        (b"a: 1\nb: \xff", "2: not valid YAML: 'utf-8' codec can't decode byte 0xff"),
        ('a: "\\Uffffffff"', "1: not valid YAML"),
        ("a: !!bool x", "1: not valid YAML: 'x'"),
        ("a: 1\n---\nb: 2", "2: not valid YAML: expected a single document"),
    ],
    ids=lambda text: text[:8],
)
def test_what_is_no_yaml_is_a_fault_with_its_line(content, fault) -> None:
    (found,) = faults_of_yaml(content)
    assert found.startswith(fault)
