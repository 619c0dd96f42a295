"""The front as a figure, with plotly: error against a cost, everything else on hover."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from autocompress.front import LoadedFront, Point, error_of
from autocompress.pareto import pareto_mask
from autocompress.plan import Metric
from autocompress.report.describe import describe_plan, drop_text, gains_text, quality_text
from autocompress.report.space import SpaceSummary
from autocompress.report.style import GREY, INK, ORANGE, RED, SIZES, log_axis, styled
from autocompress.units import format_bytes, format_count, format_ms

Axis = Literal["latency", "size", "macs", "memory", "energy"]
Split = Literal["test", "validation"]

MAX_TRIALS_DRAWN = 1500


@dataclass(frozen=True)
class _AxisStyle:
    title: str
    colour_title: str
    unit: float

    def of(self, axis: Axis, point: Point) -> float | None:
        raw = point.cost(COLUMNS[axis])
        return None if raw is None else raw / self.unit


AXES: dict[Axis, _AxisStyle] = {
    "latency": _AxisStyle("latency, ms", "latency<br>ms", 1.0),
    "size": _AxisStyle("size on disk, kB", "size<br>kB", 1e3),
    "macs": _AxisStyle("multiply-accumulates, millions", "MACs<br>millions", 1e6),
    "memory": _AxisStyle("peak memory, kB", "memory<br>kB", 1e3),
    "energy": _AxisStyle("energy, mJ", "energy<br>mJ", 1.0),
}
COLUMNS: dict[Axis, str] = {
    "latency": "latency_ms",
    "size": "size_bytes",
    "macs": "macs",
    "memory": "peak_memory_bytes",
    "energy": "energy_mj",
}
"""The cost behind each axis, as objectives and tables call it."""


def front_figure(
    front: LoadedFront,
    space: SpaceSummary,
    *,
    axis: Axis = "latency",
    split: Split = "test",
    rejected: pd.DataFrame | None = None,
    trials: pd.DataFrame | None = None,
) -> go.Figure:
    """The front: error against a cost, a second cost as colour, everything else on hover.

    The line joins the points that are best on these two axes alone; the others are on the front for their colour.
    """
    metric, style = front.front.metric, AXES[axis]
    colour_axis: Axis = "size" if axis != "size" else "latency"
    figure = go.Figure()
    if trials is not None and not trials.empty and COLUMNS[axis] in trials:
        _add_trials(figure, trials, axis, metric)
    if rejected is not None and not rejected.empty:
        _add_rejected(figure, rejected, axis, split, metric)

    drawn = [point for point in front.points if style.of(axis, point) is not None]
    xs = [style.of(axis, point) or 0.0 for point in drawn]
    ys = [_error(metric, point, split) for point in drawn]
    if drawn:
        best = sorted(np.flatnonzero(pareto_mask(np.column_stack([xs, ys]))), key=lambda i: xs[i])
        figure.add_scatter(
            x=[xs[i] for i in best],
            y=[ys[i] for i in best],
            mode="lines",
            line={"shape": "hv", "color": GREY, "width": 1.5},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=xs,
            y=ys,
            error_y=_error_bars(metric, drawn, split),
            mode="markers+text",
            text=[html.escape(point.id) for point in drawn],
            textposition="bottom left",
            textfont={"size": 10, "color": "#5b6875"},
            name="front",
            marker={
                "size": 13,
                "color": [AXES[colour_axis].of(colour_axis, point) for point in drawn],
                "colorscale": SIZES,
                "reversescale": True,
                "line": {"width": 1, "color": INK},
                "colorbar": {"title": {"text": AXES[colour_axis].colour_title}, "thickness": 12, "outlinewidth": 0},
            },
            customdata=[_hover(point, space) for point in drawn],
            hovertemplate="%{customdata}<extra></extra>",
        )
    for name, symbol, colour, points in (
        ("original", "star", RED, (front.reference,)),
        ("uniform int8", "diamond", ORANGE, front.baselines),
    ):
        shown = [point for point in points if style.of(axis, point) is not None]
        if shown:
            figure.add_scatter(
                x=[style.of(axis, point) for point in shown],
                y=[_error(metric, point, split) for point in shown],
                error_y=_error_bars(metric, shown, split),
                mode="markers",
                name=name,
                marker={"symbol": symbol, "size": 15, "color": colour, "line": {"width": 1, "color": INK}},
                customdata=[_hover(point, space) for point in shown],
                hovertemplate="%{customdata}<extra></extra>",
            )
    fixed = [style.of(axis, point) or 0.0 for point in (front.reference, *front.baselines)]
    figure.update_xaxes(title_text=f"{style.title} (log scale)", **log_axis([*xs, *fixed]))
    figure.update_yaxes(title_text=_error_title(metric, split), rangemode="normal")
    if drawn:
        _limit_y(figure, metric, [*drawn, front.reference], split)
    return styled(figure, height=520)


# --------------------------------------------------------------------------------------------------------- helpers


def _percent(metric: Metric) -> float:
    return 100.0 if metric.unit == "fraction" else 1.0


def _error(metric: Metric, point: Point, split: Split) -> float:
    """What stands on the y axis: the error in percent; for another metric its value, turned so that less is better."""
    return error_of(metric, point.test if split == "test" else point.validation) * _percent(metric)


def _error_title(metric: Metric, split: Split) -> str:
    if metric.unit == "fraction":
        return f"{split} error, %"
    return f"{split} {metric.name}" + (" (negated)" if metric.higher_is_better else "")


def _error_bars(metric: Metric, points: Sequence[Point], split: Split) -> dict[str, object] | None:
    if split != "test":
        return None
    bounds = [[error_of(metric, edge) * _percent(metric) for edge in p.test_ci95] for p in points]
    centres = [_error(metric, point, split) for point in points]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(max(pair) - centre, 0.0) for pair, centre in zip(bounds, centres, strict=True)],
        "arrayminus": [max(centre - min(pair), 0.0) for pair, centre in zip(bounds, centres, strict=True)],
        "color": GREY,
        "thickness": 1,
        "width": 3,
    }


def _hover(point: Point, space: SpaceSummary) -> str:
    info, metric = point.info, point.metric
    measured = "measured" if info.latency_ms.measured is not None else "predicted"
    lines = [f"<b>{html.escape(point.id)}</b>  {gains_text(point) if point.info is not point.reference else ''}"]
    if point.split == "test":
        change = f" ({drop_text(metric, point.test_drop)})" if point.test_drop is not None else ""
        lines.append(f"test {html.escape(metric.name)} {quality_text(metric, point.test)}{change}")
    lines.append(f"validation {quality_text(metric, point.validation)}")
    if point.latency_ms is not None:
        p95 = info.latency_ms.measured_p95
        lines.append(f"{measured} {format_ms(point.latency_ms)}" + (f", 95% below {format_ms(p95)}" if p95 else ""))
    if info.latency_ms.predicted is not None and measured == "measured":
        lines.append(f"predicted {format_ms(info.latency_ms.predicted)}")
    lines.append(f"{format_bytes(info.size_bytes)}, {format_count(info.params)} parameters")
    memory = f", {format_bytes(info.peak_memory_bytes)} at peak" if info.peak_memory_bytes is not None else ""
    lines.append(f"{format_count(info.macs)} MACs{memory}")
    if info.energy_mj is not None:
        lines.append(f"{info.energy_mj:.3g} mJ")
    if info.kernels:
        lines.append("kernels: " + ", ".join(f"{count} {html.escape(kind)}" for kind, count in info.kernels.items()))
    if point.info is not point.reference:
        lines += _wrapped(html.escape(describe_plan(info.plan, space)))
    return "<br>".join(lines)


def _wrapped(text: str, width: int = 60) -> list[str]:
    lines = [""]
    for part in text.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f", {part}" if lines[-1] else part
    return lines


def _add_trials(figure: go.Figure, trials: pd.DataFrame, axis: Axis, metric: Metric) -> None:
    shown = trials if len(trials) <= MAX_TRIALS_DRAWN else trials.sample(MAX_TRIALS_DRAWN, random_state=0)
    figure.add_scatter(
        x=shown[COLUMNS[axis]] / AXES[axis].unit,
        y=shown["error"] * _percent(metric),
        mode="markers",
        name="candidates, as estimated",
        marker={"size": 5, "color": GREY, "opacity": 0.5},
        hoverinfo="skip",
    )


def _add_rejected(figure: go.Figure, rejected: pd.DataFrame, axis: Axis, split: Split, metric: Metric) -> None:
    column = COLUMNS[axis]
    quality = split if split in rejected and rejected[split].notna().any() else "validation"
    if column not in rejected or quality not in rejected:
        return
    costs = pd.to_numeric(rejected[column], errors="coerce")
    qualities = pd.to_numeric(rejected[quality], errors="coerce")
    known = costs.notna() & qualities.notna()
    ids = rejected["id"] if "id" in rejected else pd.Series(rejected.index, index=rejected.index)
    figure.add_scatter(
        x=costs[known] / AXES[axis].unit,
        y=[error_of(metric, float(value)) * _percent(metric) for value in qualities[known]],
        mode="markers",
        name="rejected" if quality == split else "rejected (validation)",
        marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": "#7b8794"}},
        customdata=[
            f"<b>{html.escape(str(name))}</b> rejected<br>{html.escape(str(reason))}"
            for name, reason in zip(ids[known], rejected["reason"][known], strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _limit_y(figure: go.Figure, metric: Metric, points: Sequence[Point], split: Split) -> None:
    """Keeps the view on the front and its intervals: candidates near chance would squeeze it into a line."""
    shown = [_error(metric, point, split) for point in points]
    if split == "test":
        shown += [error_of(metric, edge) * _percent(metric) for p in points for edge in p.test_ci95]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 0.1)
    floor = -margin if metric.unit == "fraction" else -math.inf
    figure.update_yaxes(range=[max(low - margin, floor), high + margin])
