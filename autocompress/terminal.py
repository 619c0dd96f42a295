"""What the command line shows: tables, and progress as a live bar or, off a terminal, as plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from autocompress.front import LoadedFront, error_of, latency_of
from autocompress.plan import Front, FrontPoint, Metric
from autocompress.progress import Progress, SilentProgress
from autocompress.report.describe import quality_text, split_gap_text, tied_text, verdict
from autocompress.report.space import read_space
from autocompress.report.tables import readable_points
from autocompress.units import format_bytes, format_duration, format_ms

if TYPE_CHECKING:
    import pandas as pd

PLAIN_INTERVAL_S = 15.0
"""How often a stage reports itself where there is no terminal."""

SHOWN_WHILE_RUNNING = 6

WIDE = 125
"""Columns from which on a front fits into one table."""


def front_table(front: LoadedFront, width: int) -> RenderableType:
    """The points of a front with their intervals and gains, under a line that sums it up.

    Where ``width`` columns are too few for one table, what each point does follows in a second one.
    """
    every = (front.reference, *front.baselines, *front.points)
    rows = readable_points(front, read_space(front.path / "space.json", [point.plan for point in every]))
    headings = {
        "test": f"test {front.front.metric.name}",
        "interval": "95% interval",
        "drop": "change",
        "latency": "latency",
        "faster": "faster",
        "size": "size",
        "smaller": "smaller",
        "tied": "tied with",
        "how": "how",
    }
    if not any(rows["tied"]):
        del headings["tied"]
    wide = width >= WIDE
    words = {key: heading for key, heading in headings.items() if key in ("tied", "how")}
    numbers = [key for key in headings if wide or key not in ("interval", *words)]
    tables: list[RenderableType] = [_table(rows, {key: headings[key] for key in numbers})]
    if not wide:
        tables += [Text(""), _table(rows, words)]
    gap = split_gap_text(front)
    if gap:
        tables += [Text(""), Text(gap, style="dim")]
    sentence, basis = verdict(front)
    target = front.front.target
    state = "" if front.front.verified else "; latencies are predicted: the target is not here"
    state += "" if front.front.status == "complete" else ", still running"
    heading = (
        f"{front.front.model} on {front.front.task}, {target.runtime} {target.version} on {target.hardware}, "
        f"{target.threads} thread{'s' if target.threads > 1 else ''}, batch {target.batch}{state}"
    )
    return Group(Text(heading, style="dim"), Text(sentence, style="bold"), Text(basis), Text(""), *tables)


def _table(rows: pd.DataFrame, headings: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("id", no_wrap=True)
    for key, heading in headings.items():
        if key in ("how", "tied"):
            table.add_column(heading, style="dim")
        else:
            table.add_column(Text(heading), justify="right", no_wrap=True)
    for name, row in rows.iterrows():
        style = None if row["kind"] == "point" else "yellow"
        table.add_row(str(name), *(_cell(row[key]) for key in headings), style=style)
    return table


def _cell(value: object) -> str:
    return tied_text(value) if isinstance(value, list) else str(value)


@contextmanager
def showing_progress(*, quiet: bool, stream: TextIO | None = None) -> Iterator[Progress]:
    """Progress on stderr: live on a terminal, else a line now and then, nothing when quiet."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield SilentProgress()
        return
    console = Console(file=stream)
    if not console.is_terminal:
        plain = PlainProgress(stream)
        yield plain
        plain.close()
        return
    with LiveProgress(console) as live:
        yield live


class PlainProgress:
    """One line when a stage begins, one now and then while it lasts, one when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = ""
        self._total: int | None = None
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._notes: dict[str, object] = {}

    def stage(self, name: str, total: int | None = None) -> None:
        self.close()
        self._name, self._total, self._done, self._notes = name, total, 0, {}
        self._begun = self._told = time.monotonic()
        self._write(f"{name} ...")

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        self._tell()

    def note(self, **values: object) -> None:
        self._notes.update(values)
        self._tell()

    def close(self) -> None:
        """Ends the current stage, with the time it took where that is worth a line."""
        if self._name and (taken := time.monotonic() - self._begun) >= 1.0:
            self._write(f"{self._name}: done in {taken:.0f}s")
        self._name = ""

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < PLAIN_INTERVAL_S:
            return
        self._told = now
        share = f"{self._done}/{self._total}" if self._total else str(self._done)
        facts = ", ".join(_fact(key, value) for key, value in self._notes.items() if not isinstance(value, Front))
        front = next((value for value in self._notes.values() if isinstance(value, Front)), None)
        if front is not None:
            facts += f"{', ' if facts else ''}{len(front.points)} points on the front"
        self._write(f"{self._name}: {share}{f' ({facts})' if facts else ''}")

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress:
    """The stages so far, a bar for the current one, the facts noted, and the best points found."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=None)
        self._notes: dict[str, object] = {}
        self._front: Front | None = None
        self._finished: list[str] = []
        self._name, self._begun = "", time.monotonic()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        if self._name:
            self._finished.append(f"{self._name} {format_duration(round(time.monotonic() - self._begun))}")
        self._name, self._begun = name, time.monotonic()
        self._notes = {key: value for key, value in self._notes.items() if key == "seconds_left"}
        self._bars.reset(self._task, total=total, description=name)

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def note(self, **values: object) -> None:
        for key, value in values.items():
            if isinstance(value, Front):
                self._front = value
            else:
                self._notes[key] = value

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._finished:
            parts.append(Text("done: " + ", ".join(self._finished[-6:]), style="dim"))
        parts.append(self._bars)
        if self._notes:
            parts.append(Text(", ".join(_fact(key, value) for key, value in self._notes.items()), style="cyan"))
        if self._front is not None and self._front.points:
            parts.append(_running_table(self._front))
        return Group(*parts)


def _running_table(front: Front) -> Table:
    """A few points spread over the front, most accurate first."""
    metric: Metric = front.metric
    ordered = sorted(front.points, key=lambda point: error_of(metric, point.quality.validation))
    count = min(len(ordered), SHOWN_WHILE_RUNNING)
    chosen = [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in (f"best so far ({len(ordered)})", f"validation {metric.name}", "latency", "size"):
        table.add_column(heading, justify="left" if heading.startswith("best") else "right")
    for point in (front.reference, *chosen):
        table.add_row(*_running_row(point, metric), style="yellow" if point is front.reference else None)
    return table


def _running_row(point: FrontPoint, metric: Metric) -> tuple[str, str, str, str]:
    latency = latency_of(point)
    return (
        point.id,
        quality_text(metric, point.quality.validation),
        "unknown" if latency is None else format_ms(latency),
        format_bytes(point.size_bytes),
    )


def _fact(key: str, value: object) -> str:
    words = key.replace("_", " ")
    if key in ("seconds_left", "time_left") and isinstance(value, int | float):
        return f"{format_duration(max(round(value), 0))} left"
    if isinstance(value, float):
        return f"{words} {value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(_fact(str(name), item) for name, item in value.items())
    return f"{words} {value}"
