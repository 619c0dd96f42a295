"""Rank correlation between the rungs: by hand, where it says nothing, and on the page."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from autocompress.front import load_front
from autocompress.report.html import write_report
from autocompress.report.ranking import Agreement, agreement, ladder_figure, ranking_text, steps_of
from autocompress.report.tables import read_ladder
from autocompress.search.rungs import RungLog, RungRow
from autocompress.terminal import front_table
from tests.fixtures.runs import build_run


def row(name: str, rung: int, divergence: float | None, error: float | None, base: str = "original") -> RungRow:
    return RungRow(
        id=name, rung=rung, base=base, macs=1000, latency_ms=0.5, divergence=divergence, forecast_error=0.1,
        error=error, steps=150, seconds=1.0, alpha=0.5, temperature=2.0, feature_weight=0.0, learning_rate=0.01,
        failure="" if error is not None else "FloatingPointError: the distillation loss became nan at step 3",
    )  # fmt: skip


ROWS = (
    # Of the ten pairs, (b, c) and (d, e) stand the other way round: tau = (8 - 2) / 10.
    row("a", 1, 0.1, 0.01),
    row("b", 1, 0.2, 0.03),
    row("c", 1, 0.3, 0.02),
    row("d", 1, 0.4, 0.05),
    row("e", 1, 0.5, 0.04),
    row("student", 1, None, 0.06, base="student"),
    row("broken", 1, 0.6, None),
    # Of these six pairs all agree.
    row("a", 2, 0.1, 0.005),
    row("b", 2, 0.2, 0.020),
    row("c", 2, 0.3, 0.015),
    row("student", 2, None, 0.030, base="student"),
)


def written(folder: Path) -> pd.DataFrame:
    log = RungLog(folder)
    for given in ROWS:
        log.add(given)
    return read_ladder(folder)


def test_tau_by_hand(tmp_path: Path) -> None:
    first, second = steps_of(written(tmp_path))
    assert list(first.rows.index) == ["a", "b", "c", "d", "e"]
    assert (first.agreement.count, first.agreement.tau) == (5, pytest.approx(0.6))
    assert first.agreement.p_value == pytest.approx(28 / 120)  # of 120 orders, 14 either way have |tau| of 0.6 or more
    assert (second.agreement.count, second.agreement.tau) == (4, pytest.approx(1.0))
    assert set(second.rows["base"]) == {"original", "student"}


def test_the_interval_holds_tau_and_narrows_with_more_structures() -> None:
    rng = np.random.default_rng(0)
    spans = []
    for count in (8, 40):
        before = np.arange(count, dtype=float)
        found = agreement(before, before + rng.normal(0, count / 4, count))
        assert found.low is not None
        assert found.low <= found.tau <= found.high <= 1.0
        spans.append(found.high - found.low)
    assert spans[1] < spans[0]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "n too small (3)"),
        ([], [], "n too small (0)"),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], "undefined, all alike (n = 4)"),
    ],
)
def test_where_it_says_nothing(before: list[float], after: list[float], says: str) -> None:
    found = agreement(np.array(before), np.array(after))
    assert found == Agreement(len(before))
    assert str(found) == says


def test_what_an_interrupted_run_wrote_stays(tmp_path: Path) -> None:
    written(tmp_path)
    again = RungLog(tmp_path)
    again.add(row("f", 1, 0.7, 0.08))
    table = read_ladder(tmp_path)
    assert list(table["id"]) == [*(given.id for given in ROWS), "f"]
    assert table.set_index("id").loc["broken", "failure"].startswith("FloatingPointError")
    assert pd.isna(table.set_index("id").loc["broken", "error"])


def test_a_ladder_with_no_recovery_has_no_line_and_no_figure(tmp_path: Path) -> None:
    RungLog(tmp_path).write()
    table = read_ladder(tmp_path)
    assert table.empty
    assert (ranking_text(table), ladder_figure(table)) == ("", None)
    assert read_ladder(tmp_path / "absent").empty


def test_the_page_and_the_terminal_show_it(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    assert 'id="ladder"' not in write_report(run).read_text(encoding="utf-8")
    text = ranking_text(written(run))
    assert re.fullmatch(
        r"Rank correlation: stitched with rung 1 tau 0\.60 \(95% .*; rung 1 with rung 2 tau 1\.00 .*", text
    )
    page = write_report(run).read_text(encoding="utf-8")
    assert 'id="ladder"' in page
    assert text in page
    figure = ladder_figure(read_ladder(run))
    assert figure is not None
    assert ["tau 0.60" in str(note.text) for note in figure.layout.annotations] == [True, False]
    assert sum(len(trace.x) for trace in figure.data) == 5 + 4
    shown = io.StringIO()
    Console(width=200, file=shown).print(front_table(load_front(run), 200))
    assert text in shown.getvalue()
