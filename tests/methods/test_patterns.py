"""Masks against a slow oracle that sorts each group in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import UsageError
from gblm_compress.methods.patterns import Pattern, keep_largest


def slow_keep(score: list[float], magnitude: list[float], keep: int) -> list[bool]:
    order = sorted(range(len(score)), key=lambda i: (-score[i], -magnitude[i], i))
    return [i in order[:keep] for i in range(len(score))]


@st.composite
def groups(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, size = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    # Few distinct values, so that ties of the score and of the magnitude are common.
    few = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    score = torch.tensor(draw(st.lists(few, min_size=rows * size, max_size=rows * size))).reshape(rows, size)
    magnitude = torch.tensor(draw(st.lists(few, min_size=rows * size, max_size=rows * size))).reshape(rows, size)
    return score, magnitude, draw(st.integers(1, size))


@given(groups())
@settings(max_examples=200, deadline=None)
def test_keep_largest_is_the_sorted_choice(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    score, magnitude, keep = case
    expected = [slow_keep(s, m, keep) for s, m in zip(score.tolist(), magnitude.tolist(), strict=True)]
    assert keep_largest(score, magnitude, keep).tolist() == expected


@given(
    st.integers(0, 2**31),
    st.sampled_from(["1:2", "2:4", "4:8", "1:4", "3:4", "unstructured", "unstructured-per-matrix"]),
)
@settings(max_examples=60, deadline=None)
def test_mask_obeys_its_pattern(seed: int, name: str) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    pattern = Pattern(name)
    sparsity = pattern.sparsity(None)
    mask = pattern.mask(weight.abs(), weight, sparsity)
    assert pattern.first_violation(weight * mask) is None
    assert mask.sum() == round(weight.numel() * (1 - sparsity))
    if name == "unstructured":
        assert mask.sum(1).unique().tolist() == [8]


@pytest.mark.parametrize(
    ("pattern", "kept"), [("2:4", [[0, 0, 1, 1], [1, 1, 0, 0]]), ("unstructured-per-matrix", [[0] * 4, [1] * 4])]
)
def test_groups_run_along_the_input_dimension_unless_rows_compete(pattern: str, kept) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
    assert Pattern(pattern).mask(weight, weight, 0.5).int().tolist() == kept


@pytest.mark.parametrize(
    ("name", "sparsity", "message"),
    [(name, None, f"pattern {name!r} is not known") for name in ("4:2", "0:4", "2:2", "2-4", "", "half", "2:4:8")]
    + [("unstructured", sparsity, "between 0 and 1") for sparsity in (0.0, 1.0, -0.1, 1.5)]
    + [("2:4", 0.6, "contradicts")],
)
def test_unknown_patterns_and_impossible_sparsities_are_refused(name, sparsity, message) -> None:
    assert Pattern("1:4").sparsity(0.75) == 0.75
    with pytest.raises(UsageError, match=message):
        Pattern(name).sparsity(sparsity)


def test_violation_names_the_place() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1.0
    assert Pattern("2:4").first_violation(weight) == "row 1, columns 4 to 7: 3 nonzeros, at most 2 allowed"
    assert Pattern("3:4").first_violation(weight) is None
    assert Pattern("2:16").first_violation(weight) == "in_features=8 is not a multiple of 16"
