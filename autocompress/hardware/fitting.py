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
from scipy.stats import kendalltau

from autocompress.hardware.kernels import FAMILIES, FEATURES, KINDS, cost_us, feature_row
from autocompress.hardware.profile import EndToEnd, HoldOut, KernelCost
from autocompress.hardware.reading import TimedKernel

_KERNEL_NOISE = 0.08
_KERNEL_NOISE_US = 0.25
_RUN_NOISE = 0.015
_TIMING_US = 2.0
"""What timing one kernel costs, roughly; a family's own value is fitted around it."""

_TIMING_SPREAD_US = 0.3
_PER_RUN_US = 5.0


@dataclass(frozen=True)
class MeasuredModel:
    """One model, profiled and timed."""

    kernels: Sequence[TimedKernel]
    latency_us: float


@dataclass(frozen=True)
class Fit:
    """Kernel costs, and how a run follows from them."""

    kernels: dict[str, KernelCost]
    end_to_end: EndToEnd

    def latency_us(self, model: MeasuredModel) -> float:
        """What the fit predicts for a model whose kernels are known."""
        known = [k for k in model.kernels if k.kind in self.kernels]
        return self.end_to_end.per_run_us + sum(float(cost_us(self.kernels[k.kind].coefficients, k.work)) for k in known)


def fit_kernels(models: Sequence[MeasuredModel]) -> Fit:
    """Solves for the coefficients of every kernel class that occurs, all of them non-negative."""
    kinds = sorted({kernel.kind for model in models for kernel in model.kernels})
    width = len(FEATURES)
    place = {kind: index * width for index, kind in enumerate(kinds)}
    timing = len(kinds) * width
    columns = timing + len(FAMILIES) + 1
    rows: list[np.ndarray] = []
    targets: list[float] = []

    def append(row: np.ndarray, target: float, sigma: float) -> None:
        rows.append(row / sigma)
        targets.append(target / sigma)

    for model in models:
        total = np.zeros(columns)
        for kernel in model.kernels:
            row = np.zeros(columns)
            start = place[kernel.kind]
            row[start : start + width] = feature_row(kernel.work)
            total += row
            row[timing + FAMILIES.index(KINDS[kernel.kind])] = 1.0
            net = max(kernel.microseconds - _TIMING_US, _KERNEL_NOISE_US)
            append(row, kernel.microseconds, _KERNEL_NOISE * net + _KERNEL_NOISE_US)
        total[-1] = 1.0
        append(total, model.latency_us, _RUN_NOISE * model.latency_us)
    for family in range(len(FAMILIES)):
        row = np.zeros(columns)
        row[timing + family] = 1.0
        append(row, _TIMING_US, _TIMING_SPREAD_US)
    row = np.zeros(columns)
    row[-1] = 1.0
    append(row, _PER_RUN_US, _PER_RUN_US)

    left, right = np.array(rows), np.array(targets)
    scale = np.maximum(np.abs(left).max(axis=0), 1e-12)
    solution = nnls(left / scale, right, maxiter=100 * columns)[0] / scale
    kernels = {}
    for kind in kinds:
        cost = KernelCost.of([float(c) for c in solution[place[kind] : place[kind] + width]])
        overhead = float(solution[timing + FAMILIES.index(KINDS[kind])])
        errors = [
            abs(float(cost_us(cost.coefficients, k.work)) + overhead - k.microseconds) / k.microseconds
            for m in models
            for k in m.kernels
            if k.kind == kind
        ]
        kernels[kind] = cost.model_copy(update={"samples": len(errors), "mape": round(float(np.mean(errors)), 4)})
    return Fit(kernels, EndToEnd(per_run_us=float(f"{solution[-1]:.5g}")))


def hold_out(models: Sequence[MeasuredModel], folds: int = 5) -> HoldOut:
    """Errors on models left out of the fit in turn: the kernels of each are known, their costs are not."""
    measured = np.array([model.latency_us for model in models])
    predicted = np.zeros(len(models))
    for fold in range(folds):
        fit = fit_kernels([model for index, model in enumerate(models) if index % folds != fold])
        for index in range(fold, len(models), folds):
            predicted[index] = fit.latency_us(models[index])
    return errors_of(predicted, measured)


def errors_of(predicted: np.ndarray, measured: np.ndarray) -> HoldOut:
    """Mean and largest relative error, and rank agreement."""
    errors = np.abs(predicted / measured - 1.0)
    tau = float(kendalltau(predicted, measured).statistic) if len(measured) > 1 else 1.0
    return HoldOut(
        models=len(measured),
        mape=round(float(errors.mean()), 4),
        max=round(float(errors.max()), 4),
        kendall_tau=round(0.0 if np.isnan(tau) else tau, 4),
    )
