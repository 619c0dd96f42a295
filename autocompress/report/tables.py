"""The tables of a run, with pandas: points as people read them, rejected candidates, trials."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from autocompress.front import LoadedFront, Point
from autocompress.report.describe import describe_plan, drop_interval_text, drop_text, quality_text
from autocompress.report.space import SpaceSummary
from autocompress.units import format_bytes, format_count, format_ms, format_ratio

ORIGINAL_TEXT = "the original"


def readable_points(front: LoadedFront, space: SpaceSummary) -> pd.DataFrame:
    """The original, the baselines and the points, in words; indexed by id, ``kind`` first.

    Columns: kind, test, interval, drop, drop_interval, latency, faster, p95, size, smaller, params, macs, memory,
    kernels, agreement, tied, how.
    """
    rows = [_readable(front.reference, "reference", space)]
    rows += [_readable(point, "baseline", space) for point in front.baselines]
    rows += [_readable(point, "point", space) for point in front.points]
    return pd.DataFrame(rows).set_index("id")


def _readable(point: Point, kind: str, space: SpaceSummary) -> dict[str, object]:
    info, metric = point.info, point.metric
    low, high = point.test_ci95
    fraction = metric.unit == "fraction"
    latency = "unknown" if point.latency_ms is None else format_ms(point.latency_ms)
    if point.latency_ms is not None and info.latency_ms.measured is None:
        band = info.latency_ms.error_band
        latency += " predicted" if band is None else f" ({band[0]:.3g}-{band[1]:.3g} predicted)"
    interval = f"{low:.1%} to {high:.1%}" if fraction else f"{low:.4g} to {high:.4g}"
    kernels = [f"{count} {name}" for name, count in info.kernels.items() if count]
    return {
        "id": point.id,
        "kind": kind,
        "test": quality_text(metric, point.shown) + ("" if point.split == "test" else " on validation"),
        "interval": interval if point.split == "test" else "",
        "drop": "" if kind == "reference" else drop_text(metric, point.shown_drop, unit=False),
        "drop_interval": "" if kind == "reference" else drop_interval_text(point),
        "latency": latency,
        "faster": "" if kind == "reference" or point.speedup is None else format_ratio(point.speedup),
        "p95": "" if info.latency_ms.measured_p95 is None else format_ms(info.latency_ms.measured_p95),
        "size": format_bytes(point.size_bytes),
        "smaller": "" if kind == "reference" or point.shrink is None else format_ratio(point.shrink),
        "params": format_count(info.params),
        "macs": format_count(info.macs),
        "memory": "" if info.peak_memory_bytes is None else format_bytes(info.peak_memory_bytes),
        "energy": "" if info.energy_mj is None else f"{info.energy_mj:.3g} mJ",
        "kernels": kernels,
        "agreement": "" if info.runtime_agreement is None else f"{info.runtime_agreement:.2%}",
        "tied": list(info.tied_with),
        "how": ORIGINAL_TEXT if kind == "reference" else describe_plan(info.plan, space),
    }


def read_rejected(run: Path) -> pd.DataFrame:
    """The candidates of ``rejected.csv`` with the reason; empty where there is none."""
    table = _read_csv(run / "rejected.csv")
    return table if "reason" in table.columns else pd.DataFrame()


def read_trials(run: Path, objectives: tuple[str, ...]) -> pd.DataFrame:
    """The finished trials of ``trials.csv``, one column an objective; empty where the file has none.

    Optuna writes the objectives as ``values_error``; a plain ``error`` is read as well.
    """
    table = _read_csv(run / "trials.csv")
    columns = {name: f"values_{name}" if f"values_{name}" in table.columns else name for name in objectives}
    if table.empty or any(column not in table.columns for column in columns.values()):
        return pd.DataFrame()
    if "state" in table.columns:
        table = table[table["state"] == "COMPLETE"]
    found = pd.DataFrame({name: pd.to_numeric(table[column], errors="coerce") for name, column in columns.items()})
    return found.replace([float("inf"), float("-inf")], float("nan")).dropna().reset_index(drop=True)


def read_ladder(run: Path) -> pd.DataFrame:
    """The recoveries of ``ladder.csv``, one row a structure and rung; empty where there is none."""
    table = _read_csv(run / "ladder.csv")
    return table if {"id", "rung", "base", "divergence", "error"} <= set(table.columns) else pd.DataFrame()


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError):
        # Absent, empty or cut off in mid-write: the report goes without it.
        return pd.DataFrame()
