"""Figures behind the front: what each point decided, how well latency was predicted, how the search went."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from autocompress.front import LoadedFront
from autocompress.pareto import hypervolume, pareto_mask
from autocompress.plan import LayerPlan
from autocompress.report.space import SpaceSummary
from autocompress.report.style import BLUE, GREEN, GREY, INK, SIZES, log_axis, styled


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
    figure.update_xaxes(title_text="measured, ms", **log_axis([*measured, *predicted]))
    figure.update_yaxes(title_text="predicted, ms", **log_axis([*measured, *predicted]))
    return styled(figure, height=430)


def prediction_error(front: LoadedFront) -> tuple[float, float] | None:
    """Mean and largest relative error of the predicted latencies of the delivered models."""
    errors = [
        abs(point.info.latency_ms.predicted / point.info.latency_ms.measured - 1.0)
        for point in front.points
        if point.info.latency_ms.measured and point.info.latency_ms.predicted
    ]
    return (sum(errors) / len(errors), max(errors)) if errors else None


MOST_AXES = 4
"""Hypervolumes are exact up to four axes."""

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
            "colorscale": SIZES,
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
    return styled(figure, height=70 + 22 * len(rows)).update_layout(margin={"t": 40, "b": 10})


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
    return styled(figure, height=110 + 32 * len(stages))


def history_figure(trials: pd.DataFrame) -> go.Figure | None:
    """The share of the box up to the worst trial that the trials so far dominate, over four columns at most."""
    if len(trials) < 3 or trials.shape[1] < 2:
        return None
    values = trials.iloc[:, :MOST_AXES].to_numpy(dtype=float)
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
    return styled(figure, height=300)
