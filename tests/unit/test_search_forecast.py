"""The loss of a structure by its size and rung."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autocompress.search.forecast import CapacityForecast

shares = st.floats(0.001, 1.0)
seen = st.lists(st.tuples(shares, shares, st.floats(0.0, 1.0), st.integers(1, 4), st.floats(-0.05, 0.9)), max_size=12)


@given(seen)
def test_it_stays_finite_whatever_was_seen(rows: list[tuple[float, float, float, int, float]]) -> None:
    forecast = CapacityForecast()
    for row in rows:
        forecast.add(*row)
    assert np.isfinite(forecast.predict([0.001, 1.0], [1.0, 0.001], [0.0, 1.0], 3)).all()
    for gap in (-0.05, 0.0, 0.3):
        # Longer training is never expected to make a model worse.
        assert forecast.promoted(gap, 0.1) <= max(gap, -0.008) + 1e-9


def test_without_observations_the_prior_speaks() -> None:
    forecast = CapacityForecast()
    whole, half, small = forecast.predict([1.0, 0.5, 0.03], [1.0, 0.5, 0.03], [0.0] * 3, 1)
    assert abs(whole) < 1e-6
    assert 0.0 < half < small < 0.3
    assert forecast.predict([0.03], [0.03], [0.0], 2)[0] < small < forecast.predict([0.03], [0.03], [0.7], 1)[0]


def test_observations_move_it() -> None:
    forecast = CapacityForecast()
    for share in (0.5, 0.2, 0.1, 0.05):
        forecast.add(share, share, 0.0, 1, 0.05)
    near, far = forecast.predict([0.1, 1.0], [0.1, 1.0], [0.0, 0.0], 1)
    assert abs(near - 0.05) < 0.02
    assert far < 0.05


def test_what_longer_training_gains_is_learned() -> None:
    slow, quick = CapacityForecast(), CapacityForecast()
    for share in (0.2, 0.1, 0.05):
        for forecast, second in ((slow, 0.049), (quick, 0.01)):
            forecast.add(share, share, 0.0, 1, 0.05)
            forecast.add(share, share, 0.0, 2, second)
    assert quick.promoted(0.05, 0.1) < slow.promoted(0.05, 0.1) < 0.05
