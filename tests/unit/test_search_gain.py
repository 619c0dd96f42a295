"""Expected gains: exact hypervolume where the drop is known, an average where it is not, greedy batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.pareto import hypervolume
from autocompress.search.gain import GainTable, greedy

unit = st.floats(0.0, 1.2).map(lambda x: round(x, 3))


def points(axes: int, least: int, most: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.tuples(*[unit] * (1 + axes)), min_size=least, max_size=most).map(np.array)


def added(present: np.ndarray, candidate: np.ndarray) -> float:
    corner = [1.0] * len(candidate)
    return hypervolume(np.vstack([present, candidate]), corner) - hypervolume(present, corner)


@settings(deadline=None)
@given(st.integers(1, 3).flatmap(lambda axes: st.tuples(points(axes, 1, 12), points(axes, 1, 6))))
def test_gains_are_the_hypervolume_added(given_: tuple[np.ndarray, np.ndarray]) -> None:
    present, candidates = given_
    found = GainTable(present).gains(candidates[:, :1], candidates[:, 1:])
    assert found == pytest.approx([added(present, c) for c in candidates], abs=1e-9)


def test_a_large_front_is_reckoned_nearly() -> None:
    rng = np.random.default_rng(0)
    present = rng.dirichlet([1.0, 1.0, 1.0], size=150) ** 0.7
    candidates = rng.random((200, 3)) * 0.8
    found = GainTable(present).gains(candidates[:, :1], candidates[:, 1:])
    true = np.array([added(present, c) for c in candidates])
    assert np.abs(found - true).max() < 0.004
    assert np.corrcoef(found, true)[0, 1] > 0.99


def test_a_drop_that_is_not_known_counts_with_all_it_may_be() -> None:
    present = np.array([[0.5, 0.5]])
    drops = np.array([[0.4, 0.45, 0.9]])
    expected = np.mean([added(present, np.array([drop, 0.5])) for drop in drops[0]])
    assert GainTable(present).gains(drops, np.array([[0.5]])) == pytest.approx([expected])


def test_a_batch_spreads_out() -> None:
    """Two candidates that promise much of the same count once."""
    drops = np.array([[0.2], [0.21], [0.6]])
    costs = np.array([[0.5], [0.5], [0.2]])
    assert greedy(np.ones((1, 2)), drops, costs, 2) == [0, 2]
    # What is left of the second is nothing: the first beats it.
    assert greedy(np.ones((1, 2)), drops, costs, 3) == [0, 2]


def test_a_batch_is_the_one_that_reckoning_everything_again_gives() -> None:
    rng = np.random.default_rng(1)
    present = rng.random((20, 3))
    drops, costs = np.sort(rng.random((1500, 3)), axis=1), rng.random((1500, 2))
    points, expected = present, []
    for _ in range(6):
        gains = np.round(GainTable(points).gains(drops, costs), 7)
        gains[expected] = 0.0
        expected.append(int(gains.argmax()))
        points = np.vstack([points, [drops[expected[-1], 1], *costs[expected[-1]]]])
    assert greedy(present, drops, costs, 6) == expected


def test_candidates_that_are_beaten_are_not_chosen() -> None:
    assert greedy(np.array([[0.1, 0.1]]), np.array([[0.5]]), np.array([[0.5]]), 4) == []
    assert greedy(np.array([[0.1, 0.1]]), np.zeros((0, 1)), np.zeros((0, 1)), 4) == []
