"""What a few profiled artifacts of one model say about its kernels: the device's costs, corrected for this model.

A device profile knows each kernel class from other models.  Here its costs are drawn towards the kernels that were
timed inside this model, and what they still miss of a layer (its weights come from a farther cache, say) becomes a
factor of that layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.hardware.fitting import ONNXRUNTIME, MeasuredModel, Noise, PriorKernel, fit_kernels
from autocompress.hardware.kernels import KINDS, Number, Work, cost_size, cost_us
from autocompress.hardware.profile import EndToEnd

Coefficients = Mapping[str, tuple[float, ...]]

PRIORS_EACH = 40
"""Kernels of each class at which the device's cost is held on to."""

FACTOR_LIMIT = 1.6
_OWN_FACTORS = ("fp32", "int8")
_FACTOR_SPREAD = 0.15
_SLOPE_SPREAD = 0.1
_RATIO_NOISE = 0.05
"""Logarithms: how far a layer's times lie from its class's, how that changes with its size, and the times' noise."""


@dataclass(frozen=True)
class LoweredKernel:
    """A kernel as the cost model sees it: of which layer or tensor, its class, and what it does."""

    label: str
    kind: str
    work: Work

    @property
    def signature(self) -> tuple[object, ...]:
        """What it has in common with the kernel that the runtime names otherwise."""
        work = self.work
        counts = (work.macs, work.windows, work.weight_bytes, work.points)
        return (self.kind, *(round(float(count)) for count in counts))


@dataclass(frozen=True)
class Factor:
    """What a layer's kernel takes of its class's time: ``level`` at a ``size``, growing with its power ``slope``."""

    level: float
    slope: float
    size: float

    def at(self, size: Number) -> Number:
        """The factor at other widths; sizes are those of ``kernels.cost_size``."""
        found = self.level * np.power(np.maximum(size, 1.0) / self.size, self.slope)
        return np.clip(found, 1 / FACTOR_LIMIT, FACTOR_LIMIT)


@dataclass(frozen=True)
class Refinement:
    """Costs of kernel classes and factors of single layers, by ``(label, kind)``, for one model."""

    coefficients: Coefficients
    factors: Mapping[tuple[str, str], Factor]

    def cost_us(self, label: str, kind: str, work: Work, whole: bool = True) -> Number:
        """Microseconds of a kernel; what is not ``whole`` joins another and has no cost of being started."""
        coefficients = self.coefficients[kind]
        microseconds = cost_us(coefficients if whole else (0.0, *coefficients[1:]), work)
        factor = self.factors.get((label, kind)) if whole else None
        return microseconds if factor is None else factor.at(cost_size(work)) * microseconds


def refine(
    anchors: Sequence[MeasuredModel],
    lowered: Sequence[Sequence[LoweredKernel]],
    ahead: Sequence[LoweredKernel],
    coefficients: Coefficients,
    end: EndToEnd,
    noise: Noise = ONNXRUNTIME,
    seed: int = 0,
) -> Refinement:
    """Corrects kernel costs with the anchors of one model.

    Args:
        anchors: artifacts of the model, profiled and timed.
        lowered: what the cost model takes each of them for.
        ahead: kernels of plans that a search may ask about: there, and at the anchors, the device's costs count as
            observations too, so that what no anchor shows keeps its price.
        coefficients: the device's costs of every class.
        end: how the device's runs follow from its kernels.
        noise: what the kernels' times are worth.
        seed: of the choice among ``ahead``.
    """
    rng = np.random.default_rng(seed)
    by_kind: dict[str, dict[tuple[object, ...], LoweredKernel]] = defaultdict(dict)
    for kernel in (*ahead, *(k for kernels in lowered for k in kernels)):
        by_kind[kernel.kind].setdefault((*kernel.signature, float(kernel.work.read_bytes)), kernel)
    priors = []
    for kind in sorted(by_kind):
        found = list(by_kind[kind].values())
        for index in rng.permutation(len(found))[:PRIORS_EACH]:
            work = found[index].work
            priors.append(PriorKernel(kind, work, float(cost_us(coefficients[kind], work))))
    fit = fit_kernels(anchors, end.cache_mb, priors, noise)
    refined = {**coefficients, **{kind: cost.coefficients for kind, cost in fit.kernels.items()}}
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for anchor, kernels in zip(anchors, lowered, strict=True):
        timed: dict[tuple[object, ...], list[float]] = defaultdict(list)
        for seen in anchor.kernels:
            net = max(seen.microseconds - fit.timing_us.get(seen.kind, 0.0), 0.3)
            timed[LoweredKernel("", seen.kind, seen.work).signature].append(net)
        for kernel in kernels:
            own = timed.get(kernel.signature) if KINDS[kernel.kind] in _OWN_FACTORS else None
            predicted = float(cost_us(refined[kernel.kind], kernel.work))
            if own and predicted > 1.0:
                ratio = (float(np.log(cost_size(kernel.work))), float(np.log(np.mean(own) / predicted)))
                ratios[kernel.label, kernel.kind].append(ratio)
    return Refinement(refined, {place: _factor(logs) for place, logs in ratios.items()})


def _factor(seen: Sequence[tuple[float, float]]) -> Factor:
    """A line through logarithms of work and of measured over predicted time, held to 1 as long as few say otherwise."""
    x, y = np.array(seen).T
    centre = float(x.mean())
    left = np.column_stack([np.ones(len(x)), x - centre]) / _RATIO_NOISE
    priors = np.diag([1 / _FACTOR_SPREAD, 1 / _SLOPE_SPREAD])
    right = np.concatenate([y / _RATIO_NOISE, [0.0, 0.0]])
    level, slope = np.linalg.lstsq(np.vstack([left, priors]), right, rcond=None)[0]
    return Factor(float(np.exp(level)), float(slope), float(np.exp(centre)))
