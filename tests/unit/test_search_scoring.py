"""Intervals, paired drops, ties and the hypervolume of a front, against values worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.plan import CompressionPlan, FrontPoint, Metric
from autocompress.search.scoring import front_hypervolume, interval, paired_drop, split_gap, ties
from tests.fixtures.runs import make_point


def answers(right: int, total: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (total - right))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe (1998), table I, method 3: the score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(right: int, total: int, low: float, high: float) -> None:
    assert interval(answers(right, total)) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_of_fractions_holds_the_mean_and_stays_within_0_and_1(counts: tuple[int, int]) -> None:
    low, high = interval(answers(*counts))
    assert 0.0 <= low <= counts[0] / counts[1] + 1e-12
    assert counts[0] / counts[1] - 1e-12 <= high <= 1.0


def test_the_interval_of_other_scores_is_normal() -> None:
    scores = np.array([0.0, 0.5, 1.5, 2.0])
    half = 1.959964 * scores.std() / 2
    assert interval(scores) == pytest.approx((1.0 - half, 1.0 + half))


def test_a_drop_is_paired() -> None:
    reference, scores = answers(90, 100), answers(88, 100)
    low, high = paired_drop(reference, scores)
    assert (low + high) / 2 == pytest.approx(0.02)
    # Only two answers differ: far narrower than two independent samples would say.
    half = 1.959964 * math.sqrt(0.02 * 0.98 / 99)
    assert high - low == pytest.approx(2 * half)


def test_a_drop_against_oneself_is_none() -> None:
    assert paired_drop(answers(7, 10), answers(7, 10)) == (0.0, 0.0)
    assert paired_drop(answers(1, 1), answers(0, 1)) == (1.0, 1.0)


def test_ties_are_what_the_samples_cannot_tell_apart() -> None:
    rng = np.random.default_rng(0)
    best = (rng.random(1000) < 0.95).astype(float)
    near = np.where(rng.random(1000) < 0.01, 1 - best, best)
    far = np.where(rng.random(1000) < 0.2, 0.0, best)
    found = ties({"best": best, "near": near, "far": far})
    assert found["far"] == ()
    assert found["best"] in ((), ("near",))
    assert ("near" in found["best"]) == ("best" in found["near"])
    assert ties({"a": best, "b": best.copy()}) == {"a": ("b",), "b": ("a",)}


# ------------------------------------------------------------------------------------------------------ hypervolume


def point(name: str, validation: float, latency_ms: float | None, size_bytes: int) -> FrontPoint:
    return make_point(
        name, CompressionPlan(), validation=validation, test=0.9, latency_ms=latency_ms, size_bytes=size_bytes
    )


REFERENCE = point("original", 0.95, 8.0, 32_000)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),
        ([REFERENCE], 0.0),
        ([point("ideal", 0.95, 1.0, 1_000)], 1.0),
        ([point("beyond", 0.97, 0.5, 500)], 1.0),
        # Half the drop of the box, 2x of 8x (a third), 4x of 32x (two fifths).
        ([point("middle", 0.90, 4.0, 8_000)], 0.5 * (1 / 3) * (2 / 5)),
        ([point("useless", 0.85, 1.0, 1_000)], 0.0),
        ([point("slower", 0.95, 16.0, 1_000)], 0.0),
        ([point("a", 0.95, 4.0, 1_000), point("b", 0.95, 1.0, 16_000)], 1 / 3 + 1 / 5 - 1 / 15),
        ([point("unmeasured", 0.95, None, 1_000)], 0.0),
    ],
)
def test_hypervolume_of_a_front(points: list[FrontPoint], expected: float) -> None:
    assert front_hypervolume(Metric(), REFERENCE, points) == pytest.approx(expected)


def test_a_metric_that_is_no_fraction_counts_in_its_own_unit() -> None:
    metric = Metric(name="error", unit="m", higher_is_better=False)
    worse = point("p", 5.95, 1.0, 1_000)
    assert front_hypervolume(metric, REFERENCE, [worse]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (("error",), 0.5),
        (("latency_ms",), 1 / 3),
        (("size_bytes",), 2 / 5),
        (("latency_ms", "size_bytes"), 1 / 3 * 2 / 5),
        (("error", "latency_ms", "size_bytes", "macs"), 0.5 * 1 / 3 * 2 / 5 * 2 / 3),
        (("latency_ms", "peak_memory_bytes", "energy_mj", "macs"), 1 / 3 * 1 / 5 * 1.0 * 2 / 3),
    ],
)
def test_the_hypervolume_is_over_the_objectives(objectives: tuple[str, ...], expected: float) -> None:
    """Half the drop of the box, 2x of 8x faster, 4x of 32x smaller, 4x fewer MACs, 2x less memory, 8x less energy."""
    reference = REFERENCE.model_copy(update={"macs": 400, "peak_memory_bytes": 1000, "energy_mj": 8.0})
    middle = point("middle", 0.90, 4.0, 8_000)
    middle = middle.model_copy(update={"macs": 100, "peak_memory_bytes": 500, "energy_mj": 1.0})
    assert front_hypervolume(Metric(), reference, [middle], objectives) == pytest.approx(expected)
    unknown = middle.model_copy(update={"peak_memory_bytes": None, "macs": 0})
    wanted = expected if not {"macs", "peak_memory_bytes"} & set(objectives) else 0.0
    assert front_hypervolume(Metric(), reference, [unknown], objectives) == pytest.approx(wanted)


# -------------------------------------------------------------------------------------------- validation against test


def test_the_gap_between_the_splits_is_what_the_scores_say() -> None:
    gap = split_gap([answers(95, 100), answers(90, 100)], [answers(180, 200), answers(184, 200)])
    assert gap is not None
    assert gap.mean == pytest.approx((0.05 - 0.02) / 2)
    assert gap.largest == pytest.approx(0.05)
    assert split_gap([], []) is None


def test_what_chance_gives_covers_samples_of_one_population_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    within = np.zeros(2)
    rounds = 300
    for _ in range(rounds):
        # Five points that answer alike, as points of one front do.
        hard = rng.random(1000)
        scores = [(hard + 0.1 * rng.random(1000) < 0.9).astype(float) for _ in range(5)]
        gap = split_gap([s[:400] for s in scores], [s[400:] for s in scores])
        assert gap is not None
        within += [
            gap.mean_by_chance[0] <= gap.mean <= gap.mean_by_chance[1],
            gap.largest_by_chance[0] <= gap.largest <= gap.largest_by_chance[1],
        ]
    assert (within / rounds > 0.91).all()
    assert (within / rounds < 0.99).all()


def test_one_point_without_a_wrong_answer_has_no_gap() -> None:
    gap = split_gap([answers(10, 10)], [answers(20, 20)])
    assert gap is not None
    assert (gap.mean, gap.largest, gap.mean_by_chance) == (0.0, 0.0, (0.0, 0.0))
