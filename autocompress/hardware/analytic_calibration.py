"""Corrects an analytic profile with a few measurements of the user's own, made on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError
from scipy.optimize import nnls

from autocompress.errors import UsageError
from autocompress.hardware.analytic_profile import AnalyticProfile, UserMeasurement
from autocompress.hardware.profile import HardwareProfile
from autocompress.plan import Estimate

LEAST = 2
"""Measurements that two unknowns need."""

_LEAST_BAND = 0.1
_NOISE = 0.03
_APART = 0.5
"""How far the two scales are expected to lie apart: one measurement alone moves both alike."""

Predict = Callable[[Path, HardwareProfile], Estimate]


def read_measurements(path: Path) -> list[UserMeasurement]:
    """Reads ``[{model: path.onnx, latency_ms: x}, ...]``; a model's path is taken from the file's folder.

    Raises:
        UsageError: what is wrong with the file and how it should look.
    """
    form = "expected a list of {model: path.onnx, latency_ms: x}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"measurements {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"measurements {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list):
        raise UsageError(f"measurements {path}: {form}, found {type(content).__name__}")
    found = []
    for number, entry in enumerate(content, start=1):
        try:
            measurement = UserMeasurement.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"measurements {path}: entry {number}: {field}: {first['msg']}; {form}") from error
        model = path.parent / measurement.model
        if not model.is_file():
            raise UsageError(f"measurements {path}: entry {number}: no such file: {str(model)!r}")
        found.append(measurement.model_copy(update={"model": str(model)}))
    return found


def calibrate_profile(
    profile: HardwareProfile, measurements: Sequence[UserMeasurement], predict: Predict
) -> AnalyticProfile:
    """Rescales an analytic profile to measurements on the device.

    Two factors are fitted, both non-negative: one for computation and memory, one for the overheads of kernels and
    runs.  The error band becomes twice the error on measurements left out of the fit in turn; two measurements can do
    no more than halve it.

    Args:
        profile: of the device, for the threads and batch the measurements were made with.
        measurements: two or more, best of a small and a large model.
        predict: the latency of an ONNX file on a profile: ``predict.predict_onnx``.

    Returns:
        The profile with its new scales; it stays ``validated: false`` and lists what it was calibrated on.

    Raises:
        UsageError: the profile is a fitted one, or there are fewer than two measurements.
    """
    if not isinstance(profile, AnalyticProfile):
        raise UsageError(
            f"hardware profile {profile.name} was measured on its device: measure again with 'autocompress profile' "
            "rather than calibrating it"
        )
    if len(measurements) < LEAST:
        raise UsageError(
            f"{len(measurements)} measurements cannot tell computation from overhead; give at least {LEAST}, best of a "
            "small and a large model"
        )
    plain = profile.model_copy(update={"scale_compute": 1.0, "scale_overhead": 1.0})
    free = plain.model_copy(update={"scale_overhead": 0.0})
    whole = _latencies(plain, measurements, predict)
    work = _latencies(free, measurements, predict)
    parts = np.column_stack([work, np.maximum(whole - work, 0.0)])
    measured = np.array([m.latency_ms for m in measurements])
    compute, overhead = _fit(parts, measured)
    errors = []
    for left_out in range(len(measured)):
        rest = np.arange(len(measured)) != left_out
        predicted = float(parts[left_out] @ _fit(parts[rest], measured[rest]))
        # A factor either way, as the band is one.
        errors.append(max(predicted / measured[left_out], measured[left_out] / max(predicted, 1e-9)) - 1.0)
    band = max(2.0 * float(np.sqrt(np.mean(np.square(errors)))), _LEAST_BAND)
    if len(measured) == LEAST:
        band = max(band, profile.error_band / 2)
    return profile.model_copy(
        update={
            "scale_compute": float(f"{compute:.4g}"),
            "scale_overhead": float(f"{overhead:.4g}"),
            "error_band": round(min(band, 10.0), 3),
            "calibrated_on": tuple(m.model_copy(update={"model": Path(m.model).name}) for m in measurements),
            "sources": {
                **profile.sources,
                "scale_compute": f"fitted to {len(measured)} measurements of the user's own",
                "scale_overhead": f"fitted to {len(measured)} measurements of the user's own",
                "error_band": "twice the error on measurements left out in turn",
            },
        }
    )


def _latencies(profile: AnalyticProfile, measurements: Sequence[UserMeasurement], predict: Predict) -> np.ndarray:
    return np.array([predict(Path(m.model), profile).costs["latency_ms"].value for m in measurements])


def _fit(parts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Scales of computation and overhead: relative errors, and a weak wish that the two be alike."""
    level = float(np.median(measured / parts.sum(axis=1)))
    rows = np.vstack([parts / measured[:, None] / _NOISE, np.array([[1.0, -1.0]]) / (_APART * level)])
    solution: np.ndarray = nnls(rows, np.append(np.full(len(measured), 1.0 / _NOISE), 0.0))[0]
    return solution
