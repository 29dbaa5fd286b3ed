"""The YAML reader: the core schema of YAML 1.2, and everything else refused within its limits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm_compress.errors import RecipeError
from gblm_compress.runs.recipe import read_yaml


def value(text: str | bytes) -> object:
    return read_yaml(text if isinstance(text, bytes) else text.encode(), str).plain()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", "2:4"),  # 124 in YAML 1.1
        ("yes", "yes"),  # true there
        ("010", 10),  # 8 there
        ("2024-01-01", "2024-01-01"),
        ("0o17", 15),
        ("1e2", 100),
        ("2.0", 2),
        ("1e400", float("inf")),
        ("True", True),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ("[1, [a, {b: }]]", (1, ("a", {"b": None}))),
        ("1: x\ntrue: y", {"1": "x", "true": "y"}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        (b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("%YAML 1.2\n---\na: 1\n...\n", {"a": 1}),
    ],
)
def test_values_are_those_of_the_core_schema(text, expected) -> None:
    assert repr(value(text)) == repr(expected)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "1: &a is an anchor"),
        ("[" * 60_000, "nested too deeply"),
        ("x" * 100_000, "more than 65,536 bytes"),
        ("b: *x", "1: not valid YAML: found undefined alias"),
        ("a:\n  b: !!int abc", "1: not valid YAML: invalid literal for int"),
        ("!!binary aGk=", "1: 'binary' is a tag"),
        ("!!python/object/apply:os.system [true]", "is a tag"),
        ("a: 1\nb:\n a: 1\n a: 2", "4: key 'a' appears twice"),
        ("? [a, b]\n: 1", "1: a key is a mapping or a sequence"),
        ("a: " + "9" * 5000, "1: a number of 5,000 characters"),
        ("a: 1" + "0" * 90 + "e9", "1: a number of 93 characters"),
        ("a: [\n\n", "3: not valid YAML: while parsing a flow node, expected the node content"),
        ("a: 1\nb: \0", "2: not valid YAML: unacceptable character #x0000"),
        (b"a: 1\nb: \xff", "2: not valid YAML: 'utf-8' codec can't decode byte 0xff"),
        ('a: "\\Uffffffff"', "1: not valid YAML"),
        ("a: 1\n---\nb: 2", "2: not valid YAML: expected a single document"),
    ],
    ids=lambda text: text[:8],
)
def test_everything_else_is_a_fault_with_its_line(text, fault) -> None:
    with pytest.raises(RecipeError) as caught:
        value(text)
    assert any(fault in found for found in caught.value.faults), caught.value.faults


def test_places_are_those_of_keys_and_items() -> None:
    tree = read_yaml(b"a:\n  b:\n    - 1\n    - c: 2\n", str)
    assert [tree.at(location).where for location in [(), ("a",), ("a", "b"), ("a", "b", 1), ("a", "b", 1, "c")]] == [
        "1", "1", "2", "4", "4",
    ]  # fmt: skip
    assert tree.at(("a", "no", "such")).where == "1" and tree.at(("a", "b", 7)).where == "2"


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text("[]{}&*!|>-?:,#'\"\\%@ \n\t0ae.x~<", max_size=60).map(str.encode)))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        read_yaml(content, str)
    except RecipeError as error:
        assert error.faults
