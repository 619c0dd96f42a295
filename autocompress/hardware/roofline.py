"""Rooflines: the times of single kernels from the published figures of a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autocompress.errors import UsageError
from autocompress.hardware.analytic_profile import AnalyticProfile, OpClass
from autocompress.hardware.kernels import Number
from autocompress.hardware.profile import Precision
from autocompress.plan import LayerPlan

WIDTH: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes of a number."""


class Roofline:
    """The times of single kernels on a device; every argument may hold one number or one a plan."""

    def __init__(self, profile: AnalyticProfile) -> None:
        self.profile = profile
        self._capacities = np.array([float(level.capacity_bytes or np.inf) for level in profile.levels])
        self._us_per_byte = np.array([1e-3 / profile.bandwidth(level) for level in profile.levels])
        self.launch_us = profile.launch_us * profile.scale_overhead
        self.run_us = profile.run_us * profile.scale_overhead

    def us_per_byte(self, working_set: Number) -> Number:
        """Of the nearest memory that a working set of so many bytes fits in."""
        return self._us_per_byte[np.searchsorted(self._capacities, working_set)]

    def weights_us_per_byte(self, total: Number) -> Number:
        """Of a model's weights, ``total`` bytes: the nearest memory holds what it can, the next ones the rest."""
        if self.profile.weights_gb_per_s is not None:
            return 1e-3 / self.profile.weights_gb_per_s
        left = np.asarray(total, dtype=float)
        spent = np.zeros_like(left)
        for capacity, cost in zip(self._capacities, self._us_per_byte, strict=True):
            here = np.minimum(left, capacity)
            spent = spent + here * cost
            left = left - here
        return spent / np.maximum(total, 1.0)

    def kernel_us(
        self,
        op_class: OpClass,
        precision: Precision,
        macs: Number,
        moved: Number,
        weights: Number = 0.0,
        weights_us_per_byte: Number | None = None,
        gain: float = 1.0,
    ) -> Number:
        """Microseconds of one kernel.

        Args:
            op_class: whose efficiency it has.
            precision: the type it computes in.
            macs: multiply-accumulates on padded channels; elements where it multiplies nothing.
            moved: bytes of activations read and written.
            weights: bytes of weights.
            weights_us_per_byte: of the memory the weights are in; by default the one the working set fits in.
            gain: how many times as fast the device is with these bits.
        """
        profile = self.profile
        compute = macs * (1e-3 / (profile.gmacs(precision) * profile.share(op_class, precision) * gain))
        near = self.us_per_byte(moved + weights)
        traffic = moved * near + weights * (near if weights_us_per_byte is None else weights_us_per_byte)
        return self.launch_us + profile.scale_compute * np.maximum(compute, traffic)

    def host_us(self, macs: Number, moved: Number, weights: Number = 0.0) -> Number:
        """Microseconds of one kernel on the host, with the way there and back."""
        host = self.profile.host
        if host is None:
            raise UsageError(f"hardware {self.profile.name} has no host")
        work = np.maximum(macs * (1e-3 / host.peak_gmacs), (moved + weights) * (1e-3 / host.gb_per_s))
        scale = self.profile.scale_compute
        return host.launch_us * self.profile.scale_overhead + scale * (work + moved * (1e-3 / host.link_gb_per_s))


@dataclass(frozen=True)
class Variant:
    """How a device runs layers of one format.

    ``precision`` is None where they run on the host, and ``refused`` where there is none.
    """

    precision: Precision | None
    refused: bool
    weight_bytes: float
    """Bytes that one weight moves."""
    gain: float = 1.0


def variant_of(profile: AnalyticProfile, plan: LayerPlan) -> Variant:
    """How a device runs layers with a format."""
    precision = profile.executed(plan.compute)
    if precision is None:
        return Variant(None, profile.host is None, 4.0)
    if profile.bit_rule == "bitfusion" and precision == "int8" and plan.compute == "int8":
        bits = min(plan.storage.bits, 8)
        return Variant(precision, False, bits / 8, float(bitfusion_gain(8, bits)))
    return Variant(precision, False, WIDTH[precision])


def bitfusion_gain(activation_bits: int, weight_bits: int) -> int:
    """How many products of so many bits a fusion unit makes in the time of one of 8 x 8 bits.

    >>> [bitfusion_gain(8, bits) for bits in (8, 5, 4, 3, 2, 1)]
    [1, 1, 2, 2, 4, 4]
    """
    return (8 // max(activation_bits, 2)) * (8 // max(weight_bits, 2))


def op_class_of(kind: str) -> OpClass:
    """The class of operators a kernel class belongs to."""
    if kind.startswith("depthwise"):
        return "depthwise"
    if kind.startswith(("conv", "pointwise")):
        return "conv"
    return "gemm" if kind.startswith(("gemm", "matmul", "attention")) else "elementwise"


def type_of(kind: str) -> str:
    """The type a kernel class computes in; weights of few bits are unpacked to int8 where the kernel is a fast one."""
    if "int8" in kind or kind in ("matmul_nbits", "quantize_dynamic"):
        return "int8"
    return "fp16" if "fp16" in kind else "fp32"


def refusal(profile: AnalyticProfile, layers: list[str], wanted: str) -> UsageError:
    """The error for layers that nothing on the device runs."""
    shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    return UsageError(
        f"hardware {profile.name} computes in {', '.join(profile.precisions)} only and has no host processor in its "
        f"profile: it cannot run {shown} in {wanted}; give these layers int8, or choose another device"
    )
