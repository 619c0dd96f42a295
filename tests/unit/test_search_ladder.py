"""Which structure to recover next: the forecast and the gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.search.ladder import NEAR, RecoveryForecast, box, gains_of

# --------------------------------------------------------------------------------------------------------- forecast

observations = st.lists(st.tuples(st.floats(1e-4, 5.0), st.floats(-0.05, 0.9)), max_size=12)


@given(observations)
def test_more_divergence_never_promises_less_loss(seen: list[tuple[float, float]]) -> None:
    forecast = RecoveryForecast()
    for divergence, gap in seen:
        forecast.add(divergence, gap)
    predicted = forecast.predict(np.geomspace(1e-5, 10, 40))
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()
    assert (np.diff(predicted) >= -1e-15).all()


def test_without_observations_the_prior_speaks() -> None:
    assert RecoveryForecast().predict(np.array([0.1]))[0] == pytest.approx(0.02)


def test_observations_outweigh_the_prior() -> None:
    forecast = RecoveryForecast()
    for divergence in (0.01, 0.03, 0.1, 0.3, 1.0, 2.0):
        forecast.add(divergence, 0.2 * divergence**0.8)
    assert forecast.predict(np.array([0.2]))[0] == pytest.approx(0.2 * 0.2**0.8, rel=0.25)


def test_a_gain_in_quality_is_an_observation_too() -> None:
    better, worse = RecoveryForecast(), RecoveryForecast()
    better.add(0.1, -0.01)
    worse.add(0.1, 0.05)
    at = np.array([0.1])
    assert better.predict(at)[0] < RecoveryForecast().predict(at)[0] < worse.predict(at)[0]


# ------------------------------------------------------------------------------------------------------------- gains


def test_the_box_of_the_original_and_of_the_best() -> None:
    original = {"latency_ms": 1.0, "size_bytes": 1e6}
    assert box(0.0, original, original, 10.0) == [0.0, 1.0, 1.0]
    best = {"latency_ms": 1 / 8, "size_bytes": 1e6 / 32}
    assert box(0.05, best, original, 10.0) == pytest.approx([0.5, 1 - NEAR, 1 - NEAR])
    assert box(0.05, {"energy_mj": 0.5}, {"energy_mj": 1.0}, 10.0) == pytest.approx([0.5, 1 - NEAR / 3])
    # Better than the original, or further than anyone asks: no more is gained by it.
    assert box(-0.01, {"latency_ms": 1 / 64, "size_bytes": 0.1}, original, 10.0) == [0.0, 0.0, 0.0]
    slower = box(0.0, {"latency_ms": 2.0, "size_bytes": 1e6}, original, 10.0)
    assert slower[1] > 1.0


def test_a_gain_is_what_the_front_lacks() -> None:
    present = [[0.1, 0.5, 0.5]]
    candidates = [[0.2, 0.6, 0.6], [0.1, 0.4, 0.5], [0.1, 0.5, 0.2], [0.0, 1.2, 0.0]]
    assert gains_of(present, candidates) == pytest.approx([0.0, 0.9 * 0.1 * 0.5, 0.9 * 0.5 * 0.3, 0.0])
    assert gains_of([], candidates)[2] == pytest.approx(0.9 * 0.5 * 0.8)
    assert gains_of(present, []) == []
