"""The figures of the search benchmark: what stood when, and which rival is the one to beat."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest

from benchmarks import search, search_page
from benchmarks.ablations import ABLATIONS
from benchmarks.search_curves import Scored, volume


def curve(method: str, volumes: dict[float, float], seed: int = 0, steps: int | None = None) -> pd.DataFrame:
    rows = [
        {"seconds": t, "hypervolume": v, "validation_hypervolume": v, "points": 3} for t, v in sorted(volumes.items())
    ]
    facts = {"model": "net", "method": method, "steps": steps, "seed": seed, "budget": 600.0, "trials": 7}
    return pd.DataFrame(rows).assign(delivered=4, machine="a machine", date="2026-01-01", commit="abc1234", **facts)


def test_what_stood_at_a_time_is_the_last_front_before_it() -> None:
    rows = curve("ours", {20.0: 0.2, 100.0: 0.5})
    assert [search_page.at(rows, t) for t in (10.0, 20.0, 99.0, 600.0)] == [0.0, 0.2, 0.2, 0.5]


def test_a_volume_is_reached_when_no_later_front_falls_below_it() -> None:
    rows = curve("ours", {20.0: 0.2, 50.0: 0.6, 60.0: 0.4, 90.0: 0.7})
    assert search_page.reached(rows, 0.5) == 90.0
    assert search_page.reached(rows, 0.2) == 20.0
    assert math.isinf(search_page.reached(rows, 0.8))


def test_the_mean_counts_each_front_for_as_long_as_it_stood() -> None:
    rows = curve("without-seeds", {20.0: 0.2, 50.0: 0.6, 110.0: 0.9})
    assert search_page.mean(rows, 100.0) == pytest.approx(0.3 * 0.2 + 0.5 * 0.6)


def test_what_a_part_adds_is_told_over_the_seeds_that_both_have() -> None:
    known = pd.concat(
        [
            curve("without-nothing", {50.0: 0.5, 290.0: 0.9}, 0), curve("without-nothing", {50.0: 0.7, 290.0: 0.9}, 1),
            curve("without-seeds", {50.0: 0.4, 290.0: 0.95}, 0), curve("without-ladder", {50.0: 0.1}, 2),
        ]
    ).assign(budget=300.0)  # fmt: skip
    assert search_page._bought(known) == [
        "- The seeds added +0.100 at 60 s, +0.100 at 150 s, +0.100 at 180 s, -0.050 at 300 s (seeds: 1)."
    ]


def test_the_best_rival_is_the_best_mean_over_its_seeds_and_its_best_length() -> None:
    known = pd.concat(
        [
            curve("ours", {10.0: 0.9}),
            curve("tpe", {10.0: 0.6}, 0, 60), curve("tpe", {10.0: 0.4}, 1, 60),
            curve("nsga2", {10.0: 0.45}, 0, 0), curve("nsga2", {10.0: 0.55}, 0, 300),
        ]
    )  # fmt: skip
    assert search_page.best_rival(known, 600.0) == ("Optuna NSGA-II with 300 steps", pytest.approx(0.55))
    assert search_page.best_rival(known, 5.0) is not None
    assert len(search_page.final(known)) == 5


def test_cells_have_names_that_are_read_back_and_none_comes_twice(tmp_path: Path) -> None:
    every = list(search.cells(pd.DataFrame(columns=search.COLUMNS)))
    names = [cell.name for cell in every]
    assert [search.parse(name) for name in names] == every
    assert len(set(names)) == len(names)
    out = tmp_path / "run"
    assert all(str(out) in cell.command(out) and f"{cell.budget_s:.0f}s" in cell.command(out) for cell in every)


def test_the_length_that_served_a_rival_best_is_taken_for_its_other_seeds() -> None:
    known = pd.concat([curve("tpe", {10.0: v}, 0, steps) for v, steps in ((0.3, 0), (0.7, 60), (0.5, 300))])
    assert search.best_steps(known.assign(model="resnet20"), "tpe") == 60


def test_a_front_that_is_as_good_as_the_original_and_8x_32x_fills_the_box() -> None:
    original = Scored(0.9, 0.9, 8.0, 3200)
    assert volume([Scored(0.9, 0.9, 1.0, 100)], original, "test") == pytest.approx(1.0)
    assert volume([Scored(0.8, 0.85, 1.0, 100)], original, "test") == pytest.approx(0.5)
    assert volume([original], original, "test") == pytest.approx(0.0)


@pytest.mark.parametrize("part", ABLATIONS)
def test_what_an_ablation_leaves_out_is_there(part: str) -> None:
    try:
        ABLATIONS[part]()
    finally:
        patch.stopall()
