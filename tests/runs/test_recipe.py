import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.runs.recipe import SHIPPED, find_recipe, load_recipe, read_yaml, schema
from gblm_compress.settings import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_opens_with_its_command(path: Path) -> None:
    load_recipe(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# gblm-compress run recipes/{path.name}"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_patterns_need_no_quotes(tmp_path) -> None:
    """YAML 1.1 reads 2:4 as the base-60 number 124."""
    assert yaml.safe_load("2:4") == 124
    recipe = load_recipe(write(tmp_path, "model: demo\nprune: {pattern: 2:4, alpha: 1e2}\n"))
    assert recipe.prune.pattern == "2:4" and recipe.prune.alpha == 100


def test_all_faults_at_once_with_line_and_suggestion(tmp_path) -> None:
    path = write(
        tmp_path,
        "model: demo\n"
        "prune:\n"
        "  methd: gblm\n"
        "  pattern: 4:2\n"
        "export:\n"
        "  - format: onx\n"
        "  - frmat: onnx\n"
        "benchmark:\n"
        "  batch: [1, 0]\n"
        "evalute: {}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    for expected in (
        f"{path}:3: prune.methd: unknown key; did you mean 'method'?",
        f"{path}:4: prune.pattern: pattern '4:2' is not known",
        f"{path}:6: export.0.format: input should be 'onnx', 'bitmask', 'semi-structured', 'bitmask-int8', "
        "'bitmask-int4', 'semi-structured-int8', 'semi-structured-int4' or 'int8', got \"onx\"",
        f"{path}:7: export.1.frmat: unknown key; did you mean 'format'?",
        f"{path}:7: export.1.format: missing; it is required",
        f"{path}:9: benchmark.batch.1: input should be greater than or equal to 1, got 0",
        f"{path}:10: evalute: unknown key; did you mean 'evaluate'?",
        "7 faults",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping with a key 'model'; this is null"),
        ("model: demo\nmodel: tiny", "key 'model' appears twice"),
        ("prune: {}", "model: missing; it is required"),
        ("model: demo\ngates: {max_perplexity_increase: 0.1}", "needs an 'evaluate' section"),
        ("model: demo\ngates: {min_decode_speedup: 1.3}", "needs a 'benchmark' section"),
        ("model: demo\nprune: {pattern: 2:4, sparsity: 0.6}", "contradicts pattern 2:4"),
        ("model: demo\nexport: [{format: onnx}, {format: onnx}]", "listed twice"),
        ("model: demo\nevaluate: {}\ncompare: {methods: [wanda, gblm, wanda]}", "methods has 'wanda' twice"),
        (
            "model: demo\nresources: {memory: 4}",
            "memory 4 has no unit, or not one that is known; give for example 4GiB",
        ),
        ('model: demo\ncalibration: {dataset: "\\ud800"}', "r.yaml:2: '\\ud800' holds NUL or half a character"),
        ('model: demo\nprune: {pattern: "2:4\\n"}', "prune.pattern: pattern '2:4\\n' is not known"),
        ("model: demo\nprune: " + "y" * 5000, 'got "yyy'),
        (
            "model: demo\nexport: [{format: onnx, dtype: bfloat16}]",
            "export.0: onnx has no bfloat16; give float32 or float16",
        ),
        (
            "model: demo\nexport: [{format: bitmask, graph: plain}]",
            "graph would do nothing: it is read with format onnx",
        ),
        (
            "model: demo\nexport: [{format: onnx}]\nbenchmark: {}\ngates: {min_decode_speedup: 1.3, artefact: bitmask}",
            "gates.artefact 'bitmask' is none of what the recipe makes: pruned, onnx",
        ),
        ("model: demo\nbenchmark: {}\ngates: {min_decode_speedup: 0.9}", "say of which artefact"),
        ("model: demo\ngates: {artefact: pruned}", "gates.artefact would do nothing"),
        (
            "model: demo\nevaluate: {}\ngates: {max_mean_k: 1}",
            "r.yaml:3: gates.0.max_mean_k: unknown key; did you mean",
        ),
        ("model: demo\ngates:\n  - max_tpot_ms: 9\n  - max_bytes: 1GB", "gate max_tpot_ms needs a 'benchmark' section"),
        (
            "model: demo\ngates:\n  - max_bytes: 1GB\n  - max_bytes: 1",
            "r.yaml:4: gates.1.max_bytes: memory 1 has no unit",
        ),
        ("model: demo\nevaluate: {}\ngates: {min_task_accuracy: 0.5}", "needs an 'evaluate' section with tasks"),
        (
            "model: demo\nevaluate: {tasks: [piqa]}\nexport: [{format: onnx}]\n"
            "gates: {min_task_accuracy: 0.5, artefact: onnx}",
            "gate min_task_accuracy is on onnx, and tasks are asked in torch only",
        ),
        ("model: demo\ncalibration: {dataset: written}", "dataset 'written' needs a 'generate' section"),
        ("model: demo\ngenerate: {tokens: 2M}", "'generate' would do nothing: name 'written' in"),
        (
            "model: demo\ngenerate: {}\ncalibration: {dataset: written}\nprune: {method: magnitude, fit: none}",
            "'generate' would do nothing",
        ),
        ("model: demo\ngenerate: {}\nrecover: {data: [written]}\nevaluate: {dataset: written}", "judges no model"),
        ("model: demo\ngenerate: {starts: written}\ncalibration: {dataset: written}", "starts"),
    ],
)
def test_faults(tmp_path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


def test_overrides_are_yaml_with_dotted_keys(tmp_path) -> None:
    path = write(tmp_path, "model: demo\nexport: [{format: onnx}]\n")
    recipe = load_recipe(
        path, ("prune.pattern=2:4", "model.device=cpu", "export.0.dtype=float16", "benchmark.batch=[1, 8]")
    )
    assert recipe.prune.pattern == "2:4"
    assert (recipe.model.source, recipe.model.device) == ("demo", "cpu")
    assert recipe.export[0].dtype == "float16"
    assert recipe.benchmark is not None and recipe.benchmark.batch == (1, 8)


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("prune: {method: sparsegpt}", "got \"sparsegpt\"; did you mean 'obs'?"),
        ("prune: {method: Wanda++}", "did you mean 'regional'?"),
        ("prune: {method: wnada}", "did you mean 'wanda'?"),
        ("prune: {fit: balancd}", "did you mean 'balanced'?"),
        ("export: [{format: semi_structured}]", "did you mean 'semi-structured'?"),
        ("benchmark: {runtimes: [torch, ort]}", "did you mean 'onnxruntime'?"),
        ("export: [{format: sparse24}]", "did you mean 'semi-structured'?"),
        ("export: [{format: onnx, dtype: fp32}]", "did you mean 'float32'?"),
        ("compare: {methods: [Wanda-PP]}", "did you mean 'regional'?"),
        ("compare: {methods: [fast]}", "for example wanda+fast"),
    ],
)
def test_what_may_have_been_meant_is_said(tmp_path, setting: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, f"model: demo\n{setting}\n"))
    assert hint in str(caught.value)


def test_faults_of_reading_are_all_given_with_file_and_line(tmp_path) -> None:
    path = write(tmp_path, "model: &m demo\nprune: !!map {}\ncalibration: *m\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith("3 faults in the recipe\n")
    assert all(f"{path}:{line}: " in message for line in (1, 2, 3))


def test_thousands_of_faults_are_counted_and_a_hundred_printed(tmp_path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "model: demo\n" + "".join(f"key_{i}: 1\n" for i in range(2000))))
    lines = str(caught.value).splitlines()
    assert lines[0] == "2000 faults in the recipe" and lines[-1] == "… and 1900 more" and len(lines) == 102


def test_a_grid_has_an_end(tmp_path) -> None:
    grid = f"{{methods: [{'wanda, ' * 2000}], patterns: [{'unstructured, ' * 2000}]}}"
    with pytest.raises(RecipeError, match="at most 100 items"):
        load_recipe(write(tmp_path, f"model: demo\nevaluate: {{}}\ncompare: {grid}\n"))


def test_an_overridden_value_is_reported_as_that(tmp_path) -> None:
    path = write(tmp_path, "model: demo\nprune:\n  alpha: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ("prune.alpha=x", "calibration.samples=0"))
    assert "--set prune.alpha: prune.alpha: input should be a valid number" in str(caught.value)
    assert "--set calibration.samples: calibration.samples: input should be greater" in str(caught.value)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is no file"):
            find_recipe(str(path))
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UsageError, match="no such file"):
        find_recipe("a\0b")
    with pytest.raises(UsageError, match="no such file"):
        find_recipe("a" * 5000)


@pytest.mark.parametrize(
    "override",
    [
        "prune.alpha",
        "=3",
        "export.5.dtype=float16",
        "model.source.deeper=1",
        "prune=[",
        "a..b=1",
        "prune.alpha=!!int x",
        "prune=&a [*a]",
        "model=\udcff",
        ".".join("a" * 5000) + "=1",
    ],
)
def test_malformed_overrides(tmp_path, override: str) -> None:
    path = write(tmp_path, "model: demo\nexport: [{format: onnx}]\n")
    with pytest.raises(UsageError):
        load_recipe(path, (override,))


def test_find_recipe(tmp_path) -> None:
    assert find_recipe("quickstart").name == "quickstart.yaml"
    assert find_recipe("recipes/ci-smoke.yaml").name == "ci-smoke.yaml"
    with pytest.raises(UsageError, match="shipped recipes are best-quality, ci-smoke"):
        find_recipe("no-such")


def test_schema_describes_every_key() -> None:
    content = schema()
    assert content["additionalProperties"] is False
    assert {"type": "string"} in content["properties"]["model"]["anyOf"]
    json.dumps(content)
    for definition in content["$defs"].values():
        assert all("description" in field for field in definition["properties"].values())


VALID = [
    "model: demo",
    "model: {source: demo, dtype: bfloat16, device: cpu}",
    'model: demo\nprune: {pattern: "16:32", preset: paper, fit: best}',
    "model: demo\nprune: {pattern: unstructured-per-matrix, sparsity: 0.6, alpha: 100, method: gblm}",
    "model: demo\nprune: {preset: null, sparsity: null, ignore: [a, b]}",
    'model: demo\nprune: {overrides: [{layers: a, pattern: dense}, {layers: b, pattern: "1:4"}]}',
    "model: demo\ncalibration: {samples: 2.0, seed: 1}",
    "model: demo\nresources: {memory: 4GiB, offload: true}",
    "model: demo\nexport: []\nevaluate: null\nbenchmark: {batch: [1, 8], runtimes: [torch]}",
    'model: demo\nevaluate: {}\ncompare: {methods: [wanda], patterns: ["2:4", unstructured], seeds: 1}',
]
INVALID = [
    "{}",
    "model: demo\ncalibration: {seed: -1}",
    "model: 3",
    "model: {source: demo, dtype: fp16}",
    "model: demo\nprun: {}",
    "model: demo\nprune: null",
    "model: demo\nprune: {pattern: 124}",
    'model: demo\nprune: {pattern: "2:04"}',
    'model: demo\nprune: {pattern: "٢:٤"}',
    'model: demo\nprune: {pattern: "1:4000000"}',
    "model: demo\nprune: {pattern: dense}",
    'model: demo\nprune: {overrides: [{layers: a, pattern: "x"}]}',
    "model: demo\nprune: {ignore: a}",
    'model: demo\nprune: {alpha: "100"}',
    "model: demo\nprune: {alpha: -1}",
    'model: demo\ncalibration: {sequence_length: "64"}',
    "model: demo\ncalibration: {sequence_length: 64.5}",
    "model: demo\ncalibration: {samples: 0}",
    "model: demo\nresources: {memory: 4}",
    "model: demo\nresources: {memory: 4 bananas}",
    'model: demo\nresources: {offload: "yes"}',
    "model: demo\nexport: {format: onnx}",
    "model: demo\nexport: [{format: tensorrt}]",
    "model: demo\nbenchmark: {batch: 1}",
    f"model: demo\nevaluate: {{}}\ncompare: {{methods: [{'wanda, ' * 101}]}}",
    'model: demo\nevaluate: {}\ncompare: {methods: [wanda], patterns: ["4"]}',
    "model: demo\nevaluate: {}\ncompare: {methods: [wanda, gblm, wanda]}",
    "model: demo\nevaluate: {}\ncompare: {methods: []}",
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
        with pytest.raises(RecipeError):
            load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_hold_the_schema_in_editors_that_read_yaml_1_1(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema())
    assert Recipe.model_validate(content) == load_recipe(path)
