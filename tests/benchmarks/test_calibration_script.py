"""The comparison of calibration texts at toy size."""

import json

from tests.scripts import loaded


def test_it_judges_every_text_pattern_and_seed_once(tmp_path, monkeypatch) -> None:
    result = tmp_path / "result.json"
    options = ["--model", "tiny", "--calibration", "self", "--judges", "demo", "--seeds", "1", "--samples", "2"]
    with loaded("calibration", result, *options) as script:
        script.main()
        found = json.loads(result.read_text())
        keys = [(row["calibration"], row["pattern"], row["seed"], row["samples"]) for row in found["rows"]]
        assert keys == [("self", "unstructured", 0, 2), ("self", "2:4", 0, 2)]
        assert all(row["perplexity"].keys() == found["dense"].keys() == {"demo"} for row in found["rows"])
        monkeypatch.setattr(script.gblm_compress, "prune", None)
        script.main()  # nothing is left to do
    assert json.loads(result.read_text()) == found
