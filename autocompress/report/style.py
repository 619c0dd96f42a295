"""How figures look.  Colours are Okabe and Ito's and Cividis: safe for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, RED, INK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#1d2733", "#9aa5b1"
SIZES = "Cividis"


def log_axis(values: Sequence[float]) -> dict[str, object]:
    """A logarithmic axis around the values, its ticks spelled as plain numbers: powers of ten hide what a factor is.

    A narrow range gets more ticks a decade than a wide one.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return {"type": "log"}
    low, high = min(positive) / 1.2, max(positive) * 1.2
    span = high / low
    steps: tuple[float, ...] = (1, 1.2, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if span > 4:
        steps = (1, 2, 5) if span > 30 else (1, 1.5, 2, 3, 5, 7)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": shown,
        "ticktext": [f"{tick:.4g}" for tick in shown],
    }


def styled(figure: go.Figure, height: int) -> go.Figure:
    """Gives a figure the page's fonts, margins and grid."""
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
