"""Files of a run: written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a text file by renaming a complete one into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Clock:
    """Time spent on a run, those before an interruption included, against the budget of its present leg.

    Args:
        path: where the time spent is kept.
        budget_s: seconds allowed; None for no limit.
        began_s: seconds spent when the leg began.
        leg: 1, and one more each time that a finished run is given more.
    """

    def __init__(self, path: Path, budget_s: float | None, began_s: float = 0.0, leg: int = 1) -> None:
        self.path, self.budget_s, self.began_s, self.leg = path, budget_s, began_s, leg
        self._before = float(read_json(path) or 0.0)
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        return self._before + time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds to the end of the budget; infinite without one."""
        return float("inf") if self.budget_s is None else self.began_s + self.budget_s - self.spent

    def save(self) -> None:
        write_text(self.path, json.dumps(self.spent))
