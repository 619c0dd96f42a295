"""The analytic cost model: a roofline for each layer and edge, from the published figures of a device."""

from __future__ import annotations

import numpy as np

from autocompress.errors import unknown_name
from autocompress.hardware.analytic_lowering import AnalyticLowering
from autocompress.hardware.analytic_profile import AnalyticProfile
from autocompress.hardware.calibration import Calibration
from autocompress.hardware.footprint import ActivationMemory, multiply_accumulates, size_counts, stored_bytes
from autocompress.hardware.kernels import KINDS, LIGHT, VIEWS, Work
from autocompress.hardware.profile import HardwareProfile
from autocompress.hardware.roofline import WIDTH, Roofline, Variant, op_class_of, refusal, type_of, variant_of
from autocompress.hardware.skeleton import PriceTable, Record, Skeleton, Terms
from autocompress.hardware.steps import quantized_tensors
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import CompressionPlan, Estimate, LayerPlan, ModelGraph
from autocompress.units import format_bytes


class AnalyticCostModel:
    """Prices plans with the roofline of an analytic profile."""

    def __init__(self, profile: AnalyticProfile) -> None:
        self.profile = profile
        self._roofline = Roofline(profile)

    def lower(self, graph: ModelGraph) -> AnalyticSkeleton:
        """Prepares a graph: everything that is the same for all plans is done here, once."""
        return AnalyticSkeleton(graph, self.profile)

    def kernel_us(self, kind: str, work: Work) -> float:
        """Microseconds of one kernel of a class of ``kernels.KINDS``; one the device cannot run is the host's.

        ``fp16`` may stand in the place of a class's ``fp32``: the runtimes that are measured here have no such class.

        Raises:
            UsageError: no such class, or the device refuses it.
        """
        if kind.replace("fp16", "fp32") not in KINDS:
            raise unknown_name("kernel class", kind, KINDS)
        if kind == "view":
            return 0.0
        op_class = op_class_of(kind)
        wanted = type_of(kind)
        precision = self.profile.executed(wanted)
        moved = float(work.read_bytes) + float(work.written_bytes)
        macs = float(work.macs) or float(work.written_bytes) / WIDTH["int8" if wanted == "int8" else "fp32"]
        weights = float(work.weight_bytes)
        if precision is not None:
            fixed = self._roofline.weights_us_per_byte(weights) if self.profile.weights_gb_per_s else None
            return float(self._roofline.kernel_us(op_class, precision, macs, moved, weights, fixed))
        if self.profile.host is not None:
            return float(self._roofline.host_us(macs, moved, weights))
        if op_class == "elementwise":
            return self._roofline.launch_us + self.profile.scale_compute * moved * float(
                self._roofline.us_per_byte(moved)
            )
        raise refusal(self.profile, [kind], wanted)

    def run_us(self, weight_bytes: float) -> float:
        """Microseconds of a run beside its kernels', for a model with so many bytes of weights."""
        extra = 0.0
        if self.profile.weights_gb_per_s is None:
            extra = self._roofline.weights_us_per_byte(weight_bytes) - self._roofline.us_per_byte(0.0)
        return self._roofline.run_us + self.profile.scale_compute * weight_bytes * max(0.0, float(extra))


def memory_notes(profile: HardwareProfile, peak: float, size: float) -> list[str]:
    """What of a device's memory a model does not fit in: ``peak`` bytes at run time, ``size`` bytes of file."""
    memory, found = profile.memory, []
    needed, what = (peak, "activations and the engine") if memory.flash_bytes else (peak + size, "model and data")
    if memory.ram_bytes is not None and needed > memory.ram_bytes:
        found.append(
            f"does not fit: {what} take {format_bytes(needed)} of RAM, {profile.name} has "
            f"{format_bytes(memory.ram_bytes)}"
        )
    if memory.flash_bytes is not None and size > memory.flash_bytes:
        found.append(
            f"does not fit: the file takes {format_bytes(size)} of flash, {profile.name} has "
            f"{format_bytes(memory.flash_bytes)}"
        )
    return found


def stand_in_note(profile: AnalyticProfile) -> str:
    """What a device without floats runs them in."""
    return f"layers in fp32 run in what stands in for it on {profile.name}: {profile.floats_as}"


class AnalyticSkeleton(Skeleton):
    """Prices a graph's plans layer by layer and edge by edge.

    A plan with layers that the device refuses costs infinitely much in a table; ``estimate`` raises an error.
    """

    source = "analytic"
    modelled = frozenset(LIGHT) | VIEWS | FOLLOWERS | {"Conv", "Gemm", "MatMul"}
    profile: AnalyticProfile

    def __init__(self, graph: ModelGraph, profile: AnalyticProfile) -> None:
        super().__init__(graph, profile)
        self._roofline = Roofline(profile)
        self._memory = ActivationMemory(graph, self._steps)
        self._variants: list[Variant] = []

    def estimate(self, plan: CompressionPlan) -> Estimate:
        """One plan in detail.

        Raises:
            UsageError: the plan has layers that the device cannot run.
        """
        refused = [
            name for name in self.layer_names if variant_of(self.profile, plan.layers.get(name, LayerPlan())).refused
        ]
        if refused:
            raise refusal(self.profile, refused, plan.layers.get(refused[0], LayerPlan()).compute)
        return super().estimate(plan)

    def _prior(self) -> Calibration:
        return Calibration(per_run_us=self._roofline.run_us, band=self.profile.error_band)

    def _notes(self, table: PriceTable, formats: np.ndarray) -> tuple[str, ...]:
        peak, size = float(table.peak_memory_bytes[0]), float(table.size_bytes[0])
        found = memory_notes(self.profile, peak, size)
        if self.profile.floats_as is not None and any(self._formats[code].compute == "fp32" for code in formats):
            found.append(stand_in_note(self.profile))
        hosted = [
            n for n, code in zip(self.layer_names, formats, strict=True) if self._variants[code].precision is None
        ]
        if hosted:
            found.append(f"{len(hosted)} layers run on the host processor, which computes in fp32: {hosted[0]}, ...")
        return tuple(found)

    def _terms(self, keeps: np.ndarray, formats: np.ndarray, record: Record | None = None) -> Terms:
        count = len(keeps)
        dims = self._dims(keeps)
        is_int8 = np.array([plan.compute == "int8" for plan in self._formats])[formats]
        int8 = {name: is_int8[:, column] for column, name in enumerate(self.layer_names)}
        held = quantized_tensors(self.graph, self._steps, int8, count)
        self._variants = [variant_of(self.profile, plan) for plan in self._formats]
        lowering = AnalyticLowering(
            self.graph,
            self._steps,
            self._roofline,
            self._layer_column,
            self._variants,
            dims,
            held,
            formats,
            count,
            record,
        )
        lowering.run()
        stored = stored_bytes(self.graph, dims, formats, self._layer_column, self._formats)
        peak = self._memory.peak_bytes(dims, held, int8, count, self.profile.batch) + self.profile.memory.engine_bytes
        return Terms(
            lowering.family_us.T,
            lowering.kernels,
            stored,
            size_counts(formats, self._formats, held),
            peak,
            multiply_accumulates(self.graph, dims, count),
            None if self.profile.energy is None else lowering.picojoules * 1e-9,
        )
