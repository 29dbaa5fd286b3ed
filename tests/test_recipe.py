import json
from pathlib import Path

import pytest
import yaml

from gblm_compress.errors import RecipeError, UsageError
from gblm_compress.recipe import SHIPPED, find_recipe, load_recipe, schema
from gblm_compress.settings import Recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_opens_with_its_command(path: Path) -> None:
    load_recipe(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# gblm-compress run recipes/{path.name}"


def test_the_three_recipes_ship() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} >= {
        "quickstart",
        "llama-2-7b-gblm-2to4",
        "ci-smoke",
    }


def test_the_papers_settings() -> None:
    recipe = load_recipe(find_recipe("llama-2-7b-gblm-2to4"))
    assert (recipe.calibration.samples, recipe.calibration.sequence_length) == (128, 2048)
    assert (recipe.prune.method, recipe.prune.pattern, recipe.prune.alpha) == ("gblm", "2:4", 100)


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
        f"{path}:6: export.0.format: input should be 'onnx', 'bitmask' or 'semi-structured', got \"onx\"",
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
        ("", "a recipe is a mapping"),
        ("- model: demo", "a recipe is a mapping"),
        ("model: [", "not valid YAML"),
        ("model: demo\nmodel: tiny", "key 'model' appears twice"),
        ("prune: {}", "model: missing; it is required"),
        ("model: demo\ngates: {max_perplexity_increase: 0.1}", "needs an 'evaluate' section"),
        ("model: demo\ngates: {min_decode_speedup: 1.3}", "needs a 'benchmark' section"),
        ("model: demo\nprune: {pattern: 2:4, sparsity: 0.6}", "contradicts pattern 2:4"),
        ("model: demo\nprune: {sparsity: .nan}", "prune.sparsity"),
        ("model: demo\nexport: [{format: onnx}, {format: onnx}]", "listed twice"),
        ("model: demo\nexport: [{format: onnx, dtype: bfloat16}]", "bfloat16 cannot be exported to ONNX"),
        ("model: demo\nexport: [{format: onnx, dtype: float16, kernels: true}]", "kernels runs in float32"),
        (
            "model: demo\nexport: [{format: onnx}]\nbenchmark: {}\ngates: {min_decode_speedup: 1.3, artefact: bitmask}",
            "gates.artefact 'bitmask' is none of what the recipe makes: pruned, onnx",
        ),
        ("model: demo\nbenchmark: {}\ngates: {min_decode_speedup: 0.9}", "say of which artefact"),
        ("model: demo\ngates: {artefact: pruned}", "gates.artefact would do nothing"),
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
    "override", ["prune.alpha", "=3", "export.5.dtype=float16", "model.source.deeper=1", "prune=["]
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


def test_recipes_survive_a_round_trip() -> None:
    recipe = load_recipe(find_recipe("quickstart"))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
