"""A graph ready to be priced on a device: what all cost models share.

Encoding plans as arrays, turning terms into costs and correcting them with measurements are the same for every
device; a subclass says what a plan's kernels cost there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from autocompress.errors import UsageError, unknown_name
from autocompress.hardware.calibration import Calibration, Observation, fit_latency, fit_size, spread_of
from autocompress.hardware.kernels import FAMILIES, KINDS, MEMORY, Number
from autocompress.hardware.profile import HardwareProfile
from autocompress.hardware.steps import Mask, make_steps
from autocompress.plan import (
    INT4_WEIGHT,
    INT8_WEIGHT,
    CompressionPlan,
    Estimate,
    LayerPlan,
    ModelGraph,
    Quantity,
    Source,
    Student,
)  # fmt: skip

CHUNK = 4096
"""Plans priced together: their arrays stay in the processor's cache."""

FORMATS = (
    LayerPlan(),
    LayerPlan(compute="int8", storage=INT8_WEIGHT),
    LayerPlan(compute="int8", storage=INT4_WEIGHT),
    LayerPlan(storage=INT8_WEIGHT),
    LayerPlan(storage=INT4_WEIGHT),
)

FOLDS = 5
"""Parts into which observations fall to be left out in turn."""

UNKNOWN_BAND = 0.3
"""Half the width of the error band, as a fraction, where a plan runs kernels that the profile says nothing of."""

Record = Callable[[str, str, Number, Mask, bool], None]
"""``record(label, kind, microseconds, mask, whole)`` is told of every kernel; without ``whole`` the time joins a kernel
already told of."""


@dataclass(frozen=True)
class PriceTable:
    """Costs with one entry a plan; ``energy_mj`` is None where the profile says nothing of energy."""

    latency_ms: np.ndarray
    size_bytes: np.ndarray
    peak_memory_bytes: np.ndarray
    macs: np.ndarray
    energy_mj: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.latency_ms)


@dataclass(frozen=True)
class Terms:
    """What prices are made of, before scales and offsets: one row a plan.

    ``energy_mj`` is what the work itself takes; what the device takes while it runs is added to it.
    """

    family_us: np.ndarray
    kernels: np.ndarray
    size_payload: np.ndarray
    size_counts: np.ndarray
    peak: np.ndarray
    macs: np.ndarray
    energy_mj: np.ndarray | None = None


class Skeleton(ABC):
    """A graph ready to be priced on a device.

    The formats of activations follow from the layers' types by the rule of ``methods.quantization.activation_formats``;
    a plan's own ``activations`` are not read.

    Attributes:
        group_ids: the columns of ``keeps`` in ``price_arrays``.
        layer_names: the columns of ``formats`` in ``price_arrays``: the weight layers in execution order.
    """

    source: ClassVar[Source]
    """Where latencies come from."""

    modelled: ClassVar[frozenset[str]]
    """Operators that the model knows; others are priced all the same and named in ``Estimate.unmodelled``."""

    def __init__(self, graph: ModelGraph, profile: HardwareProfile) -> None:
        self.graph = graph
        self.profile = profile
        self.group_ids = tuple(group.id for group in graph.groups)
        self.layer_names = tuple(layer.name for layer in graph.compressible)
        self.calibration: Calibration | None = None
        self._steps = make_steps(graph)
        self._sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        self._column = {group.id: index for index, group in enumerate(graph.groups)}
        self._layer_column = {name: index for index, name in enumerate(self.layer_names)}
        self._formats: list[LayerPlan] = list(FORMATS)
        self._codes = {plan: code for code, plan in enumerate(self._formats)}
        self._codes_by_id = {id(plan): (code, plan) for code, plan in enumerate(self._formats)}
        self._shrinking = self._members()
        self._missing: frozenset[str] = frozenset()

    # ------------------------------------------------------------------------------- what a cost model supplies

    @abstractmethod
    def _terms(self, keeps: np.ndarray, formats: np.ndarray, record: Record | None = None) -> Terms:
        """What the plans of one chunk are made of; ``record`` is given for a single plan only."""

    @abstractmethod
    def _prior(self) -> Calibration:
        """The scales and the error band as long as nothing of this graph was measured."""

    def _notes(self, table: PriceTable, formats: np.ndarray) -> tuple[str, ...]:
        """What the user must know of one plan beside its costs."""
        return ()

    # --------------------------------------------------------------------------------------------- encoding

    @property
    def formats(self) -> tuple[LayerPlan, ...]:
        """What the codes of ``price_arrays`` stand for; ``encode`` appends formats it has not met."""
        return tuple(self._formats)

    def encode(self, plans: Sequence[CompressionPlan]) -> tuple[np.ndarray, np.ndarray]:
        """Plans as arrays: channels kept ``[n, groups]`` and format codes ``[n, weight layers]``."""
        keeps = np.tile(self._sizes, (len(plans), 1))
        codes = np.zeros((len(plans), len(self.layer_names)), dtype=np.int64)
        for row, plan in enumerate(plans):
            if isinstance(plan.base, Student):
                raise UsageError(
                    "the plan starts from a student model, which has another graph; lower the student's own graph and "
                    "price the plan's groups and layers there"
                )
            for name, kept in plan.groups.items():
                column = self._column.get(name)
                if column is None or not 1 <= kept <= self._sizes[column]:
                    raise self._group_error(name, kept)
                keeps[row, column] = kept
            for name, layer_plan in plan.layers.items():
                known = self._codes_by_id.get(id(layer_plan))
                place = self._layer_column.get(name)
                if place is None:
                    raise unknown_name("weight layer", name, self.layer_names)
                codes[row, place] = known[0] if known is not None else self._code(layer_plan)
        return keeps, codes

    def _code(self, layer_plan: LayerPlan) -> int:
        code = self._codes.get(layer_plan)
        if code is None:
            code = self._codes[layer_plan] = len(self._formats)
            self._formats.append(layer_plan)
        if len(self._codes_by_id) < 100_000:
            # Keeping the object keeps its id from being given to another.
            self._codes_by_id[id(layer_plan)] = (code, layer_plan)
        return code

    def _group_error(self, name: str, kept: int) -> UsageError:
        if name not in self._column:
            return unknown_name("group", name, self.group_ids)
        return UsageError(f"group {name!r} has {self._sizes[self._column[name]]} channels; cannot keep {kept}")

    # ---------------------------------------------------------------------------------------------- pricing

    def price(self, plans: Sequence[CompressionPlan]) -> PriceTable:
        """The costs of plans; see ``price_arrays`` for a search that never builds them."""
        return self.price_arrays(*self.encode(plans))

    def price_arrays(self, keeps: np.ndarray, formats: np.ndarray) -> PriceTable:
        """The costs of encoded plans.

        Args:
            keeps: ints ``[n, groups]``: channels each group keeps, in the order of ``group_ids``.
            formats: ints ``[n, weight layers]``: indices into ``formats``, in the order of ``layer_names``.
        """
        keeps, formats = np.asarray(keeps, dtype=np.int64), np.asarray(formats, dtype=np.int64)
        if keeps.shape != (len(formats), len(self.group_ids)) or formats.shape != (len(keeps), len(self.layer_names)):
            raise UsageError(
                f"keeps {keeps.shape} and formats {formats.shape} must be [n, {len(self.group_ids)}] and "
                f"[n, {len(self.layer_names)}]"
            )
        tables = [
            self._table(self._terms(keeps[start : start + CHUNK], formats[start : start + CHUNK]))
            for start in range(0, max(len(keeps), 1), CHUNK)
        ]
        return PriceTable(
            latency_ms=np.concatenate([t.latency_ms for t in tables]),
            size_bytes=np.concatenate([t.size_bytes for t in tables]),
            peak_memory_bytes=np.concatenate([t.peak_memory_bytes for t in tables]),
            macs=np.concatenate([t.macs for t in tables]),
            energy_mj=_joined([t.energy_mj for t in tables]),
        )

    def estimate(self, plan: CompressionPlan) -> Estimate:
        """One plan in detail: bounds, milliseconds by layer, and what of it the profile has never measured.

        ``per_kernel`` holds a layer's kernels under its name, and quantizing, dequantizing and reordering a tensor
        under ``edge:<tensor>``; with ``cold weights`` and ``overhead`` they add up to the latency.
        """
        keeps, formats = self.encode([plan])
        lines: list[tuple[str, str, float, bool]] = []

        def record(label: str, kind: str, microseconds: Number, mask: Mask, whole: bool) -> None:
            if mask.any():
                lines.append((label, kind, float(np.asarray(microseconds).reshape(-1)[0]), whole))

        terms = self._terms(keeps, formats, record)
        table = self._table(terms)
        fit = self._fit()
        per_kernel: dict[str, float] = {}
        unmodelled: dict[str, None] = {}
        for label, kind, microseconds, whole in lines:
            family = KINDS[kind]
            key = f"edge:{label}" if family == "boundary" else label
            share = fit.scales[FAMILIES.index(family)] * microseconds + (fit.per_kernel_us if whole else 0.0)
            per_kernel[key] = per_kernel.get(key, 0.0) + share * 1e-3
            if kind in self._missing:
                unmodelled.setdefault(f"{label} ({kind})")
        for layer in self.graph.layers:
            if layer.op not in self.modelled:
                unmodelled.setdefault(f"{layer.name} ({layer.op})")
        latency = float(table.latency_ms[0])
        memory = float(terms.family_us[0, FAMILIES.index(MEMORY)]) * fit.scales[FAMILIES.index(MEMORY)]
        if memory:
            per_kernel["cold weights"] = memory * 1e-3
        per_kernel["overhead"] = latency - sum(per_kernel.values())
        spread = fit.band if not unmodelled else max(fit.band, UNKNOWN_BAND)
        costs = {
            "latency_ms": quantity(latency, spread, self.source),
            "size_bytes": quantity(float(table.size_bytes[0]), fit.size_band, "fitted"),
            "peak_memory_bytes": quantity(float(table.peak_memory_bytes[0]), 0.0, "analytic"),
            "macs": quantity(float(table.macs[0]), 0.0, "analytic"),
        }
        if table.energy_mj is not None:
            costs["energy_mj"] = quantity(float(table.energy_mj[0]), max(spread, UNKNOWN_BAND), "analytic")
        return Estimate(
            target=self.profile.name,
            costs=costs,
            per_kernel=per_kernel,
            unmodelled=tuple(unmodelled),
            notes=self._notes(table, formats[0]),
        )

    def calibrate(self, observations: Sequence[Observation | tuple[CompressionPlan, float, float]]) -> Calibration:
        """Corrects the model for this graph with a few plans of it that were exported and measured.

        Args:
            observations: ``(plan, latency in ms, bytes of the file)``, and the kernels of those that were profiled;
                6 to 12, as ``anchors.anchor_plans`` gives.

        Returns:
            The correction, which every price uses from now on, with its errors at observations left out in turn.
        """
        if not observations:
            raise UsageError("calibrate needs at least one (plan, latency_ms, size_bytes)")
        seen = [Observation(*observation) for observation in observations]
        errors: list[float] = []
        size_errors: list[float] = []
        folds = min(FOLDS, len(seen))
        for fold in range(folds) if len(seen) > 2 else ():
            left_out = seen[fold::folds]
            self.calibration = self._fitted([o for index, o in enumerate(seen) if index % folds != fold])
            table = self.price([o.plan for o in left_out])
            errors += [float(ms) / o.latency_ms - 1.0 for ms, o in zip(table.latency_ms, left_out, strict=True)]
            size_errors += [float(b) / o.size_bytes - 1.0 for b, o in zip(table.size_bytes, left_out, strict=True)]
        prior = self._prior()
        self.calibration = replace(
            self._fitted(seen),
            band=max(spread_of(errors, prior.band), self.profile.repeat_floor),
            size_band=max(spread_of(size_errors, prior.size_band), 0.002),
            errors=tuple(errors),
            observations=len(seen),
        )
        return self.calibration

    def adopt(self, other: Skeleton) -> None:
        """Prices follow another skeleton's corrections from now on: this graph is a smaller form of the other's."""
        self.calibration = other.calibration

    def _fitted(self, seen: Sequence[Observation]) -> Calibration:
        """The correction by some observations, without its errors."""
        trust = self._refine(seen)
        terms = self._terms(*self.encode([observation.plan for observation in seen]))
        prior = self._prior()
        latency_us = np.array([observation.latency_ms for observation in seen]) * 1e3
        scales, per_kernel_us, per_run_us = fit_latency(terms.family_us, terms.kernels, latency_us, prior, trust)
        size_bytes = np.array([observation.size_bytes for observation in seen], dtype=float)
        size = fit_size(terms.size_payload, terms.size_counts, size_bytes, prior.size_coefficients)
        return Calibration(
            scales=scales, per_kernel_us=per_kernel_us, per_run_us=per_run_us, size_coefficients=size
        )  # fmt: skip

    def _refine(self, seen: Sequence[Observation]) -> float:
        """Corrects the costs of single kernels; returns how many times nearer they come by that."""
        return 1.0

    # ------------------------------------------------------------------------------------------------ terms

    def _fit(self) -> Calibration:
        return self.calibration or self._prior()

    def _table(self, terms: Terms) -> PriceTable:
        fit = self._fit()
        latency = terms.family_us @ np.array(fit.scales) + fit.per_kernel_us * terms.kernels + fit.per_run_us
        # A sum of corrections must not take a tiny model below what its kernels cost at the very least.
        latency = np.maximum(latency, 0.1 * terms.family_us.sum(axis=1))
        size = terms.size_payload + terms.size_counts @ np.array(fit.size_coefficients)
        energy = terms.energy_mj
        if energy is not None and self.profile.energy is not None:
            # Milliwatts for microseconds are nanojoules.
            energy = energy + self.profile.energy.static_mw * latency * 1e-6
        return PriceTable(latency * 1e-3, np.rint(size).astype(np.int64), terms.peak, terms.macs, energy)

    def _members(self) -> dict[str, list[tuple[int, int, int]]]:
        """For each tensor that shrinks: (axis, column of its group, repeat)."""
        table: dict[str, list[tuple[int, int, int]]] = {}
        for column, group in enumerate(self.graph.groups):
            for member in group.members:
                table.setdefault(member.tensor, []).append((member.axis, column, member.repeat))
        return table

    def _dims(self, keeps: np.ndarray) -> Mapping[str, tuple[Number, ...]]:
        dims: dict[str, tuple[Number, ...]] = {name: tensor.shape for name, tensor in self.graph.tensors.items()}
        removed = np.ascontiguousarray((self._sizes - keeps).T)
        shared: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for name, members in self._shrinking.items():
            shape = list(dims[name])
            for axis in {axis for axis, _, _ in members}:
                cuts = tuple(sorted((column, repeat) for a, column, repeat in members if a == axis))
                key = ((-1, int(self.graph.tensors[name].shape[axis])), *cuts)
                if key not in shared:
                    shared[key] = self.graph.tensors[name].shape[axis] - sum(removed[c] * repeat for c, repeat in cuts)
                shape[axis] = shared[key]
            dims[name] = tuple(shape)
        return dims


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def quantity(value: float, spread: float, source: Source) -> Quantity:
    """A value with its bounds.

    ``spread`` is a fraction; that of an analytic value is a factor, which a value may be off by both ways.
    """
    low = value / (1 + spread) if source == "analytic" else value * (1 - min(spread, 1.0))
    return Quantity(value=value, low=low, high=value * (1 + spread), source=source)
