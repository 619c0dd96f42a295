"""Renders a run directory as one HTML file that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autocompress.front import LoadedFront, Point, budget_text, load_front
from autocompress.report import diagnostics, figures
from autocompress.report.describe import highlights, quality_text, recovery_text, split_gap_text, tied_text, verdict
from autocompress.report.ranking import ladder_figure, ranking_text
from autocompress.report.space import SpaceSummary, read_space
from autocompress.report.tables import read_ladder, read_rejected, read_trials, readable_points
from autocompress.units import format_bytes, format_duration, format_ms
from autocompress.version import __version__

REPORT_NAME = "report.html"

_AXIS_NAMES: dict[figures.Axis, str] = {
    "latency": "latency",
    "size": "size",
    "macs": "MACs",
    "memory": "peak memory",
    "energy": "energy",
}
_ALWAYS: tuple[figures.Axis, ...] = ("latency", "size", "macs")
_SPLITS: tuple[figures.Split, ...] = ("test", "validation")
_DECISION_NAMES: dict[diagnostics.Decision, str] = {
    "keep": "channels kept",
    "bits": "weight bits",
    "compute": "compute type",
}


def write_report(run: str | Path) -> Path:
    """Writes ``report.html`` into a run directory, of a complete or a running front, and returns its path.

    Raises:
        UsageError: where the directory holds no front.
    """
    front = load_front(run)
    path = front.path / REPORT_NAME
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(render(front), encoding="utf-8")
    temporary.replace(path)
    return path


def render(front: LoadedFront) -> str:
    """The whole page as text."""
    run = front.path
    every = (front.reference, *front.baselines, *front.points)
    space = read_space(run / "space.json", [point.plan for point in every])
    sentence, basis = verdict(front)
    environment = Environment(
        loader=PackageLoader("autocompress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rejected = read_rejected(run)
    trials = read_trials(run, _trial_axes(front))
    ladder = read_ladder(run)
    charts = _charts(front, space, rejected, trials, ladder)
    return environment.get_template("report.html.j2").render(
        front=front.front,
        title=f"{front.front.model} on {front.front.task}",
        sentence=sentence,
        basis=basis,
        highlights=highlights(front),
        reference=_facts_of(front.reference),
        budgets=[budget_text(name, value) for name, value in front.front.constraints.items() if name in _BUDGETS],
        charts=charts,
        axis_names={axis: _AXIS_NAMES[axis] for axis in _axes(front)},
        splits=_SPLITS,
        decision_names={
            key: name for key, name in _DECISION_NAMES.items() if f"decisions-{key}" in charts["decisions"]
        },
        prediction_error=diagnostics.prediction_error(front),
        split_gap=split_gap_text(front),
        ranking=ranking_text(ladder),
        recovered=recovery_text(front),
        table=_table(front, space),
        has_energy=any(point.info.energy_mj is not None for point in every),
        rejected=rejected.astype(object).where(rejected.notna(), "").to_dict("records"),
        rejected_columns=list(rejected.columns),
        left_alone=_left_alone(run),
        environment=_flatten(_read_json(run / "environment.json")),
        config=_read_text(run / "config.yaml"),
        seconds=format_duration(round(front.front.search.seconds)),
        plotly_js=_script(get_plotlyjs()),
        chart_json=_script(json.dumps({key: value for group in charts.values() for key, value in group.items()})),
        version=__version__,
    )


_BUDGETS = ("latency_ms", "size_bytes", "peak_memory_bytes", "energy_mj", "macs", "drop")


def _charts(
    front: LoadedFront, space: SpaceSummary, rejected: Any, trials: Any, ladder: Any
) -> dict[str, dict[str, Any]]:
    """Every figure as plain data, by section and by the name its buttons ask for."""
    fronts = {
        f"front-{axis}-{split}": figures.front_figure(
            front, space, axis=axis, split=split, rejected=rejected, trials=trials
        )
        for axis in _axes(front)
        for split in _SPLITS
    }
    decisions = {_chart_of(name): diagnostics.decisions_figure(front, space, name) for name in _DECISION_NAMES}
    single = {
        "prediction": diagnostics.prediction_figure(front),
        "stages": diagnostics.stages_figure(front),
        "history": diagnostics.history_figure(trials),
        "ladder": ladder_figure(ladder),
    }
    groups: dict[str, Mapping[str, go.Figure | None]] = {"front": fronts, "decisions": decisions}
    groups |= {name: {name: figure} for name, figure in single.items()}
    return {
        section: {key: json.loads(figure.to_json()) for key, figure in group.items() if figure is not None}
        for section, group in groups.items()
    }


def _axes(front: LoadedFront) -> list[figures.Axis]:
    """The costs that the front can be looked at against: its objectives first, then what people always ask for."""
    asked = [axis for name in front.front.objectives for axis, own in figures.COLUMNS.items() if own == name]
    bound = [axis for axis, own in figures.COLUMNS.items() if own in front.front.constraints and axis not in _ALWAYS]
    return list(dict.fromkeys([*asked, *_ALWAYS, *bound]))


def _trial_axes(front: LoadedFront) -> tuple[str, ...]:
    """What candidates were compared by: quality always, and the costs asked for or bound, as the search does."""
    costs = [name for name in front.front.objectives if name != "error"]
    bound = [name for name in front.front.constraints if name in figures.COLUMNS.values()]
    return ("error", *(costs or bound[:3] or ("latency_ms", "size_bytes")))


def _chart_of(decision: diagnostics.Decision) -> str:
    return f"decisions-{decision}"


def _table(front: LoadedFront, space: SpaceSummary) -> list[dict[str, Any]]:
    """The readable rows, each with the raw numbers that its columns sort by."""
    rows: list[dict[str, Any]] = []
    for key, words in readable_points(front, space).to_dict("index").items():
        point = front[str(key)]
        info = point.info
        raw = {
            "test": point.shown,
            "drop": -(point.shown_drop or 0.0),
            "latency": point.latency_ms,
            "p95": info.latency_ms.measured_p95,
            "size": info.size_bytes,
            "params": info.params,
            "macs": info.macs,
            "memory": info.peak_memory_bytes,
            "energy": info.energy_mj,
            "agreement": info.runtime_agreement,
        }
        link = info.artifact if (front.path / info.artifact).is_file() else ""
        sortable = {name: "" if value is None else value for name, value in raw.items()}
        rows.append({**{str(name): word for name, word in words.items()}, "id": key, "raw": sortable, "link": link})
        rows[-1]["tied_text"] = tied_text(info.tied_with)
    return rows


def _facts_of(point: Point) -> str:
    latency = "" if point.latency_ms is None else f", {format_ms(point.latency_ms)}"
    quality = quality_text(point.metric, point.shown)
    return f"test {point.metric.name} {quality}{latency}, {format_bytes(point.size_bytes)}"


def _left_alone(run: Path) -> dict[str, str]:
    """What ``space.json`` says could not be compressed or does not pay here, with the reason."""
    space = _read_json(run / "space.json")
    found: dict[str, str] = {}
    for holder in (space, space.get("graph")):
        for key in ("skipped", "dropped"):
            section = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(section, dict):
                found.update({str(name): str(reason) for name, reason in section.items()})
    return found


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found.update(_flatten(value, f"{name}."))
        else:
            found[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _script(text: str) -> Markup:
    """Text for a ``<script>`` element: nothing in it can close the element."""
    return Markup(text.replace("</", "<\\/").replace("<!--", "<\\!--"))
