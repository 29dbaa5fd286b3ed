"""The dtype of products: what the machine is faster at, unless it is given."""

import pytest
import torch

from gblm_compress.calibration import products
from gblm_compress.calibration.ranks import Ranks
from gblm_compress.errors import UsageError
from gblm_compress.settings import PruneSettings, RecoverSettings
from gblm_compress.storage.paths import CACHE_VARIABLE


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_the_faster_dtype_is_that_of_the_faster_product(faster, monkeypatch) -> None:
    seconds = {torch.bfloat16: 3.0, torch.float32: 3.0} | {getattr(torch, faster): 2.0}
    times = lambda product, number, repeat: [0.0] + [seconds[product().dtype]] * (repeat - 1)  # noqa: E731
    monkeypatch.setattr(products.timeit, "repeat", times)
    assert products.measured_dtype() == faster


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
@pytest.mark.parametrize("settings", [PruneSettings(), RecoverSettings()])
def test_auto_becomes_the_faster_dtype_and_what_is_given_stays(settings, faster, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(products, "measured_dtype", lambda: faster)
    assert products.with_fit_dtype(settings, "cpu", Ranks()).fit_dtype == faster
    given = settings.model_copy(update={"fit_dtype": "float32"})
    assert products.with_fit_dtype(given, "cpu", Ranks()) is given


def test_fits_compute_in_no_float16() -> None:
    settings = PruneSettings(fit_dtype="float32")
    assert products.dtype_for_fits("float16", settings, asked=False) == "float32"
    assert products.dtype_for_fits("bfloat16", settings, asked=True) == "bfloat16"
    assert products.dtype_for_fits("float16", PruneSettings(fit_dtype="bfloat16"), asked=True) == "float16"
    with pytest.raises(UsageError, match="give fit_dtype bfloat16, fit fast, or compute in float32 or bfloat16"):
        products.dtype_for_fits("float16", settings, asked=True)


@pytest.mark.parametrize("has", [True, False])
def test_gpus_take_bfloat16_where_they_have_it(has: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert products.faster_dtype("cuda:0", Ranks()) == ("bfloat16" if has else "float32")
