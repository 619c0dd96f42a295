"""``ladder.csv``: how each structure was judged before recovery and after each rung, to compare the judgements."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

from autocompress.search.files import write_text

NAME = "ladder.csv"


@dataclass(frozen=True)
class RungRow:
    """One structure at one rung.

    Attributes:
        id: of the structure; the same at every rung.
        rung: 1 for its first, short training, one more for each longer one.
        base: what it starts from: ``original``, ``student``, or ``fresh``.
        macs: multiply-accumulates of one sample.
        latency_ms: predicted, in the fastest formats it may be delivered in.
        divergence: KL from the original as stitched, in nats; None where nothing could be stitched.
        forecast_error: expected on the validation split after recovery, when it was chosen; None likewise.
        error: on the validation split after this rung, one minus an accuracy; None where the recovery failed.
        steps: of training so far, rungs added up.
        seconds: they took.
        alpha: of the recipe, as are ``temperature``, ``feature_weight`` and ``learning_rate``.
        qat: whether 4-bit weights were trained with their rounding simulated.
        failure: why the recovery failed.
    """

    id: str
    rung: int
    base: str
    macs: int
    latency_ms: float | None
    divergence: float | None
    forecast_error: float | None
    error: float | None
    steps: int
    seconds: float
    alpha: float
    temperature: float
    feature_weight: float
    learning_rate: float
    qat: bool = False
    failure: str = ""


class RungLog:
    """The rows of a run; what an interrupted run wrote stays.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / NAME
        self._rows: list[dict[str, str]] = []
        if self._path.is_file():
            self._rows = list(csv.DictReader(io.StringIO(self._path.read_text(encoding="utf-8"))))

    def add(self, row: RungRow) -> None:
        """Adds a row and writes the file anew."""
        values = {name: "" if value is None else str(value) for name, value in dataclasses.asdict(row).items()}
        self._rows.append(values)
        self.write()

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        text = io.StringIO()
        names = [field.name for field in dataclasses.fields(RungRow)]
        writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, text.getvalue())
