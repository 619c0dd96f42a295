"""A run read back from its directory: its points, the choice among them, and the models they stand for.

Nothing here imports torch or a runtime until a point is loaded or run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from autocompress.errors import InfeasibleError, UsageError, nearest_names, unknown_name
from autocompress.plan import CompressionPlan, Front, FrontPoint, Metric
from autocompress.units import format_bytes, format_count, format_ms

if TYPE_CHECKING:
    import pandas as pd
    from onnxruntime import InferenceSession
    from torch import nn

FRONT_SCHEMA = 1

Preference = Literal["quality", "latency", "size", "balance"]

PREFERENCES: tuple[Preference, ...] = ("quality", "latency", "size", "balance")

_COSTS = ("latency_ms", "size_bytes", "peak_memory_bytes", "energy_mj", "macs")


@dataclass(frozen=True)
class Point:
    """One delivered model: its numbers, its plan and the way to run it.

    Attributes:
        info: the point as ``front.json`` holds it.
        path: the folder with ``model.onnx``, ``model.safetensors``, ``plan.json`` and ``metrics.json``.
        metric: what the quality is.
        reference: the original, measured the same way; None for a point that was loaded apart from its run.
    """

    info: FrontPoint
    path: Path
    metric: Metric
    reference: FrontPoint | None = None

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def plan(self) -> CompressionPlan:
        return self.info.plan

    @property
    def onnx_path(self) -> Path:
        """The artifact that was measured."""
        return self.path / PurePosixPath(self.info.artifact).name

    @property
    def validation(self) -> float:
        return self.info.quality.validation

    @property
    def split(self) -> Literal["test", "validation"]:
        """The split whose figures people are shown: the test split is scored for a finished search's models alone."""
        return "validation" if self.info.quality.test is None else "test"

    @property
    def shown(self) -> float:
        """The quality on ``split``."""
        return self.validation if self.info.quality.test is None else self.info.quality.test

    @property
    def shown_drop(self) -> float | None:
        """Points of quality lost against the original on ``split``; negative for a gain."""
        return self.drop if self.info.quality.test is None else self.test_drop

    @property
    def test(self) -> float:
        """NaN while the search runs, and where the model did not end on the front: the split was not scored then."""
        return math.nan if self.info.quality.test is None else self.info.quality.test

    @property
    def test_ci95(self) -> tuple[float, float]:
        """The 95% interval of ``test``; NaN likewise."""
        return self.info.quality.test_ci95 or (math.nan, math.nan)

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds of one run: as measured, else as predicted."""
        return latency_of(self.info)

    @property
    def size_bytes(self) -> int:
        return self.info.size_bytes

    @property
    def drop(self) -> float | None:
        """Points of validation quality lost against the original; negative for a gain."""
        return None if self.reference is None else drop_between(self.metric, self.reference, self.info, "validation")

    @property
    def test_drop(self) -> float | None:
        """Points of test quality lost against the original; negative for a gain."""
        if self.reference is None or self.info.quality.test is None:
            return None
        return drop_between(self.metric, self.reference, self.info, "test")

    @property
    def speedup(self) -> float | None:
        """How many times faster than the original."""
        ours = self.latency_ms
        theirs = None if self.reference is None else latency_of(self.reference)
        return theirs / ours if ours and theirs else None

    @property
    def shrink(self) -> float | None:
        """How many times smaller than the original."""
        return None if self.reference is None or not self.size_bytes else self.reference.size_bytes / self.size_bytes

    def cost(self, name: str) -> float | None:
        """A cost by its objective's name, such as ``latency_ms``; None where it is not known."""
        if name not in _COSTS:
            raise unknown_name("cost", name, _COSTS)
        value = self.latency_ms if name == "latency_ms" else getattr(self.info, name)
        return None if value is None else float(value)

    def objective(self, name: str) -> float | None:
        """An objective's value, minimised: a cost, or ``error``."""
        return error_of(self.metric, self.validation) if name == "error" else self.cost(name)

    def load(self) -> nn.Module:
        """The compressed model as a torch module, rebuilt from ``model.safetensors`` and ``plan.json``."""
        if self.info.checkpoint is None:
            raise UsageError(f"{self.id} has no checkpoint; its model.onnx is in {self.path}")
        from autocompress.export.checkpoint import load_compressed
        from autocompress.methods.simulation import build_compressed

        return build_compressed(load_compressed(self.path))

    def session(self, threads: int = 1) -> InferenceSession:
        """A plain onnxruntime session of the artifact."""
        from autocompress.runtime.onnxruntime import make_session

        return make_session(self.onnx_path, threads=threads)


@dataclass(frozen=True)
class LoadedFront:
    """The front of a run, complete or still running.

    >>> front = load_front("results/quickstart")  # doctest: +SKIP
    >>> front.best(max_latency_ms=0.2, max_drop=1.0).session()  # doctest: +SKIP
    """

    path: Path
    front: Front

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The points, most accurate first."""
        ordered = sorted(self.front.points, key=lambda p: (error_of(self.front.metric, p.quality.validation), p.id))
        return tuple(self._handle(info) for info in ordered)

    @cached_property
    def reference(self) -> Point:
        return self._handle(self.front.reference)

    @cached_property
    def baselines(self) -> tuple[Point, ...]:
        return tuple(self._handle(info) for info in self.front.baselines)

    def __len__(self) -> int:
        return len(self.front.points)

    def __getitem__(self, point_id: str) -> Point:
        known = {point.id: point for point in (*self.points, self.reference, *self.baselines)}
        if point_id not in known:
            raise unknown_name("point", point_id, known)
        return known[point_id]

    def best(
        self,
        *,
        max_latency_ms: float | None = None,
        max_size_mb: float | None = None,
        max_memory_mb: float | None = None,
        max_energy_mj: float | None = None,
        max_macs: float | None = None,
        max_drop: float | None = None,
        prefer: Preference | None = None,
        among: Sequence[Point] | None = None,
    ) -> Point:
        """The point to take under these budgets.

        Without ``prefer``, a budget on the drop asks for the point that keeps it with the largest :meth:`gain`, and
        any other for the most accurate one.  Budgets hold on measured costs, where the target was
        measured, else on the upper end of the prediction; the drop is in points of validation quality.

        ``among`` are other points to choose from than those of the front, such as
        :func:`autocompress.delivered.delivered_points`.  Nobody held them to the budgets of the run: these hold as
        well, each replaced by the one that is given for the same thing.

        Raises:
            InfeasibleError: where no point meets them all, with the nearest one.
        """
        limits = {
            "latency_ms": max_latency_ms,
            "size_bytes": None if max_size_mb is None else max_size_mb * 1e6,
            "peak_memory_bytes": None if max_memory_mb is None else max_memory_mb * 1e6,
            "energy_mj": max_energy_mj,
            "macs": max_macs,
            "drop": max_drop,
        }
        given = {name: float(limit) for name, limit in limits.items() if limit is not None}
        if prefer is not None and prefer not in PREFERENCES:
            raise unknown_name("preference", prefer, PREFERENCES)
        offered = self.points if among is None else among
        if among is not None:
            given = {**self.front.constraints, **given}
        if not offered:
            raise InfeasibleError(f"{self.path}: the front has no points yet")
        fitting = [point for point in offered if not _excess(point, given)]
        if not fitting:
            nearest = min(offered, key=lambda point: sum(_excess(point, given).values()))
            raise InfeasibleError(_nearest_message(nearest, given), nearest.info)
        wanted = prefer or ("balance" if max_drop is not None else "quality")
        shown = {point.id for point in self.points}
        return min(fitting, key=lambda point: (*self._rank(point, wanted), point.id not in shown, point.id))

    def gain(self, point: Point) -> float:
        """How far a point goes in speed and size together: 1 for each where no point of the front goes further.

        Each counts by its logarithm as a share of the front's best, so that a large gain in one cannot hide the
        lack of the other.
        """
        return _share(point.speedup, (p.speedup for p in self.points)) + _share(
            point.shrink, (p.shrink for p in self.points)
        )

    def _rank(self, point: Point, prefer: Preference) -> tuple[float, ...]:
        latency = math.inf if point.latency_ms is None else point.latency_ms
        error = error_of(point.metric, point.validation)
        return {
            "quality": (error, -self.gain(point)),
            "latency": (latency, point.size_bytes),
            "size": (point.size_bytes, latency),
            "balance": (-self.gain(point), error),
        }[prefer]

    def knee(self) -> Point:
        """The point of the best trade-off: nearest to the ideal corner once every objective spans 0 to 1.

        Costs count by their logarithm, so that halving is worth the same everywhere.
        """
        if not self.points:
            raise InfeasibleError(f"{self.path}: the front has no points yet")
        distance = dict.fromkeys((point.id for point in self.points), 0.0)
        for name in self.front.objectives:
            values = {point.id: point.objective(name) for point in self.points}
            if any(value is None for value in values.values()):
                continue
            scaled = {
                key: value if name == "error" else math.log(max(value, 1e-12))
                for key, value in values.items()
                if value is not None
            }
            low, high = min(scaled.values()), max(scaled.values())
            for key, value in scaled.items():
                distance[key] += ((value - low) / (high - low)) ** 2 if high > low else 0.0
        return min(self.points, key=lambda point: (distance[point.id], point.id))

    def to_frame(self) -> pd.DataFrame:
        """The points as a table, one row a point, indexed by id; the same columns as ``front.csv``."""
        return points_frame(self.points)

    def _handle(self, info: FrontPoint) -> Point:
        artifact = _inside(self.path, info.artifact)
        return Point(info, artifact.parent, self.front.metric, self.front.reference)


def load_front(run: str | Path) -> LoadedFront:
    """Reads the front of a run directory.

    Raises:
        UsageError: where there is no front, or not one that this version reads.
    """
    root = Path(run)
    if root.name == "front.json":
        root = root.parent
    path = root / "front.json"
    if not root.is_dir():
        near = sorted(p.parent.name for p in root.parent.glob("*/front.json")) if root.parent.is_dir() else []
        hint = f"; nearest: {str(root.parent / nearest_names(root.name, near)[0])!r}" if near else ""
        raise UsageError(f"no such run directory: {str(root)!r}{hint}")
    if not path.is_file():
        if (root / "config.yaml").is_file():
            raise UsageError(
                f"{str(root)!r} has no front yet: the run ended before its first model was delivered; "
                f"go on with: autocompress search --out {root} --resume"
            )
        raise UsageError(f"{str(root)!r} is not a run directory: it has no front.json")
    return LoadedFront(root, _parse_front(path))


def load_point(folder: str | Path) -> Point:
    """Reads one delivered model from its folder, ``RUN/models/ID``, or a copy of that folder.

    Raises:
        UsageError: where the folder holds no delivered model.
    """
    path = Path(folder)
    run = path.parent.parent
    if path.is_dir() and (run / "front.json").is_file():
        front = load_front(run)
        for point in (*front.points, front.reference, *front.baselines):
            if point.path.resolve() == path.resolve():
                return point
    metrics = path / "metrics.json"
    if not metrics.is_file():
        raise UsageError(f"{str(path)!r} holds no delivered model: it has no metrics.json; give RUN/models/ID")
    text = metrics.read_text(encoding="utf-8")
    if _is_export(text):
        raise UsageError(f"{str(path)!r} is an export, not a model of a search; read it with autocompress.load_export")
    try:
        info = FrontPoint.model_validate_json(text)
    except ValidationError as error:
        raise UsageError(f"{metrics}: {_first_problem(error)}") from error
    return Point(info, path, Metric())


# ------------------------------------------------------------------------------------------------- single numbers


def latency_of(info: FrontPoint) -> float | None:
    """Milliseconds as measured, else as predicted."""
    return info.latency_ms.predicted if info.latency_ms.measured is None else info.latency_ms.measured


def error_of(metric: Metric, quality: float) -> float:
    """The quality as something to minimise: ``1 - accuracy`` for a fraction."""
    if not metric.higher_is_better:
        return quality
    return 1.0 - quality if metric.unit == "fraction" else -quality


def drop_between(
    metric: Metric, reference: FrontPoint, info: FrontPoint, split: Literal["validation", "test"]
) -> float:
    """What ``info`` loses against ``reference``: percentage points for a fraction, else the metric's own unit."""
    lost = error_of(metric, getattr(info.quality, split)) - error_of(metric, getattr(reference.quality, split))
    # A loss of exactly two points keeps a budget of two: the difference of two fractions has digits of its own.
    return round(lost * points_per_unit(metric), 9)


def points_per_unit(metric: Metric) -> float:
    """100 where the metric is a fraction that people read in points, else 1."""
    return 100.0 if metric.unit == "fraction" else 1.0


def points_frame(points: Iterable[Point]) -> pd.DataFrame:
    """A table of points, one row each, indexed by id, in the units of ``front.json``."""
    import pandas as pd

    rows = [
        {
            "id": point.id,
            "validation": point.validation,
            "test": point.test,
            "test_low": point.test_ci95[0],
            "test_high": point.test_ci95[1],
            "drop": point.drop,
            "test_drop": point.test_drop,
            "latency_ms": point.latency_ms,
            "latency_ms_p95": point.info.latency_ms.measured_p95,
            "latency_ms_predicted": point.info.latency_ms.predicted,
            "speedup": point.speedup,
            "size_bytes": point.size_bytes,
            "shrink": point.shrink,
            "params": point.info.params,
            "macs": point.info.macs,
            "peak_memory_bytes": point.info.peak_memory_bytes,
            "energy_mj": point.info.energy_mj,
            "int8_kernels": point.info.kernels.get("int8"),
            "fp32_kernels": point.info.kernels.get("fp32"),
            "runtime_agreement": point.info.runtime_agreement,
            "feasible": point.info.feasible,
            "artifact": point.info.artifact,
        }
        for point in points
    ]
    return pd.DataFrame(rows).set_index("id") if rows else pd.DataFrame(index=pd.Index([], name="id"))


# --------------------------------------------------------------------------------------------------------- helpers


def _share(ratio: float | None, every: Iterable[float | None]) -> float:
    """``log ratio`` as a share of the largest: 1 for the best, negative where the original is better."""
    best = max((math.log(other) for other in every if other), default=0.0)
    return math.log(ratio) / best if ratio and best > 0 else 0.0


def _held(point: Point, name: str) -> float | None:
    """The value a budget is held against: for a predicted latency, the upper end of its band."""
    if name == "drop":
        return point.drop
    latency = point.info.latency_ms
    if name == "latency_ms" and latency.measured is None and latency.error_band is not None:
        return latency.error_band[1]
    return point.cost(name)


def _excess(point: Point, limits: Mapping[str, float]) -> dict[str, float]:
    """By how much, relative to the limit, each budget is broken; an unknown cost breaks its budget."""
    found: dict[str, float] = {}
    for name, limit in limits.items():
        value = _held(point, name)
        if value is None:
            found[name] = math.inf
        elif value > limit + 1e-9:
            found[name] = (value - limit) / max(abs(limit), 0.1 if name == "drop" else 1e-12)
    return found


_WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency_ms": ("latency", format_ms),
    "size_bytes": ("size", format_bytes),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "energy_mj": ("energy", lambda value: f"{value:.3g} mJ"),
    "macs": ("MACs", format_count),
    "drop": ("drop", lambda value: f"{value:.2f} points"),
}


def budget_text(name: str, value: float | None) -> str:
    """A budget or a cost in words: ``latency 4.06 ms``."""
    word, spell = _WORDS[name]
    return f"{word} unknown" if value is None else f"{word} {spell(value)}"


def _nearest_message(nearest: Point, limits: Mapping[str, float]) -> str:
    asked = ", ".join(budget_text(name, limit) for name, limit in limits.items())
    found = ", ".join(budget_text(name, _held(nearest, name)) for name in limits)
    return f"no point meets {asked}; the nearest is {nearest.id} with {found}"


def _inside(root: Path, relative: str) -> Path:
    """A path of ``front.json``, which may not lead out of the run."""
    path = root / PurePosixPath(relative)
    if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
        raise UsageError(f"{root / 'front.json'}: path {relative!r} leads out of the run directory")
    return path


def _parse_front(path: Path) -> Front:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON: {error}") from error
    schema = stored.get("schema") if isinstance(stored, dict) else None
    if schema != FRONT_SCHEMA:
        raise UsageError(f"{path}: schema {schema!r} is not one this version reads ({FRONT_SCHEMA})")
    try:
        front = Front.model_validate(stored)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_problem(error)}") from error
    for info in (front.reference, *front.baselines, *front.points):
        _inside(path.parent, info.artifact)
    return front


def _is_export(metrics: str) -> bool:
    try:
        stored = json.loads(metrics)
    except ValueError:
        return False
    return isinstance(stored, dict) and stored.get("kind") == "export"


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}" if where else first["msg"]
