"""Dominance and hypervolume against definitions and cases worked out by hand."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autocompress.pareto import distinct_mask, dominates, hypervolume, pareto_mask

grids = st.integers(1, 4).flatmap(
    lambda d: st.integers(0, 7).flatmap(lambda n: arrays(np.float64, (n, d), elements=st.integers(0, 4).map(float)))
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 1), (2, 2), True),
        ((1, 2), (1, 3), True),
        ((1, 2), (1, 2), False),
        ((1, 3), (2, 2), False),
    ],
)
def test_dominance_is_strict(a: tuple[float, ...], b: tuple[float, ...], expected: bool) -> None:
    assert dominates(a, b) is expected


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="argument"):
        dominates([1, 2], [1])


@given(grids)
def test_mask_is_the_definition(values: np.ndarray) -> None:
    expected = [not any(dominates(other, row) for other in values) for row in values]
    assert pareto_mask(values).tolist() == expected


def test_a_row_with_nan_is_off_the_front() -> None:
    assert pareto_mask([[0.0, np.nan], [1.0, 1.0]]).tolist() == [False, True]


@given(grids)
def test_hypervolume_counts_cells(values: np.ndarray) -> None:
    """On an integer grid the volume is the number of unit cells that some point dominates."""
    dimensions = values.shape[1]
    cells = itertools.product(range(4), repeat=dimensions)
    expected = sum(any((row <= np.array(cell)).all() for row in values) for cell in cells)
    assert hypervolume(values, [4.0] * dimensions) == pytest.approx(expected)


def test_hypervolume_ignores_what_lies_outside() -> None:
    assert hypervolume([[0.5, 2.0], [0.5, 0.5]], [1.0, 1.0]) == pytest.approx(0.25)
    assert hypervolume([], [1.0, 1.0]) == 0.0


def test_five_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4"):
        hypervolume(np.zeros((1, 5)), np.ones(5))


def test_ten_thousand_points_are_quick() -> None:
    values = np.random.default_rng(0).random((10_000, 4))
    started = time.process_time()
    assert 50 < pareto_mask(values).sum() < 1000
    assert 0.9 < hypervolume(values, np.ones(4)) < 1.0
    assert time.process_time() - started < 3.0


def test_close_points_count_as_one_and_the_first_stays() -> None:
    values = [[1.0, 100.0], [1.01, 101.0], [1.01, 110.0], [0.5, 100.0]]
    assert distinct_mask(values).tolist() == [True, False, True, True]
