"""Analytic profiles: a device from what is published of it, for those that nobody here can measure.

Peaks, bandwidths and overheads make a roofline; ``sources`` says for each of them where it comes from.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from autocompress.errors import UsageError
from autocompress.hardware.profile import HardwareProfile, Precision
from autocompress.plan import Value

OpClass = Literal["conv", "depthwise", "gemm", "elementwise"]
OP_CLASSES: tuple[OpClass, ...] = ("conv", "depthwise", "gemm", "elementwise")
WIDER: tuple[Precision, ...] = ("int4", "int8", "fp16", "fp32")
"""Types from the narrowest to the widest: what a device cannot compute in one it computes in the next it can."""

Positive = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Efficiency = Annotated[dict[Precision, Share], Field(min_length=1)]


class MemoryLevel(Value):
    """A memory of the device, the nearest first; ``capacity_bytes`` is None for the one that holds everything.

    ``gb_per_s`` is what one thread gets of its bandwidth, ``gb_per_s_all`` what all of them get together.
    """

    name: str
    capacity_bytes: int | None = Field(default=None, gt=0)
    gb_per_s: Positive
    gb_per_s_all: Positive | None = None


class Host(Value):
    """The processor beside an accelerator: it runs the layers that the accelerator cannot, in float32."""

    peak_gmacs: Positive
    gb_per_s: Positive
    launch_us: float = Field(ge=0, le=1e6)
    link_gb_per_s: Positive


class Published(Value):
    """A latency that somebody measured on the device and published.

    ``model`` is named as torchvision names it, or described; ``runtime`` is what ran it there.  ``used`` says that an
    efficiency or a bandwidth was read off it, so that it proves nothing of the predictions.
    """

    model: str
    precision: Precision
    latency_ms: Positive
    threads: int = Field(default=1, ge=1)
    resolution: int | None = None
    runtime: str
    source: str
    used: bool = False


class UserMeasurement(Value):
    """A latency that the user measured on the device."""

    model: str
    latency_ms: Positive


class AnalyticProfile(HardwareProfile):
    """A device as a roofline.

    A kernel takes ``launch_us`` and the longer of its computation, at ``peak_gmacs`` x ``efficiency`` of its type and
    class, and of its bytes, at the bandwidth of the memory that its working set fits in.

    Attributes:
        max_threads: threads the device runs at once; ``peak_gmacs`` is of one.
        thread_share: how much of another core each further thread adds.
        peak_gmacs: for each type the device computes in, 10^9 multiply-accumulates a second of one thread.
        efficiency: for each class of operators the share of the peak that the runtime's kernels reach, by type; a type
            left out takes that of the next wider one given, else the widest's.
        levels: memories, nearest first.
        weights_gb_per_s: where weights always come from one memory (an MCU's flash), its bandwidth.
        launch_us: of every kernel.
        run_us: of every run.
        bit_rule: ``bitfusion``: an int8 layer whose weights have w bits is 8 / max(w, 2) times as fast, rounded down,
            and weights move as they are stored; ``none``: stored bits make a file smaller and nothing faster.
        floats_as: the type that stands in for floats wider than any the device has (16-bit fixed point, say).
        host: what runs the layers that the device cannot; None: they are refused.
        scale_compute: what measurements of the user's own multiply computation and bytes with.
        scale_overhead: the same for ``launch_us`` and ``run_us``.
        sources: where each number comes from, by field (``memory``, ``efficiency.conv`` or a whole mapping).
        published: measurements of others to compare with.
        calibrated_on: measurements that the scales were fitted to.
    """

    kind: Literal["analytic"] = "analytic"
    validated: Literal[False] = False
    runtime_version: str = "any"
    max_threads: int = Field(default=1, ge=1)
    thread_share: float = Field(default=0.85, ge=0, le=1)
    peak_gmacs: dict[Precision, Positive] = Field(min_length=1)
    efficiency: dict[OpClass, Efficiency]
    levels: tuple[MemoryLevel, ...] = Field(min_length=1)
    weights_gb_per_s: Positive | None = None
    launch_us: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    run_us: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    bit_rule: Literal["none", "bitfusion"] = "none"
    floats_as: Precision | None = None
    host: Host | None = None
    scale_compute: float = Field(default=1.0, ge=0, le=1e3, allow_inf_nan=False)
    scale_overhead: float = Field(default=1.0, ge=0, le=1e3, allow_inf_nan=False)
    sources: dict[str, str]
    published: tuple[Published, ...] = ()
    calibrated_on: tuple[UserMeasurement, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.precisions) != set(self.peak_gmacs):
            raise ValueError(
                f"precisions {sorted(self.precisions)} and the types of peak_gmacs {sorted(self.peak_gmacs)} differ"
            )
        missing = [name for name in OP_CLASSES if name not in self.efficiency]
        if missing:
            raise ValueError(f"efficiency has no {', '.join(missing)}; it needs all of {', '.join(OP_CLASSES)}")
        if self.floats_as is not None and self.floats_as not in self.peak_gmacs:
            raise ValueError(f"floats_as is {self.floats_as}, which is none of precisions {sorted(self.precisions)}")
        *near, last = self.levels
        if last.capacity_bytes is not None or any(level.capacity_bytes is None for level in near):
            raise ValueError("levels: the last one, and only it, must be without capacity_bytes: it holds everything")
        capacities = [level.capacity_bytes or 0 for level in near]
        speeds = [level.gb_per_s for level in self.levels]
        if capacities != sorted(capacities) or speeds != sorted(speeds, reverse=True):
            raise ValueError("levels: a memory further away must be larger and no faster than the one before it")
        if self.threads > self.max_threads:
            raise ValueError(f"threads is {self.threads}, but the device runs at most max_threads={self.max_threads}")
        return self

    def at(self, threads: int | None, batch: int | None) -> Self:
        """The profile for so many threads and samples a run: a roofline scales with both."""
        if threads is not None and threads > self.max_threads:
            raise UsageError(
                f"hardware {self.name}: {threads} threads, but it runs at most {self.max_threads}; ask for fewer"
            )
        if (threads or self.threads) < 1 or (batch or self.batch) < 1:
            raise UsageError(f"threads={threads}, batch={batch}: both must be at least 1")
        return self.model_copy(update={"threads": threads or self.threads, "batch": batch or self.batch})

    def executed(self, wanted: str) -> Precision | None:
        """The narrowest type of the device that is as wide as what a layer is planned in, or that stands in for it."""
        start = WIDER.index(_BASE_TYPES.get(wanted, "fp32"))
        wide_enough = (precision for precision in WIDER[start:] if precision in self.peak_gmacs)
        return next(wide_enough, self.floats_as if start >= WIDER.index("fp16") else None)

    def gmacs(self, precision: Precision) -> float:
        """10^9 multiply-accumulates a second at the profile's threads."""
        return self.peak_gmacs[precision] * (1.0 + (self.threads - 1) * self.thread_share)

    def share(self, op_class: OpClass, precision: Precision) -> float:
        """The share of the peak that kernels of a class reach in a type."""
        known = self.efficiency[op_class]
        wider = [p for p in WIDER[WIDER.index(precision) :] if p in known]
        return known[wider[0]] if wider else known[max(known, key=WIDER.index)]

    def bandwidth(self, level: MemoryLevel) -> float:
        """GB/s of a memory at the profile's threads."""
        if level.gb_per_s_all is None or self.max_threads == 1:
            return level.gb_per_s
        return level.gb_per_s + (level.gb_per_s_all - level.gb_per_s) * (self.threads - 1) / (self.max_threads - 1)


_BASE_TYPES: dict[str, Precision] = {
    "fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4", "int8_dynamic": "int8", "weight_only": "fp32",
}  # fmt: skip
"""What each ``LayerPlan.compute`` multiplies in."""
