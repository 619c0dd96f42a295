"""The fitted cost model: a graph is lowered once, then thousands of plans a second are priced with numpy.

>>> model = FittedCostModel(load_hardware("local"))            # doctest: +SKIP
>>> skeleton = model.lower(graph)                              # doctest: +SKIP
>>> skeleton.price(plans).latency_ms                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from autocompress.errors import UsageError, unknown_name
from autocompress.hardware.calibration import Calibration, Observation
from autocompress.hardware.fitting import MeasuredModel
from autocompress.hardware.footprint import ActivationMemory, Dims, multiply_accumulates, size_counts, stored_bytes
from autocompress.hardware.grid import keep_count
from autocompress.hardware.kernels import (
    FAMILIES,
    KINDS,
    LIGHT,
    MEMORY,
    SUBSTITUTES,
    VIEWS,
    Work,
    cold_megabytes,
    cost_us,
)  # fmt: skip
from autocompress.hardware.lowering import Lowering, products_of
from autocompress.hardware.placement import Emit
from autocompress.hardware.profile import FittedProfile, KernelCost
from autocompress.hardware.profilers import noise_of
from autocompress.hardware.refinement import LoweredKernel, Refinement, refine
from autocompress.hardware.skeleton import Record, Skeleton, Terms
from autocompress.hardware.steps import Mask, quantized_tensors
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import INT8_WEIGHT, CompressionPlan, LayerPlan, ModelGraph

Formats = Mapping[str, Mask]
"""For each layer or tensor the plans under which it is in int8."""

_FAMILY_INDEX = {family: index for index, family in enumerate(FAMILIES)}
_WITH_WEIGHTS = ("fp32", "int8")
_INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
_PLANS_AHEAD = 36
_LEVELS = (0.125, 0.25, 0.5, 1.0)
_TRUST = 3.0
"""How many times nearer kernels profiled in this model come to its latency than those of other models."""


class KernelMaker(Protocol):
    """One pass over a graph for a batch of plans, which emits every kernel."""

    def run(self) -> None:
        """Emits them."""


class FittedCostModel:
    """Prices plans with the kernel costs of a hardware profile."""

    def __init__(self, profile: FittedProfile) -> None:
        self.profile = profile
        self._coefficients: dict[str, tuple[float, ...]] = {}

    def lower(self, graph: ModelGraph) -> FittedSkeleton:
        """Prepares a graph: everything that is the same for all plans is done here, once."""
        return FittedSkeleton(graph, self.profile)

    def kernel_us(self, kind: str, work: Work) -> float:
        """Microseconds of one kernel of a class of ``kernels.KINDS`` inside a run, by the profile's own scales."""
        if not self._coefficients:
            self._coefficients, _ = _coefficients(self.profile.kernels)
        if kind not in self._coefficients:
            raise unknown_name("kernel class", kind, self._coefficients)
        end = self.profile.end_to_end
        return end.scales.get(KINDS[kind], 1.0) * float(cost_us(self._coefficients[kind], work)) + end.per_kernel_us

    def run_us(self, weight_bytes: float) -> float:
        """Microseconds of a run beside its kernels', for a model with so many bytes of weights."""
        end = self.profile.end_to_end
        cold = end.per_cold_mb_us * float(cold_megabytes(weight_bytes, end.cache_mb))
        return end.per_run_us + end.scales.get(MEMORY, 1.0) * cold


class FittedSkeleton(Skeleton):
    """Prices a graph's plans by the classes of the kernels that the runtime makes of them."""

    source = "fitted"
    modelled = frozenset(LIGHT) | VIEWS | FOLLOWERS | {"Conv", "Gemm", "MatMul"}
    profile: FittedProfile
    lowering: ClassVar[Callable[..., KernelMaker]] = Lowering
    """How the runtime makes kernels of plans; it takes what ``Lowering`` takes."""

    def __init__(self, graph: ModelGraph, profile: FittedProfile) -> None:
        super().__init__(graph, profile)
        coefficients, self._missing = _coefficients(profile.kernels)
        self._refinement = self._unrefined = Refinement(coefficients, {})
        self._lowered: dict[str, list[LoweredKernel]] = {}
        self._memory = ActivationMemory(graph, self._steps)

    def _prior(self) -> Calibration:
        profile = self.profile
        end = profile.end_to_end
        holdout = profile.holdout
        return Calibration(
            scales=tuple(end.scales.get(family, 1.0) for family in FAMILIES),
            per_kernel_us=end.per_kernel_us,
            per_run_us=end.per_run_us,
            band=max(2 * holdout.mape, profile.repeat_floor) if holdout else profile.error_band,
        )

    # ---------------------------------------------------------------------------------------------- refinement

    def adopt(self, other: Skeleton) -> None:
        super().adopt(other)
        if isinstance(other, FittedSkeleton):
            # Factors go by the names of layers, which a smaller form of a model keeps.
            self._refinement = other._refinement

    def _refine(self, seen: Sequence[Observation]) -> float:
        self._refinement = self._unrefined
        profiled = [observation for observation in seen if observation.kernels]
        if not profiled:
            return 1.0
        self._refinement = refine(
            [MeasuredModel(observation.kernels, observation.latency_ms * 1e3) for observation in profiled],
            [self._kernels(observation.plan) for observation in profiled],
            self._ahead,
            self._unrefined.coefficients,
            self.profile.end_to_end,
            noise_of(self.profile.runtime),
        )
        return _TRUST

    @cached_property
    def _ahead(self) -> list[LoweredKernel]:
        """Kernels of random plans, such as a search may ask about."""
        rng = np.random.default_rng(0)
        kernels: list[LoweredKernel] = []
        for number in range(_PLANS_AHEAD):
            # Every level alike: what is missing here may be priced absurdly by a fit to the anchors alone.
            level = _LEVELS[number % len(_LEVELS)]
            groups = {g.id: keep_count(g.size, level * float(np.exp(rng.normal(0.0, 0.4)))) for g in self.graph.groups}
            share = (0.0, 1.0, 0.5)[number % 3]
            layers = {name: _INT8 for name in self.layer_names if rng.random() < share}
            kernels += self._kernels(CompressionPlan(groups=groups, layers=layers))
        return kernels

    def _kernels(self, plan: CompressionPlan) -> list[LoweredKernel]:
        """The kernels of one plan, remembered: calibrating asks for the same few again and again."""
        known = self._lowered.get(plan.structure_digest)
        if known is not None:
            return known
        found: list[LoweredKernel] = []

        def emit(label: str, kind: str, work: Work, mask: Mask, whole: bool) -> None:
            if mask.any() and whole:
                found.append(LoweredKernel(label, kind, work.at(0)))

        keeps, formats = self.encode([plan])
        self._lower(keeps, formats, emit)
        self._lowered[plan.structure_digest] = found
        return found

    def _lower(self, keeps: np.ndarray, formats: np.ndarray, emit: Emit) -> tuple[Dims, Formats, Formats]:
        """Emits the kernels of plans; returns all shapes, and the layers that run and the tensors held in int8."""
        count, dims = len(keeps), self._dims(keeps)
        is_int8 = np.array([plan.compute == "int8" for plan in self._formats])[formats]
        int8 = {name: is_int8[:, column] for column, name in enumerate(self.layer_names)}
        held = quantized_tensors(self.graph, self._steps, int8, count)
        block, batch = self.profile.nchwc_block, self.profile.batch
        maker = self.lowering(self.graph, self._steps, dims, int8, held, count, block, batch, emit)
        if isinstance(maker, Lowering):
            maker.products = products_of(self.layer_names, self._formats, formats)
        maker.run()
        return dims, int8, held

    def _terms(self, keeps: np.ndarray, formats: np.ndarray, record: Record | None = None) -> Terms:
        count = len(keeps)
        family_us = np.zeros((len(FAMILIES), count))
        kernels = np.zeros(count)
        weight_bytes = np.zeros(count)

        def emit(label: str, kind: str, work: Work, mask: Mask, whole: bool) -> None:
            if not mask.any():
                return
            microseconds = self._refinement.cost_us(label, kind, work, whole)
            family_us[_FAMILY_INDEX[KINDS[kind]]] += microseconds * mask
            if whole:
                kernels[:] += mask
                if KINDS[kind] in _WITH_WEIGHTS:
                    weight_bytes[:] += work.weight_bytes * mask
            if record is not None:
                record(label, kind, microseconds, mask, whole)

        dims, int8, held = self._lower(keeps, formats, emit)
        end = self.profile.end_to_end
        family_us[FAMILIES.index(MEMORY)] = end.per_cold_mb_us * cold_megabytes(weight_bytes, end.cache_mb)
        stored = stored_bytes(self.graph, dims, formats, self._layer_column, self._formats)
        counts = size_counts(formats, self._formats, held)
        peak = self._memory.peak_bytes(dims, held, int8, count, self.profile.batch)
        return Terms(family_us.T, kernels, stored, counts, peak, multiply_accumulates(self.graph, dims, count))


def _coefficients(kernels: Mapping[str, KernelCost]) -> tuple[dict[str, tuple[float, ...]], frozenset[str]]:
    """Coefficients for every class: its own, else those of the nearest class that was measured."""
    table: dict[str, tuple[float, ...]] = {}
    missing: set[str] = set()
    for kind in KINDS:
        source = kind
        while source not in kernels and source in SUBSTITUTES:
            source = SUBSTITUTES[source]
        if source not in kernels:
            source = next((k for k in ("elementwise_fp32", "conv_fp32") if k in kernels), next(iter(kernels), ""))
        if not source:
            raise UsageError("the hardware profile holds no kernel costs; measure it again with 'autocompress profile'")
        table[kind] = kernels[source].coefficients
        if source != kind:
            missing.add(kind)
    return table, frozenset(missing)
