import pytest

from gblm_compress.errors import DataError, ModelError, UsageError
from gblm_compress.faults import collect, raise_all


def failing(error: Exception):
    def look() -> None:
        raise error

    return look


def test_no_fault_is_no_error() -> None:
    raise_all(collect([lambda: None]))


def test_one_fault_is_raised_as_it_is() -> None:
    fault = ModelError("gone")
    with pytest.raises(ModelError) as found:
        raise_all(collect([failing(fault)]))
    assert found.value is fault


def test_the_same_fault_found_twice_counts_once() -> None:
    with pytest.raises(ModelError, match=r"^gone$"):
        raise_all(collect([failing(ModelError("gone")), failing(ModelError("gone"))]))


@pytest.mark.parametrize(("second", "kind"), [(ModelError("b"), ModelError), (DataError("b"), UsageError)])
def test_several_are_listed_in_one_error(second, kind) -> None:
    with pytest.raises(kind) as found:
        raise_all(collect([failing(ModelError("a")), failing(second)]))
    assert type(found.value) is kind and str(found.value) == "2 faults\na\nb"


def test_what_is_no_fault_of_the_user_is_not_collected() -> None:
    with pytest.raises(KeyError):
        collect([failing(KeyError("bug"))])
