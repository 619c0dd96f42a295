"""Range methods on samples whose best range is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.methods.calibration import entropy, least_squares, minmax, percentile, range_method
from autocompress.methods.quantization import affine_parameters
from autocompress.methods.registry import RANGE_METHODS


def squared_error(sample: torch.Tensor, ends: tuple[float, float], bits: int = 8) -> float:
    scale, zero = affine_parameters(*ends, bits)
    rounded = ((sample / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    return float((rounded - sample).square().mean())


def normal(count: int = 20000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_minmax_covers_what_was_seen_and_zero() -> None:
    assert minmax(torch.tensor([-1.5, 0.25, 4.0])) == (-1.5, 4.0)
    assert minmax(torch.tensor([2.0, 3.0])) == (0.0, 3.0)
    assert minmax(torch.tensor([-3.0, -2.0])) == (-3.0, 0.0)


def test_percentile_leaves_out_the_rarest_share_at_each_end() -> None:
    sample = torch.arange(-1000.0, 1001.0)
    assert percentile(sample, percent=99.0) == pytest.approx((-980.0, 980.0))
    assert percentile(sample, percent=100.0) == (-1000.0, 1000.0)
    mostly_zero = torch.cat([torch.zeros(100_000), torch.tensor([5.0])])
    assert percentile(mostly_zero) == (0.0, 5.0)


@pytest.mark.parametrize("method", [percentile, least_squares, entropy])
def test_one_outlier_does_not_cost_all_others_their_precision(method) -> None:  # type: ignore[no-untyped-def]
    sample = torch.cat([normal(), torch.tensor([40.0])])
    inner = sample[:-1]
    low, high = method(sample, 4)
    assert high < 20.0
    assert low <= -2.0
    assert squared_error(inner, (low, high), 4) < 0.5 * squared_error(inner, minmax(sample), 4)


def test_least_squares_is_never_worse_than_minmax() -> None:
    for sample in (normal(), normal().relu(), normal().pow(3), torch.rand(5000) - 0.3):
        for bits in (8, 4):
            assert squared_error(sample, least_squares(sample, bits), bits) <= squared_error(
                sample, minmax(sample), bits
            )


def test_least_squares_puts_a_frequent_value_on_an_integer() -> None:
    spread = torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 4 - 1
    sample = torch.cat([torch.full((9000,), -0.3417), spread])
    assert squared_error(sample, least_squares(sample)) < 0.5 * squared_error(sample, minmax(sample))


def test_entropy_keeps_a_distribution_without_a_tail() -> None:
    flat = torch.rand(60000, generator=torch.Generator().manual_seed(0))
    low, high = entropy(flat)
    assert low == 0.0
    assert high > 0.95
    spiked = torch.cat([torch.full((5000,), 0.3), flat[:5000]])
    assert entropy(spiked)[1] > 0.9  # a cut through the spike would hide half the values in one integer


@pytest.mark.parametrize("name", RANGE_METHODS)
def test_constant_activations_have_a_usable_range(name: str) -> None:
    method = range_method(name)
    assert method(torch.zeros(100), 8) == (0.0, 1e-6)
    low, high = method(torch.full((100,), 2.0), 8)
    assert low == 0.0
    assert squared_error(torch.full((100,), 2.0), (low, high)) < 1e-3


@pytest.mark.parametrize("name", RANGE_METHODS)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60))
def test_a_range_is_that_of_what_was_seen_at_most_and_holds_zero(name: str, values: list[float]) -> None:
    sample = torch.tensor(values)
    low, high = range_method(name)(sample, 8)
    assert low <= 0.0 <= high
    assert low < high
    if float(sample.abs().max()) > 1e-6:
        bottom, top = minmax(sample)
        edge = 1e-5 * (top - bottom)
        assert bottom - edge <= low
        assert high <= top + edge


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown range method 'msee'; nearest: 'mse'.*entropy, minmax, mse, percent"):
        range_method("msee")
