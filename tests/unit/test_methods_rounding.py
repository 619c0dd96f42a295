"""Integer grids and least squares on second moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.methods import linear
from autocompress.methods.linear import NestedRefits, damped, damped_inverse, inverse_factor, refit
from autocompress.methods.rounding import integer_range, round_to_nearest, round_with_compensation, row_scales, snap


def make(rows: int = 6, columns: int = 20, samples: int = 400, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Weights, a bias, correlated inputs and their second moments with the constant input last."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(samples, columns, generator=generator) @ mixing + 0.5
    whole = torch.cat([inputs, torch.ones(samples, 1)], dim=1)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.randn(rows, generator=generator), inputs, whole.t() @ whole / samples


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([4, 8]), scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_rounded_weights_lie_on_the_grid(bits: int, scale: float, seed: int) -> None:
    weight = scale * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    scales = row_scales(weight, bits)
    rounded = round_to_nearest(weight, scales, bits)
    integers = rounded / scales[:, None]
    low, high = integer_range(bits)
    assert float((integers - integers.round()).abs().max()) < 1e-3
    assert low - 1e-3 <= float(integers.min())
    assert float(integers.max()) <= high + 1e-3
    if bits == 8:
        assert bool(((rounded - weight).abs() <= 0.5001 * scales[:, None]).all())
        assert bool((rounded.abs().amax(1) >= 0.999 * weight.abs().amax(1)).all())
    assert torch.equal(snap(rounded, scales), rounded)
    assert torch.equal(snap(snap(weight, scales), scales), snap(weight, scales))
    torch.testing.assert_close(round_to_nearest(rounded, scales, bits), rounded)


def test_ranges_of_integers() -> None:
    assert [integer_range(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-127, 127)]


def test_clipped_scales_beat_the_largest_value_below_eight_bits() -> None:
    weight = torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    naive = weight.abs().amax(1) / 7
    chosen = row_scales(weight, 4)
    assert bool((chosen <= naive + 1e-9).all())
    error = (round_to_nearest(weight, chosen, 4) - weight).square().sum()
    assert error < (round_to_nearest(weight, naive, 4) - weight).square().sum()
    assert bool((row_scales(torch.zeros(2, 3), 4) > 0).all())


@pytest.mark.parametrize("columns", [20, 300])
def test_compensation_beats_rounding_to_nearest(columns: int) -> None:
    weight, bias, inputs, hessian = make(columns=columns, samples=2 * columns)
    scales = row_scales(weight, 4)
    nearest = round_to_nearest(weight, scales, 4)
    rounded, shifted = round_with_compensation(weight, bias, hessian, scales, 4)
    wanted = inputs @ weight.t() + bias
    error = (inputs @ rounded.t() + shifted - wanted).square().mean()
    assert error < 0.5 * (inputs @ nearest.t() + bias - wanted).square().mean()
    torch.testing.assert_close(round_to_nearest(rounded, scales, 4), rounded)
    assert rounded.is_contiguous()


def test_a_weight_on_the_grid_is_left_as_it_is() -> None:
    weight, bias, _, hessian = make()
    scales = row_scales(weight, 4)
    weight = round_to_nearest(weight, scales, 4)
    rounded, shifted = round_with_compensation(weight, bias, hessian, scales, 4)
    torch.testing.assert_close(rounded, weight)
    torch.testing.assert_close(shifted, bias)


def test_factors_and_inverses(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = make()[3]
    for limit in (1024, 4):  # in double precision, and in single
        monkeypatch.setattr(linear, "DOUBLE_UP_TO", limit)
        matrix = damped(hessian)
        assert matrix.dtype == (torch.float64 if limit > 21 else torch.float32)
        assert torch.equal(hessian, make()[3])
        tolerance = {"rtol": 0.0, "atol": 1e-8 if limit > 21 else 2e-3}
        identity = torch.eye(21, dtype=matrix.dtype)
        torch.testing.assert_close(damped_inverse(hessian) @ matrix, identity, **tolerance)
        upper = inverse_factor(hessian)
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(upper.t() @ upper @ matrix, identity, **tolerance)


def test_refit_is_exact_when_what_leaves_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, inputs, _ = make()
    inputs[:, 3] = 2.0 * inputs[:, 0] - inputs[:, 1] + 4.0
    whole = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    hessian = whole.t() @ whole / len(inputs)
    kept = torch.tensor([c for c in range(21) if c != 3])
    full = torch.cat([weight, bias[:, None]], dim=1)
    wanted = whole @ full.t()
    dropped = (whole[:, kept] @ full[:, kept].t() - wanted).square().mean()
    ridge = (whole[:, kept] @ refit(full, hessian, kept).float().t() - wanted).square().mean()
    assert ridge < 0.01 * dropped
    monkeypatch.setattr(linear, "DAMPING", 1e-9)
    exact = refit(full, hessian, kept).float()
    torch.testing.assert_close(whole[:, kept] @ exact.t(), wanted, rtol=1e-3, atol=1e-3)


def test_nested_refits_are_refits() -> None:
    weight, bias, _, hessian = make()
    full = torch.cat([weight, bias[:, None]], dim=1)
    order = torch.cat([torch.tensor([20]), torch.randperm(20, generator=torch.Generator().manual_seed(2))])
    nested = NestedRefits(full, hessian, order)
    torch.testing.assert_close(nested.first(21).float(), full, rtol=1e-4, atol=1e-4)
    for count in (2, 9, 20):
        kept = order[:count].sort().values
        torch.testing.assert_close(nested.first(count), refit(full, hessian, kept))
