"""The number formats worth delivering for a set of widths: formats are cheap to try once the weights are recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph
from autocompress.search.menu import complete

SMALL_SHARE = 0.01
"""A layer with less than this share of the stored numbers keeps 8 bits: 4 would save nothing and may cost quality."""

Allowed = Mapping[str, Sequence[LayerPlan]]


def fastest_compute(graph: ModelGraph, skeleton: Skeleton, plan: CompressionPlan, allowed: Allowed) -> CompressionPlan:
    """Gives each layer the compute type with which the whole plan is fastest.

    Types interact (a change of type between neighbours costs a conversion), so layers are flipped one at a time, the
    best first, from all-int8 and from all-fp32, as long as the prediction falls.
    """
    starts = []
    for compute in ("int8", "fp32"):
        layers = {name: _nearest(allowed[name], compute, form.storage.bits) for name, form in plan.layers.items()}
        starts.append(plan.model_copy(update={"layers": layers}))
    best, best_ms = plan, float("inf")
    for start in starts:
        current, current_ms = start, float(skeleton.price([start]).latency_ms[0])
        while True:
            flips = []
            for name, form in current.layers.items():
                other = _nearest(allowed[name], "fp32" if form.compute == "int8" else "int8", form.storage.bits)
                if other != form:
                    flips.append(current.model_copy(update={"layers": {**current.layers, name: other}}))
            if not flips:
                break
            times = skeleton.price(flips).latency_ms
            index = int(times.argmin())
            if times[index] >= current_ms * 0.998:
                break
            current, current_ms = flips[index], float(times[index])
        if current_ms < best_ms:
            best, best_ms = current, current_ms
    return best


def variants(graph: ModelGraph, skeleton: Skeleton, plan: CompressionPlan, allowed: Allowed) -> list[CompressionPlan]:
    """Format assignments for the widths of ``plan``: its own, then the fastest types with 8-bit and 4-bit weights.

    Variants that another one beats in predicted time, at no larger size and no fewer bits, are left out.
    """
    total = sum(graph.tensors[layer.inputs[1]].elements for layer in graph.compressible)
    found: dict[str, CompressionPlan] = {}
    proposals = [plan] if plan.layers else []
    for compute, bits in (("int8", 8), ("int8", 4), ("fp32", 4)):
        layers = {}
        for layer in graph.compressible:
            share = graph.tensors[layer.inputs[1]].elements / total
            wanted = 8 if bits == 4 and share < SMALL_SHARE else bits
            layers[layer.name] = _nearest(allowed[layer.name], compute, wanted)
        uniform = plan.model_copy(update={"layers": layers})
        # All-fp32 compute needs no scales for activations: with 4-bit weights it is the smallest file.
        proposals.append(uniform if compute == "fp32" else fastest_compute(graph, skeleton, uniform, allowed))
    for proposal in proposals:
        done = complete(graph, proposal)
        found.setdefault(done.structure_digest, done)
    plans = list(found.values())
    table = skeleton.price(plans)
    kept = []
    for i, candidate in enumerate(plans):
        worse = any(
            table.latency_ms[j] < 0.98 * table.latency_ms[i]
            and table.size_bytes[j] < 1.02 * table.size_bytes[i]
            and bits_of(plans[j]) >= bits_of(plans[i])
            for j in range(len(plans))
        )
        if not worse:
            kept.append(candidate)
    return kept


def _nearest(allowed: Sequence[LayerPlan], compute: str, bits: int) -> LayerPlan:
    """The allowed format nearest to the one wanted; integer kernels read 8-bit weights where 32 bits were asked for."""
    return min(allowed, key=lambda f: (f.compute != compute, abs(f.storage.bits - bits)))


def bits_of(plan: CompressionPlan) -> int:
    """The bits of all layers added up: a rough order of how much quality a choice of formats costs."""
    return sum(form.storage.bits for form in plan.layers.values())
