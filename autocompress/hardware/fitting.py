"""Fits kernel costs to profiled models: one non-negative least squares over kernels and whole runs together.

A profiler's timestamps cost about as much as a small kernel takes, so kernel times alone overrate a network of small
kernels threefold.  Here each profiled kernel is its cost plus the cost of timing it, and each whole run, timed without
the profiler, is the sum of its kernels' costs plus a constant; both kinds of rows are solved for together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau, spearmanr
from threadpoolctl import threadpool_limits

from autocompress.hardware.kernels import FAMILIES, FEATURES, KINDS, MEMORY, Work, cold_megabytes, cost_us, feature_row
from autocompress.hardware.profile import EndToEnd, HoldOut, KernelCost
from autocompress.hardware.reading import TimedKernel

CACHES_MB = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""How much of a model's weights may stay cached between two runs; the level that matters shows only in the times."""

_FAMILY_COLUMNS = tuple(family for family in FAMILIES if family != MEMORY)
_PRIOR_NOISE = 0.25
_PRIOR_NOISE_US = 1.0
_TIMING_SPREAD_US = 0.3
_PER_RUN_US = 5.0


@dataclass(frozen=True)
class Noise:
    """How far a runtime's profile can be believed.

    Attributes:
        timing_us: what timing one kernel costs, roughly; a family's own value is fitted around it.
        kernel: the relative error of a kernel's time.
        kernel_us: its error in microseconds.
        run: the relative error of a whole run's time.
    """

    timing_us: float = 2.0
    kernel: float = 0.08
    kernel_us: float = 0.25
    run: float = 0.015


ONNXRUNTIME = Noise()
"""Timestamps around every kernel of undisturbed runs."""

OPENVINO = Noise(timing_us=0.0, kernel=0.2, kernel_us=0.5, run=0.01)
"""Whole microseconds, and means that disturbed runs are part of."""


@dataclass(frozen=True)
class MeasuredModel:
    """One model, profiled and timed."""

    kernels: Sequence[TimedKernel]
    latency_us: float

    @property
    def weight_bytes(self) -> float:
        """All weights of the model, as its kernels store them."""
        return float(sum(kernel.work.weight_bytes for kernel in self.kernels))


@dataclass(frozen=True)
class PriorKernel:
    """What a kernel is taken to cost as long as nothing else is known."""

    kind: str
    work: Work
    microseconds: float


@dataclass(frozen=True)
class Fit:
    """Kernel costs, and how a run follows from them; ``timing_us`` is what timing a kernel of each class took."""

    kernels: dict[str, KernelCost]
    end_to_end: EndToEnd
    residual: float
    timing_us: dict[str, float]

    def latency_us(self, model: MeasuredModel) -> float:
        """What the fit predicts for a model whose kernels are known."""
        known = [k for k in model.kernels if k.kind in self.kernels]
        total = sum(float(cost_us(self.kernels[k.kind].coefficients, k.work)) for k in known)
        cold = float(cold_megabytes(model.weight_bytes, self.end_to_end.cache_mb))
        return self.end_to_end.per_run_us + self.end_to_end.per_cold_mb_us * cold + total


def fit_kernels(
    models: Sequence[MeasuredModel],
    cache_mb: float | None = None,
    priors: Sequence[PriorKernel] = (),
    noise: Noise = ONNXRUNTIME,
) -> Fit:
    """Solves for the coefficients of every kernel class that occurs, all of them non-negative.

    Args:
        models: what was measured.
        cache_mb: models whose weights outgrow this pay for them; where none is given, the one of ``CACHES_MB`` that
            fits best.
        priors: costs known from elsewhere, which count less than what was measured.
        noise: what the times are worth; the default is that of ONNX Runtime's profiler.
    """
    if cache_mb is None:
        return min((fit_kernels(models, cache, priors, noise) for cache in CACHES_MB), key=lambda fit: fit.residual)
    kinds = sorted({k.kind for model in models for k in model.kernels} | {prior.kind for prior in priors})
    width = len(FEATURES)
    place = {kind: index * width for index, kind in enumerate(kinds)}
    timing = len(kinds) * width
    columns = timing + len(_FAMILY_COLUMNS) + 2
    rows: list[np.ndarray] = []
    targets: list[float] = []

    def append(row: np.ndarray, target: float, sigma: float) -> None:
        rows.append(row / sigma)
        targets.append(target / sigma)

    for model in models:
        total = np.zeros(columns)
        weights = model.weight_bytes
        cold = float(cold_megabytes(weights, cache_mb))
        for kernel in model.kernels:
            row = np.zeros(columns)
            start = place[kernel.kind]
            row[start : start + width] = feature_row(kernel.work)
            total += row
            row[-2] = cold * float(kernel.work.weight_bytes) / weights if weights else 0.0
            row[timing + _FAMILY_COLUMNS.index(KINDS[kernel.kind])] = 1.0
            net = max(kernel.microseconds - noise.timing_us, noise.kernel_us)
            append(row, kernel.microseconds, noise.kernel * net + noise.kernel_us)
        total[-2], total[-1] = cold, 1.0
        append(total, model.latency_us, noise.run * model.latency_us)
    for prior in priors:
        row = np.zeros(columns)
        row[place[prior.kind] : place[prior.kind] + width] = feature_row(prior.work)
        append(row, prior.microseconds, _PRIOR_NOISE * prior.microseconds + _PRIOR_NOISE_US)
    for family in range(len(_FAMILY_COLUMNS)):
        row = np.zeros(columns)
        row[timing + family] = 1.0
        append(row, noise.timing_us, _TIMING_SPREAD_US)
    row = np.zeros(columns)
    row[-1] = 1.0
    append(row, _PER_RUN_US, _PER_RUN_US)

    solution, residual = non_negative(np.array(rows), np.array(targets))
    kernels = {}
    for kind in kinds:
        cost = KernelCost.of([float(c) for c in solution[place[kind] : place[kind] + width]])
        overhead = float(solution[timing + _FAMILY_COLUMNS.index(KINDS[kind])])
        errors = [
            abs(float(cost_us(cost.coefficients, k.work)) + overhead - k.microseconds) / k.microseconds
            for m in models
            for k in m.kernels
            if k.kind == kind
        ]
        mape = round(float(np.mean(errors)), 4) if errors else 0.0
        kernels[kind] = cost.model_copy(update={"samples": len(errors), "mape": mape})
    end = EndToEnd(
        per_run_us=float(f"{solution[-1]:.5g}"),
        per_cold_mb_us=float(f"{solution[-2]:.5g}"),
        cache_mb=round(cache_mb, 4),
    )
    overheads = {kind: float(solution[timing + _FAMILY_COLUMNS.index(KINDS[kind])]) for kind in kinds}
    return Fit(kernels, end, residual, overheads)


def non_negative(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """Non-negative least squares of many rows; returns the solution and the norm of what is left.

    Unused columns are left out and the rows reduced to a triangle first, which makes it tens of times faster.
    """
    scale = np.abs(left).max(axis=0)
    used = scale > 0
    # Matrices this small lose more by waiting for other threads than they gain, tenfold beside any other work.
    with threadpool_limits(1, user_api="blas"):
        triangle: np.ndarray = np.asarray(np.linalg.qr(np.column_stack([left[:, used] / scale[used], right]), mode="r"))
        solved, residual = nnls(triangle[:, :-1], triangle[:, -1], maxiter=100 * int(used.sum()))
    solution = np.zeros(left.shape[1])
    solution[used] = solved / scale[used]
    return solution, float(residual)


def hold_out(
    models: Sequence[MeasuredModel],
    cache_mb: float | None = None,
    folds: int = 10,
    noise: Noise = ONNXRUNTIME,
) -> HoldOut:
    """Errors on models left out of the fit in turn: the kernels of each are known, their costs are not."""
    measured = np.array([model.latency_us for model in models])
    predicted = np.zeros(len(models))
    for fold in range(folds):
        fit = fit_kernels([model for index, model in enumerate(models) if index % folds != fold], cache_mb, noise=noise)
        for index in range(fold, len(models), folds):
            predicted[index] = fit.latency_us(models[index])
    return errors_of(predicted, measured)


def errors_of(predicted: np.ndarray, measured: np.ndarray) -> HoldOut:
    """Mean and largest relative error, and rank agreement."""
    errors = np.abs(predicted / measured - 1.0)
    tau = float(kendalltau(predicted, measured).statistic) if len(measured) > 1 else 1.0
    rho = float(spearmanr(predicted, measured).statistic) if len(measured) > 1 else 1.0
    return HoldOut(
        models=len(measured),
        mape=round(float(errors.mean()), 4),
        max=round(float(errors.max()), 4),
        kendall_tau=round(0.0 if np.isnan(tau) else tau, 4),
        spearman=round(0.0 if np.isnan(rho) else rho, 4),
    )
