"""Every model that a run delivered, whether it is on the front or not: other budgets may want another one.

A model leaves the front, or never gets there, by the run's own budgets and objectives.  Its files stay under ``.work``
for as long as that folder is kept.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from pydantic import ValidationError

from autocompress.errors import UsageError
from autocompress.front import LoadedFront, Point
from autocompress.plan import FrontPoint

FILES = ("model.onnx", "model.safetensors", "plan.json")


def delivered_points(front: LoadedFront) -> tuple[Point, ...]:
    """The points of a front, then the other models of its run whose files are still there, most accurate first."""
    shown = {point.id for point in (front.reference, *front.baselines, *front.points)}
    others = []
    for path in sorted((front.path / ".work" / "models").glob("*/metrics.json")):
        if (
            path.parent.name in shown
            or path.parent.suffix == ".part"
            or not all((path.parent / name).is_file() for name in FILES)
        ):
            continue
        try:
            info = FrontPoint.model_validate(json.loads(path.read_text(encoding="utf-8"))["point"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            continue
        if info.latency_ms.measured is not None or not front.front.verified:
            others.append(Point(info, path.parent, front.front.metric, front.front.reference))
    others.sort(key=lambda point: (point.objective("error"), point.id))
    return (*front.points, *others)


def why_not_on_the_front(front: LoadedFront, point: Point) -> str | None:
    """Why a delivered model is not on the front; None for one that is."""
    if any(point.id == other.id for other in front.points):
        return None
    try:
        with (front.path / "rejected.csv").open(encoding="utf-8", newline="") as file:
            reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    except (OSError, KeyError, csv.Error):
        reasons = {}
    return reasons.get(point.id, "not on the front")


def copy_model(point: Point, target: Path) -> Path:
    """Copies a model's files to a new or empty folder, as ``RUN/models/ID`` holds them.

    Raises:
        UsageError: the folder is used, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"--copy-to: {str(target)!r} exists and is not empty; choose a new folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (point.path / name).is_file():
                shutil.copy2(point.path / name, target / name)
        (target / "metrics.json").write_text(point.info.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--copy-to: cannot copy {point.path} to {target}: {error}") from error
    return target
