"""What any ONNX file costs on a device, without measuring it.

>>> profile = load_hardware("local")                                        # doctest: +SKIP
>>> predict_onnx(Path("model.onnx"), profile).costs["latency_ms"].value     # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from autocompress.errors import UsageError
from autocompress.export.checkpoint import read_plan
from autocompress.hardware.analytic import memory_notes, stand_in_note
from autocompress.hardware.analytic_profile import AnalyticProfile
from autocompress.hardware.models import cost_model
from autocompress.hardware.onnx_footprint import artifact_bytes, multiply_accumulates, peak_activation_bytes
from autocompress.hardware.onnx_half import is_half
from autocompress.hardware.onnx_kernels import AS_WRITTEN, FUSED, LAYOUTS, ExecutedGraph, execute, read_model
from autocompress.hardware.onnx_works import OTHER, NodeWork, describe_node, for_another_device
from autocompress.hardware.profile import Energy, FittedProfile, HardwareProfile, Precision
from autocompress.hardware.skeleton import UNKNOWN_BAND, quantity
from autocompress.plan import CompressionPlan, Estimate

UNKNOWN_WIDENS = 1.5
"""How much wider the band on the latency is where any kernel is of a class never measured."""

UNKNOWN_SPREAD = 3.0
"""What share of its price a kernel of such a class may take more: three times what stands in for it."""


@dataclass(frozen=True)
class PricedKernel:
    """One kernel of a file: what it is, and the milliseconds it is predicted to take.

    ``known`` is False where the profile has never measured its class and a related one stands in.
    """

    name: str
    op: str
    kind: str
    latency_ms: float
    known: bool


@dataclass(frozen=True)
class Prediction:
    """An estimate for a device, with the kernels it is made of in order of execution (none for a plan)."""

    estimate: Estimate
    profile: HardwareProfile
    kernels: tuple[PricedKernel, ...] = ()

    @property
    def extrapolated(self) -> bool:
        """Whether the latency lies outside what the profile was measured on."""
        if self.profile.validity is None:
            return False
        low, high = self.profile.validity.latency_ms
        return not low <= self.estimate.costs["latency_ms"].value <= high


def check_path(path: Path) -> None:
    """Whether there is anything to predict: found before a machine is measured for it.

    Raises:
        UsageError: there is no such file, or it is neither a plan nor an ONNX file.
    """
    if not path.exists():
        raise UsageError(f"no such file or directory: {str(path)!r}; give an ONNX file or RUN/models/ID")
    if _is_plan(path):
        read_plan(path)
    else:
        read_model(path)


def predict_path(path: Path, profile: HardwareProfile, *, dims: Mapping[str, int] | None = None) -> Prediction:
    """What an ONNX file or a delivered point (its folder or ``plan.json``) costs on a device."""
    if _is_plan(path):
        if dims:
            raise UsageError(f"{str(path)!r} is a plan, whose axes have sizes; leave --dim out")
        return predict_plan(path, profile)
    return predict_in_detail(path, profile, dims=dims)


def _is_plan(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def predict_plan(path: Path, profile: HardwareProfile) -> Prediction:
    """What a delivered point costs on a device, from its plan: what the runtime there would make of it.

    Args:
        path: the folder of the point in a run, or the ``plan.json`` in it.
        profile: the device.
    """
    graph, plan = read_plan(path)
    # The graph in the file is cut to the plan's widths already, and of the student where the plan starts from one.
    formats = CompressionPlan(layers=plan.layers, activations=plan.activations)
    return Prediction(cost_model(profile).lower(graph).estimate(formats), profile)


def predict_onnx(path: Path, profile: HardwareProfile, *, dims: Mapping[str, int] | None = None) -> Estimate:
    """What an ONNX file costs on a device: latency, bytes on disk, peak memory, multiply-accumulates, energy if known.

    The kernels are those that the runtime makes of the file; their times come from the profile alone.  ``per_kernel``
    holds milliseconds by kernel and, with ``cold weights`` and ``overhead``, adds up to the latency.

    Args:
        path: any ONNX file that onnxruntime opens.
        profile: the device.
        dims: sizes of open axes other than the first, by name; an open first axis takes the profile's batch.

    Raises:
        UsageError: no such file, not an ONNX file, one the runtime cannot run, or an open axis without a size.
    """
    return predict_in_detail(path, profile, dims=dims).estimate


def predict_in_detail(path: Path, profile: HardwareProfile, *, dims: Mapping[str, int] | None = None) -> Prediction:
    """As :func:`predict_onnx`, with each kernel's class."""
    model = read_model(path)
    size = artifact_bytes(path, model)
    graph, works = _kernels(path, model, profile, dims or {})
    macs, uncounted = multiply_accumulates(execute(path, AS_WRITTEN, dims=dims))
    kernels, extra = _price(works, profile)
    latency = sum(kernel.latency_ms for kernel in kernels) + sum(extra.values())
    unknown = [kernel for kernel in kernels if not kernel.known]
    spread = _band(profile)
    if unknown:
        share = sum(kernel.latency_ms for kernel in unknown) / latency
        spread = max(spread * UNKNOWN_WIDENS, spread + UNKNOWN_SPREAD * share)
    peak = peak_activation_bytes(graph) + profile.memory.engine_bytes
    costs = {
        "latency_ms": quantity(latency, spread, profile.kind),
        "size_bytes": quantity(size, 0.0, "measured"),
        "peak_memory_bytes": quantity(peak, 0.0, "analytic"),
        "macs": quantity(macs, 0.0, "unknown" if uncounted else "analytic"),
    }
    if profile.energy is not None:
        millijoules = _picojoules(works, profile, profile.energy) * 1e-9 + profile.energy.static_mw * latency * 1e-3
        costs["energy_mj"] = quantity(millijoules, max(spread, UNKNOWN_BAND), "analytic")
    estimate = Estimate(
        target=profile.name,
        costs=costs,
        per_kernel=_by_name(kernels) | extra,
        unmodelled=(
            *_counted(kernel.op if kernel.kind == OTHER else f"{kernel.op} ({kernel.kind})" for kernel in unknown),
            *_counted(f"multiply-accumulates of {op}" for op in uncounted),
        ),
        notes=_notes(works, profile, peak, size),
    )
    return Prediction(estimate, profile, tuple(kernels))


def _kernels(
    path: Path, model: onnx.ModelProto, profile: HardwareProfile, dims: Mapping[str, int]
) -> tuple[ExecutedGraph, list[NodeWork]]:
    """A graph whose tensors tell the memory, and the kernels that the profile's runtime makes of the file."""
    if not isinstance(profile, FittedProfile):
        graph = execute(path, FUSED, batch=profile.batch, dims=dims)
        return for_another_device(graph, half=is_half(model) and "fp16" in profile.precisions)
    if profile.runtime == "onnxruntime":
        graph = execute(path, LAYOUTS, batch=profile.batch, dims=dims)
        return graph, [describe_node(executed, graph, profile.nchwc_block) for executed in graph.nodes]
    if profile.runtime == "openvino":
        from autocompress.hardware.onnx_openvino import openvino_works

        graph = execute(path, FUSED, batch=profile.batch, dims=dims)
        return graph, openvino_works(path, graph, profile)
    raise UsageError(
        f"profile {profile.name!r} is of runtime {profile.runtime!r}, whose kernels cannot be read from an ONNX file; "
        "give a profile of onnxruntime or openvino, or a plan.json"
    )


def _price(works: Sequence[NodeWork], profile: HardwareProfile) -> tuple[list[PricedKernel], dict[str, float]]:
    """Each kernel's milliseconds, and those that belong to no kernel."""
    model = cost_model(profile)
    kernels = []
    for node in works:
        known = node.known and (not isinstance(profile, FittedProfile) or node.kind in profile.kernels)
        kernels.append(PricedKernel(node.name, node.op, node.kind, model.kernel_us(node.kind, node.work) * 1e-3, known))
    overhead = model.run_us(0.0)
    cold = model.run_us(sum(float(node.work.weight_bytes) for node in works)) - overhead
    return kernels, ({"cold weights": cold * 1e-3} if cold else {}) | {"overhead": overhead * 1e-3}


def _picojoules(works: Iterable[NodeWork], profile: HardwareProfile, energy: Energy) -> float:
    """What the work itself takes, in the type that each kernel is executed in."""
    widest = max(energy.pj_per_mac.values(), default=0.0)
    total = 0.0
    for node in works:
        wanted: Precision = "int8" if "int8" in node.kind else "fp16" if "fp16" in node.kind else "fp32"
        executed = profile.executed(wanted) if isinstance(profile, AnalyticProfile) else wanted
        per_mac = widest if executed is None else energy.pj_per_mac.get(executed, widest)
        work = node.work
        moved = float(work.read_bytes) + float(work.written_bytes) + float(work.weight_bytes)
        total += float(work.macs) * per_mac + moved * energy.pj_per_byte
    return total


def _notes(works: Iterable[NodeWork], profile: HardwareProfile, peak: float, size: float) -> tuple[str, ...]:
    notes = memory_notes(profile, peak, size)
    floats = any("fp32" in node.kind and node.work.macs for node in works)
    if isinstance(profile, AnalyticProfile) and profile.floats_as is not None and floats:
        notes.append(stand_in_note(profile))
    return tuple(notes)


def _band(profile: HardwareProfile) -> float:
    """Half the width of the band around a latency all of whose kernels are known."""
    if isinstance(profile, FittedProfile) and profile.holdout is not None:
        return max(2 * profile.holdout.mape, profile.repeat_floor)
    return profile.error_band


def _by_name(kernels: Iterable[PricedKernel]) -> dict[str, float]:
    """Milliseconds by name; a kernel that a loop runs again adds to its first."""
    total: dict[str, float] = {}
    for kernel in kernels:
        total[kernel.name] = total.get(kernel.name, 0.0) + kernel.latency_ms
    return total


def _counted(names: Iterable[str]) -> list[str]:
    """Each name once, with how often it occurs."""
    return [name if count == 1 else f"{name} x{count}" for name, count in Counter(names).items()]
