"""Corrections fitted end to end: from sums of kernel times to the latency and size of whole artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import lsq_linear

from autocompress.hardware.kernels import FAMILIES, MEMORY
from autocompress.plan import CompressionPlan

if TYPE_CHECKING:
    from autocompress.hardware.reading import TimedKernel

SIZE_COUNTS = ("file", "int8_layers", "int8_tensors", "packed_layers", "int4_layers")
"""What the bytes of an artifact beside its stored numbers depend on: names, nodes, scales."""

DEFAULT_SIZE_COEFFICIENTS = (1200.0, 110.0, 70.0, 80.0, 30.0)

_SCALE_SPREAD = {family: 0.2 for family in FAMILIES} | {MEMORY: 0.6}
"""How far from the profile's a family's scale is expected to lie for one model: the strength of the ridge.  What a
cache keeps depends on the machine's other work too, so there the profile says least."""

_PER_KERNEL_SPREAD_US = 0.5
_PER_RUN_SPREAD_US = 10.0
_NOISE = 0.05
"""What the kernels' costs miss of a whole model, as a fraction: nearer than this no observation is followed."""


class Observation(NamedTuple):
    """A plan that was exported and measured: milliseconds, bytes of the file, and its kernels where it was profiled."""

    plan: CompressionPlan
    latency_ms: float
    size_bytes: float
    kernels: Sequence[TimedKernel] = ()


@dataclass(frozen=True)
class Calibration:
    """Scales by family, a correction a kernel, a constant a run; the same for the size.

    Attributes:
        band: half the width of the error band on latency, as a fraction.
        size_band: the same for the size.
        errors: relative errors of the latency at the observations, each left out in turn.
        observations: how many artifacts were measured.
    """

    scales: tuple[float, ...] = (1.0,) * len(FAMILIES)
    per_kernel_us: float = 0.0
    per_run_us: float = 0.0
    size_coefficients: tuple[float, ...] = DEFAULT_SIZE_COEFFICIENTS
    band: float = 0.15
    size_band: float = 0.1
    errors: tuple[float, ...] = ()
    observations: int = 0


def fit_latency(
    family_us: np.ndarray, kernels: np.ndarray, latency_us: np.ndarray, prior: Calibration, trust: float = 1.0
) -> tuple[tuple[float, ...], float, float]:
    """Least squares on relative errors, drawn towards the prior; scales stay non-negative.

    Args:
        family_us: ``[models, families]`` summed kernel times.
        kernels: ``[models]`` numbers of kernels.
        latency_us: ``[models]`` measured.
        prior: what holds as long as the observations say nothing else.
        trust: how many times nearer than a device profile alone the kernel times come.

    Returns:
        The scales, microseconds a kernel, microseconds a run.
    """
    columns = np.column_stack([family_us, kernels, np.ones(len(kernels))])
    rows = columns / latency_us[:, None] / (_NOISE / trust)
    centre = np.array([*prior.scales, prior.per_kernel_us, prior.per_run_us])
    families = family_us.shape[1]
    width = np.array([*(s / trust for s in _SCALE_SPREAD.values()), _PER_KERNEL_SPREAD_US, _PER_RUN_SPREAD_US])
    left = np.vstack([rows, np.diag(1.0 / width)])
    right = np.concatenate([np.full(len(kernels), trust / _NOISE), centre / width])
    low = np.array([0.0] * families + [-np.inf, -np.inf])
    solution = lsq_linear(left, right, bounds=(low, np.full(len(centre), np.inf))).x
    return tuple(float(s) for s in solution[:families]), float(solution[-2]), float(solution[-1])


def fit_size(
    payload: np.ndarray, counts: np.ndarray, size_bytes: np.ndarray, prior: tuple[float, ...]
) -> tuple[float, ...]:
    """Bytes a file, a layer and a tensor beside the stored numbers; non-negative, drawn towards the prior."""
    centre = np.array(prior)
    left = np.vstack([counts / size_bytes[:, None] / 0.002, np.diag(1.0 / (centre + 1.0))])
    right = np.concatenate([(size_bytes - payload) / size_bytes / 0.002, centre / (centre + 1.0)])
    return tuple(float(c) for c in lsq_linear(left, right, bounds=(0.0, np.inf)).x)


def spread_of(errors: Sequence[float], otherwise: float) -> float:
    """Half the width of a band that holds about 95% of such errors."""
    return 2.0 * float(np.sqrt(np.mean(np.square(errors)))) if len(errors) else otherwise
