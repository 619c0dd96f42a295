"""What a search had delivered when: its models scored on test and timed again, in plain sessions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from autocompress.front import load_front
from autocompress.hardware.profile import cpu_description
from autocompress.pareto import hypervolume
from autocompress.runtime.session import make_session
from autocompress.runtime.timing import measure_latency
from autocompress.search.scoring import DROP_SPAN, SHRINK_SPAN, SPEED_SPAN
from autocompress.tasks import load_task
from autocompress.tasks.splits import TensorSplit

TASK = "fashion-mnist"
TIMED_S = 0.4
BATCH = 250
ORIGINAL = "original"


@dataclass(frozen=True)
class Scored:
    """A delivered file: share of right answers on validation and on test, median milliseconds, bytes."""

    validation: float
    test: float
    latency_ms: float
    size_bytes: int


def curve(model: str, run: Path, fronts: Sequence[tuple[float, list[str]]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(one row for each front a run published, one row for each model of its last front).

    Args:
        model: the network's name.
        run: the run directory, whose ``.work/models`` holds every model that was ever delivered.
        fronts: (seconds, ids of the models) as they were published.
    """
    task = load_task(TASK, model)
    names = list(dict.fromkeys([ORIGINAL, *(name for _, ids in fronts for name in ids)]))
    files = {name: run / ".work" / "models" / name / "model.onnx" for name in names}
    times = measure_latency(files, seconds_each=TIMED_S)
    found = {
        name: Scored(
            accuracy(path, task.split("validation")), accuracy(path, task.split("test")), times[name].median_ms,
            path.stat().st_size,
        )
        for name, path in files.items()
    }  # fmt: skip
    trials = load_front(run).front.search.trials
    rows = [
        {
            "seconds": round(seconds, 1),
            "hypervolume": round(volume([found[i] for i in ids], found[ORIGINAL], "test"), 4),
            "validation_hypervolume": round(volume([found[i] for i in ids], found[ORIGINAL], "validation"), 4),
            "points": len(ids),
        }
        for seconds, ids in fronts
    ]
    facts = {
        "trials": trials,
        "delivered": len(names) - 1,
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    return pd.DataFrame(rows).assign(**facts), _front(fronts[-1][1], found)


def machine() -> str:
    """The processor that the figures are of."""
    return ", ".join(part.strip() for part in cpu_description().split(",")[:3])


def volume(front: Sequence[Scored], original: Scored, split: str) -> float:
    """The share of the box that a front dominates, its quality taken from one split."""
    boxes = [
        [
            100.0 * max(0.0, getattr(original, split) - getattr(point, split)) / DROP_SPAN,
            1.0 - min(math.log2(original.latency_ms / point.latency_ms) / SPEED_SPAN, 1.0),
            1.0 - min(math.log2(original.size_bytes / point.size_bytes) / SHRINK_SPAN, 1.0),
        ]
        for point in front
    ]
    return hypervolume(np.array(boxes).reshape(-1, 3), [1.0, 1.0, 1.0])


def accuracy(path: Path, split: TensorSplit) -> float:
    """The share of a split that a file classifies rightly."""
    session = make_session(path, 2)
    name = session.get_inputs()[0].name
    right = 0
    for start in range(0, len(split), BATCH):
        batch = split.batch(slice(start, start + BATCH))
        outputs = torch.from_numpy(session.run(None, {name: batch.inputs[0].numpy()})[0])
        right += int((outputs.argmax(1) == batch.target).sum())
    return right / len(split)


def _front(ids: Sequence[str], found: dict[str, Scored]) -> pd.DataFrame:
    original = found[ORIGINAL]
    rows = [
        {
            "id": name,
            "test": found[name].test,
            "points_lost": 100.0 * (original.test - found[name].test),
            "validation_points_lost": 100.0 * (original.validation - found[name].validation),
            "speedup": original.latency_ms / found[name].latency_ms,
            "shrink": original.size_bytes / found[name].size_bytes,
        }
        for name in ids
    ]
    return pd.DataFrame(rows).round(4)
