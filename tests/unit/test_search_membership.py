"""Which candidates make up a front of one objective and of several, and that a published front only improves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autocompress.pareto import hypervolume, pareto_mask
from autocompress.search.membership import ALIKE, apart_mask, front_mask


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_of_one_cost_the_best_stays_with_those_as_good_that_are_more_accurate() -> None:
    latency = column(0.500, 0.495, 0.505, 0.490, 0.700)
    errors = [0.03, 0.05, 0.02, 0.06, 0.00]
    # 0.505 is over 2% slower than the best; 0.495 and 0.500 are not.
    assert front_mask(latency, errors).tolist() == [False, True, False, True, False]
    assert front_mask(column(0.499, 0.495, 0.490), [0.03, 0.05, 0.06]).tolist() == [True, True, True]
    assert front_mask(column(0.499, 0.495, 0.490), [0.06, 0.05, 0.06]).tolist() == [False, True, True]


def test_of_the_error_alone_one_point_stays() -> None:
    errors = [0.01, 0.01, 0.0101, 0.2]
    assert front_mask(column(*errors), errors).tolist() == [True, False, False, False]


@given(st.integers(2, 4).flatmap(lambda d: arrays(np.float64, (6, d), elements=st.floats(0.0, 1.0))))
def test_of_several_objectives_what_is_not_dominated_stays(values: np.ndarray) -> None:
    assert front_mask(values, [0.0] * 6).tolist() == pareto_mask(values).tolist()


def test_no_candidates_no_front() -> None:
    for objectives in (1, 3):
        empty = np.zeros((0, objectives))
        assert front_mask(empty, []).tolist() == apart_mask(empty, [], []).tolist() == []


def test_of_points_alike_one_that_stands_stays() -> None:
    values = np.array([[0.100, 1.00], [0.1005, 0.995]])
    assert apart_mask(values, [0.1, 0.1005], [False, False]).tolist() == [True, False]
    assert apart_mask(values, [0.1, 0.1005], [False, True]).tolist() == [False, True]
    assert apart_mask(column(0.5, 0.505), [0.01, 0.02], [False, False]).tolist() == [True, True]
    assert apart_mask(column(0.5, 0.505), [0.0200, 0.0201], [False, False]).tolist() == [True, False]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@given(data=st.data())
def test_a_front_that_is_given_more_candidates_never_gets_worse(objectives: int, data: st.DataObject) -> None:
    """Published in any number of steps, every point stays or one takes its place that is no worse by over 2%."""
    whole = data.draw(arrays(np.float64, (12, objectives), elements=st.floats(0.50, 0.55)))
    errors = data.draw(arrays(np.float64, (12,), elements=st.floats(0.01, 0.011)))
    standing: set[int] = set()
    before = np.zeros((0, objectives))
    for count in (3, 6, 9, 12):
        order = sorted(range(count), key=lambda i: errors[i])
        values, own = whole[order], errors[order]
        kept = [i for i, good in enumerate(front_mask(values, own)) if good]
        apart = apart_mask(values[kept], own[kept], [order[i] in standing for i in kept])
        standing = {order[i] for i, alone in zip(kept, apart, strict=True) if alone}
        volume = hypervolume(whole[sorted(standing)], np.ones(objectives))
        assert volume >= hypervolume(before / (1.0 - ALIKE), np.ones(objectives)) - 1e-12
        before = whole[sorted(standing)]
