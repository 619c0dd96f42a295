"""The figures of a report, with plotly.  Colours are Okabe and Ito's and Cividis: safe for colour-blind readers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from autocompress.front import LoadedFront, Point, error_of
from autocompress.pareto import hypervolume, pareto_mask
from autocompress.plan import LayerPlan, Metric
from autocompress.report.describe import describe_plan, drop_text, gains_text, quality_text
from autocompress.report.space import SpaceSummary
from autocompress.units import format_bytes, format_count, format_ms

BLUE, ORANGE, GREEN, RED, INK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#1d2733", "#9aa5b1"
SIZES = "Cividis"

Axis = Literal["latency", "size", "macs"]
Split = Literal["test", "validation"]

MAX_TRIALS_DRAWN = 1500


@dataclass(frozen=True)
class _AxisStyle:
    title: str
    colour_title: str
    unit: float

    def of(self, axis: Axis, point: Point) -> float | None:
        raw = {"latency": point.latency_ms, "size": point.size_bytes, "macs": point.info.macs}[axis]
        return None if raw is None else raw / self.unit


AXES: dict[Axis, _AxisStyle] = {
    "latency": _AxisStyle("latency, ms", "latency<br>ms", 1.0),
    "size": _AxisStyle("size on disk, kB", "size<br>kB", 1e3),
    "macs": _AxisStyle("multiply-accumulates, millions", "MACs<br>millions", 1e6),
}
_TRIAL_COLUMNS: dict[Axis, str] = {"latency": "latency_ms", "size": "size_bytes", "macs": "macs"}


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
    if trials is not None and not trials.empty and _TRIAL_COLUMNS[axis] in trials:
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
    figure.update_xaxes(type="log", title_text=f"{style.title} (log scale)", **_log_ticks())
    figure.update_yaxes(title_text=_error_title(metric, split), rangemode="normal")
    if drawn:
        _limit_y(figure, [*ys, _error(metric, front.reference, split)])
    return _styled(figure, height=520)


def prediction_figure(front: LoadedFront) -> go.Figure | None:
    """Predicted against measured latency with each prediction's own band; None where nothing was measured."""
    shown = [
        point
        for point in (front.reference, *front.baselines, *front.points)
        if point.info.latency_ms.measured and point.info.latency_ms.predicted
    ]
    if not shown:
        return None
    measured = np.array([point.info.latency_ms.measured for point in shown], dtype=float)
    predicted = np.array([point.info.latency_ms.predicted for point in shown], dtype=float)
    bands = np.array([point.info.latency_ms.error_band or (p, p) for point, p in zip(shown, predicted, strict=True)])
    low, high = measured.min() / 1.25, measured.max() * 1.25
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high, high, low],
        y=[low * 1.1, high * 1.1, high / 1.1, low / 1.1],
        mode="lines",
        fill="toself",
        fillcolor="rgba(0,114,178,0.10)",
        line={"width": 0},
        hoverinfo="skip",
        name="within 10%",
    )
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip", name="equal"
    )
    figure.add_scatter(
        x=measured,
        y=predicted,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": np.maximum(bands[:, 1] - predicted, 0.0),
            "arrayminus": np.maximum(predicted - bands[:, 0], 0.0),
            "color": BLUE,
            "thickness": 1,
            "width": 3,
        },
        mode="markers",
        marker={"size": 10, "color": BLUE, "line": {"width": 1, "color": INK}},
        text=[html.escape(point.id) for point in shown],
        customdata=(predicted / measured - 1.0) * 100.0,
        hovertemplate="<b>%{text}</b><br>measured %{x:.3g} ms<br>"
        "predicted %{y:.3g} ms (%{customdata:+.1f}%)<extra></extra>",
        name="models, with the predicted band",
    )
    figure.update_xaxes(type="log", title_text="measured, ms", **_log_ticks())
    figure.update_yaxes(type="log", title_text="predicted, ms", **_log_ticks())
    return _styled(figure, height=430)


def prediction_error(front: LoadedFront) -> tuple[float, float] | None:
    """Mean and largest relative error of the predicted latencies of the delivered models."""
    errors = [
        abs(point.info.latency_ms.predicted / point.info.latency_ms.measured - 1.0)
        for point in front.points
        if point.info.latency_ms.measured and point.info.latency_ms.predicted
    ]
    return (sum(errors) / len(errors), max(errors)) if errors else None


Decision = Literal["keep", "bits", "compute"]

_CATEGORIES: dict[Decision, list[tuple[str, str]]] = {
    "bits": [("32", "#d9dee4"), ("16", "#b3c7da"), ("8", "#56B4E9"), ("4", "#0072B2"), ("2", "#00304d")],
    "compute": [("fp32", "#d9dee4"), ("int8", "#009E73")],
}


def decisions_figure(front: LoadedFront, space: SpaceSummary, decision: Decision) -> go.Figure | None:
    """What each point decided for each layer or channel group: kept channels, weight bits or compute type."""
    rows: Sequence[str] = tuple(space.group_sizes) if decision == "keep" else space.layers
    points = front.points
    if not rows or not points:
        return None
    columns = [html.escape(point.id) for point in points]
    labels = [html.escape(name) for name in rows]
    if decision == "keep":
        values = np.array([[space.keep_ratio(point.plan, row) for point in points] for row in rows])
        colours = {
            "colorscale": "Cividis",
            "zmin": 0.0,
            "zmax": 1.0,
            "colorbar": {"tickformat": ".0%", "title": {"text": "kept"}, "thickness": 12, "outlinewidth": 0},
        }
        texts = [[f"{value:.0%}" for value in line] for line in values]
    else:
        plans = [[point.plan.layers.get(row, LayerPlan()) for point in points] for row in rows]
        texts = [[str(plan.storage.bits) if decision == "bits" else plan.compute for plan in line] for line in plans]
        names = {text for line in texts for text in line}
        scale = [(name, colour) for name, colour in _CATEGORIES[decision] if name in names]
        scale += [(name, GREY) for name in sorted(names - {name for name, _ in scale})]
        order = {name: index for index, (name, _) in enumerate(scale)}
        values = np.array([[order[text] for text in line] for line in texts], dtype=float)
        steps = [(edge / len(scale), colour) for index, (_, colour) in enumerate(scale) for edge in (index, index + 1)]
        colours = {"colorscale": steps, "zmin": -0.5, "zmax": len(scale) - 0.5}
        colours["colorbar"] = {
            "tickvals": list(range(len(scale))),
            "ticktext": [name for name, _ in scale],
            "title": {"text": "weight bits" if decision == "bits" else "computes in"},
            "thickness": 12,
            "outlinewidth": 0,
        }
    readable = len(points) <= 24
    figure = go.Figure(
        go.Heatmap(
            x=columns,
            y=labels,
            z=values,
            text=texts,
            texttemplate="%{text}" if readable else None,
            textfont={"size": 10},
            xgap=1,
            ygap=1,
            hovertemplate="<b>%{y}</b><br>%{x}: %{text}<extra></extra>",
            **colours,
        )
    )
    figure.update_xaxes(side="top", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return _styled(figure, height=70 + 22 * len(rows)).update_layout(margin={"t": 40, "b": 10})


def stages_figure(front: LoadedFront) -> go.Figure | None:
    """Where the time went, one bar a stage."""
    stages = {name: seconds for name, seconds in front.front.search.stages.items() if seconds >= 0}
    if not stages:
        return None
    figure = go.Figure(
        go.Bar(
            x=list(stages.values()),
            y=[html.escape(name) for name in stages],
            orientation="h",
            marker={"color": BLUE},
            text=[f"{seconds:.1f} s" for seconds in stages.values()],
            textposition="auto",
            hovertemplate="%{y}: %{x:.1f} s<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return _styled(figure, height=110 + 32 * len(stages))


def history_figure(trials: pd.DataFrame) -> go.Figure | None:
    """The share of the box up to the worst trial that the trials so far dominate."""
    if len(trials) < 3 or not 2 <= trials.shape[1] <= 4:
        return None
    values = trials.to_numpy(dtype=float)
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    marks = np.unique(np.linspace(1, len(scaled), num=min(len(scaled), 80), dtype=int))
    front = np.empty((0, values.shape[1]))
    shares, before = [], 0
    for mark in marks:
        front = np.vstack([front, scaled[before:mark]])
        front, before = front[pareto_mask(front)], int(mark)
        shares.append(hypervolume(front, np.full(values.shape[1], 1.0 + 1e-9)))
    figure = go.Figure(
        go.Scatter(
            x=marks,
            y=shares,
            mode="lines",
            line={"color": GREEN, "width": 2, "shape": "hv"},
            hovertemplate="after %{x} trials: %{y:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="trials")
    figure.update_yaxes(title_text="share of the box dominated")
    return _styled(figure, height=300)


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
    bounds = [[error_of(metric, edge) * _percent(metric) for edge in p.info.quality.test_ci95] for p in points]
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
        x=shown[_TRIAL_COLUMNS[axis]] / AXES[axis].unit,
        y=shown["error"] * _percent(metric),
        mode="markers",
        name="candidates, as estimated",
        marker={"size": 5, "color": GREY, "opacity": 0.5},
        hoverinfo="skip",
    )


def _add_rejected(figure: go.Figure, rejected: pd.DataFrame, axis: Axis, split: Split, metric: Metric) -> None:
    column = _TRIAL_COLUMNS[axis]
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


def _limit_y(figure: go.Figure, errors: Sequence[float]) -> None:
    """Keeps the view on the front: candidates near chance would squeeze it into a line."""
    low, high = min(errors), max(errors)
    margin = 0.12 * (high - low) or max(abs(high) * 0.1, 0.1)
    figure.update_yaxes(range=[low - 1.5 * margin, high + 1.5 * margin])


def _log_ticks() -> dict[str, object]:
    """Ticks at 1, 2 and 5 of each decade, spelled as plain numbers: powers of ten hide what a factor is worth."""
    return {"dtick": "D2", "tickformat": "~g", "exponentformat": "none"}


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 30, "b": 55},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": 1.06, "x": 0},
        hoverlabel={"bgcolor": "white", "align": "left", "font": {"size": 12}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(gridcolor="#e6eaee", linecolor="#c3ccd5", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="#e6eaee", linecolor="#c3ccd5", zeroline=False, automargin=True)
    return figure
