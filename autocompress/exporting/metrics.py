"""``metrics.json`` of an export: what was measured on the very files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from autocompress.errors import UsageError
from autocompress.methods.calibration_report import CalibrationReport
from autocompress.plan import Metric, Value

SCHEMA = 1
METRICS = "metrics.json"
ARTIFACT = "model.onnx"
ORIGINAL = "original.onnx"
ARCHIVE = "model.acz"


class Origin(Value):
    """How to get a model and its data again: what was given to ``--task``, as MODEL, and so on."""

    model: str
    task: str | None = None
    weights: str | None = None
    data: str | None = None


class Comparison(Value):
    """Two models on the same inputs.

    Attributes:
        samples: how many, of the data called ``data``.
        top1_agreement: share of them with the same largest output; None where an output is no row of scores.
        signal_to_noise_db: ``10 log10(sum a^2 / sum (a - b)^2)`` of the worst output; None where nothing differs.
    """

    data: str
    samples: int
    top1_agreement: float | None
    signal_to_noise_db: float | None


class SplitQuality(Value):
    """The metric on one split; ``drop`` is the original's minus the export's, paired over the samples."""

    samples: int
    original: float
    export: float
    export_ci95: tuple[float, float]
    drop: float
    drop_ci95: tuple[float, float]


class Timing(Value):
    """Milliseconds of one run; ``low`` and ``high`` bound the median at 95%."""

    median: float
    p95: float
    low: float
    high: float


class Timings(Value):
    """Latency of the fp32 original and of the export, timed in turn."""

    original: Timing
    export: Timing


class Sizes(Value):
    """Bytes of ``original.onnx``, of ``model.onnx``, and of ``model.acz`` where there is one."""

    original: int
    export: int
    archive: int | None = None


class Calibration(Value):
    """What was asked for, and what calibration ``chose``; None where nothing was quantized."""

    samples: int
    ranges: str
    equalize: str
    bias_correction: bool
    seed: int
    chose: CalibrationReport | None = None


class Environment(Value):
    """Where it was measured."""

    python: str
    system: str
    cpu: str
    date: str
    packages: dict[str, str]


class ExportMetrics(Value):
    """Everything that is known of an export.

    Attributes:
        kind: tells the file from a search's ``metrics.json``.
        name: the model's.
        label: what was asked for: a compute type, or ``plan``.
        origin: how to get model and data again; None for an export of objects from Python.
        quality: by split; empty where there are no labels.
        outputs: the original against the export, both as files.
        simulation: the export against its torch simulation.
        latency_ms: interleaved, at ``threads``, batch 1.
        size_bytes: of the files.
        kernels: what the runtime executed, counted in its own optimized graph.
        layers: how many compute in each type.
        float_layers: those that stay in float32 though another type was asked for, with the reason.
        digests: SHA-256 of the files beside this one.
    """

    version: int = Field(default=SCHEMA, alias="schema")
    kind: Literal["export"] = "export"
    name: str
    label: str
    origin: Origin | None
    metric: Metric
    quality: dict[str, SplitQuality]
    outputs: Comparison
    simulation: Comparison
    latency_ms: Timings
    threads: int
    size_bytes: Sizes
    kernels: dict[str, int]
    layers: dict[str, int]
    float_layers: dict[str, str]
    calibration: Calibration
    environment: Environment
    digests: dict[str, str]

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)

    @property
    def speedup(self) -> float:
        """How many times faster than the original."""
        return self.latency_ms.original.median / self.latency_ms.export.median

    @property
    def shrink(self) -> float:
        """How many times smaller than the original."""
        return self.size_bytes.original / self.size_bytes.export


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export, rather than a search's model or anything else."""
    try:
        stored = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("kind") == "export"


def read_metrics(folder: Path) -> ExportMetrics:
    """The metrics of an export.

    Raises:
        UsageError: the folder holds none, or of another version.
    """
    path = folder / METRICS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(folder)!r} holds no export: {error}") from error
    if not isinstance(stored, dict) or stored.get("kind") != "export":
        raise UsageError(f"{path} is not of an export; of a search's model, use load_point")
    if stored.get("schema") != SCHEMA:
        raise UsageError(f"{path}: schema {stored.get('schema')!r} is not one this version reads ({SCHEMA})")
    try:
        return ExportMetrics.model_validate(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
