"""How well structures are ranked before they are recovered: rank correlation between the rungs of ``ladder.csv``."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autocompress.report.style import BLUE, GREEN, INK, ORANGE, log_axis, styled

Array = npt.NDArray[np.float64]

FEWEST = 4
"""Pairs from which on a correlation says anything: three rank alike by chance in one case of six."""

RESAMPLES = 2000
COLOURS = {"original": BLUE, "student": ORANGE, "fresh": GREEN}


@dataclass(frozen=True)
class Agreement:
    """How alike two judgements rank the same structures.

    Attributes:
        count: structures that have both.
        tau: Kendall's tau-b; None below ``FEWEST`` structures, or where one judgement tells none apart.
        low: lower end of a 95% bootstrap interval over structures.
        high: its upper end.
        p_value: of a ranking no better than chance, by permutation where there are no ties.
    """

    count: int
    tau: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        if self.count < FEWEST:
            return f"n too small ({self.count})"
        if self.tau is None:
            return f"undefined, all alike (n = {self.count})"
        return f"tau {self.tau:.2f} (95% {self.low:.2f} to {self.high:.2f}, p = {self.p_value:.2g}, n = {self.count})"


def agreement(before: Array, after: Array, seed: int = 0) -> Agreement:
    """Kendall's tau of two judgements of the same structures, with its interval.

    Few structures are recovered in a run, and those that looked best before: the interval is wide, and the tau of all
    candidates would be larger.
    """
    count = len(before)
    if count < FEWEST or len(set(before)) < 2 or len(set(after)) < 2:
        return Agreement(count)
    from scipy.stats import kendalltau

    found = kendalltau(before, after)
    signs = [np.sign(values[:, None] - values[None, :]) for values in (before, after)]
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    x, y = (sign[drawn[:, :, None], drawn[:, None, :]].reshape(RESAMPLES, -1) for sign in signs)
    scale = np.sqrt(np.square(x).sum(1) * np.square(y).sum(1))
    # A resample of one structure alone has no ranking.
    taus = (x * y).sum(1)[scale > 0] / scale[scale > 0]
    low, high = np.quantile(taus, [0.025, 0.975])
    return Agreement(count, float(found.statistic), float(low), float(high), float(found.pvalue))


@dataclass(frozen=True)
class Step:
    """Two judgements of the same structures: one before, by which they are chosen, and one after."""

    before: str
    after: str
    rows: pd.DataFrame

    @property
    def agreement(self) -> Agreement:
        return agreement(self.rows["before"].to_numpy(dtype=float), self.rows["after"].to_numpy(dtype=float))


def steps_of(ladder: pd.DataFrame) -> list[Step]:
    """What is compared: stitched with the first rung, and the first with the second.

    Args:
        ladder: of ``read_ladder``.
    """
    if ladder.empty:
        return []
    done = ladder.dropna(subset=["error"]).drop_duplicates(["id", "rung"], keep="last").set_index("id")
    first, second = (done[done["rung"] == rung] for rung in (1, 2))
    stitched = pd.DataFrame({"before": first["divergence"], "after": first["error"], "base": first["base"]})
    longer = pd.DataFrame({"before": first["error"], "after": second["error"], "base": first["base"]})
    return [
        Step("stitched", "rung 1", stitched.dropna()),
        Step("rung 1", "rung 2", longer.dropna()),
    ]


def ranking_text(ladder: pd.DataFrame) -> str:
    """The rank correlations in a line; empty where nothing was recovered."""
    steps = steps_of(ladder)
    if not any(len(step.rows) for step in steps):
        return ""
    return "Rank correlation: " + "; ".join(f"{s.before} with {s.after} {s.agreement}" for s in steps)


def ladder_figure(ladder: pd.DataFrame) -> go.Figure | None:
    """Each structure before and after, a panel a step; None where nothing was recovered."""
    steps = steps_of(ladder)
    if not any(len(step.rows) for step in steps):
        return None
    titles = [f"{step.before} and {step.after}: {step.agreement}" for step in steps]
    figure = make_subplots(rows=1, cols=len(steps), subplot_titles=titles, horizontal_spacing=0.1)
    shown: set[str] = set()
    for column, step in enumerate(steps, start=1):
        for base, rows in step.rows.groupby("base"):
            name = str(base)
            figure.add_scatter(
                x=rows["before"],
                y=rows["after"],
                mode="markers",
                marker={"size": 10, "color": COLOURS.get(name, INK), "line": {"width": 1, "color": INK}},
                text=[html.escape(str(index)) for index in rows.index],
                hovertemplate="<b>%{text}</b><br>before %{x:.4g}<br>after %{y:.4g}<extra></extra>",
                name=html.escape(name),
                legendgroup=name,
                showlegend=name not in shown,
                row=1,
                col=column,
            )
            shown.add(name)
        figure.update_yaxes(title_text=f"validation error, {step.after}", row=1, col=column)
    figure.update_xaxes(
        title_text="divergence as stitched, nats", row=1, col=1, **log_axis(list(steps[0].rows["before"]))
    )
    figure.update_xaxes(title_text="validation error, rung 1", row=1, col=2)
    # The panels' titles stand where the legend would be.
    return (
        styled(figure, height=400).update_layout(legend={"y": -0.3}, margin={"t": 50}).update_annotations(font_size=13)
    )
