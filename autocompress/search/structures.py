"""What may be recovered: sets of widths of the original and of shallower models, priced, and which contain which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.graph.blocks import drop_blocks, find_blocks
from autocompress.graph.executor import build_module
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Original, Student
from autocompress.search.bases import Base, build_student, fresh_specs, shallow_specs
from autocompress.search.context import Context, priced
from autocompress.search.recover import Recovered
from autocompress.search.study import Scored

SHARES = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25, 0.1875, 0.125)
"""Widths of the middle of a student, as shares of the original's channels."""

TAPERS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How much wider the last layers are than the first, relative to the original."""


@dataclass
class Structure:
    """A set of widths on its way up the ladder.

    Attributes:
        base: what its plan refers to.
        plan: the widths; formats where the candidate was judged in some.
        costs: the least of each predicted cost over the formats it may be delivered in.
        macs: multiply-accumulates as a share of the original's.
        parameters: likewise.
        left_out: share of the residual blocks that can leave which did.
        work: time of a training step, likewise, as far as it follows from layers and activations.
        divergence: of what is stitched for it; None where nothing was.
        recovered: its weights after the last rung.
        rung: how often it was trained.
    """

    base: Base
    plan: CompressionPlan
    costs: Mapping[str, float]
    macs: float
    parameters: float
    left_out: float
    work: float
    divergence: float | None = None
    recovered: Recovered | None = None
    rung: int = 0

    @property
    def key(self) -> str:
        return self.plan.shape_digest

    @property
    def id(self) -> str:
        """What tables call it."""
        return id_of(self.key)

    @property
    def kind(self) -> str:
        """What it starts from: the original, a student, or one with fresh weights."""
        return "fresh" if self.base.fresh else self.base.spec.kind

    @property
    def dropped(self) -> frozenset[str]:
        """The residual blocks that it has not."""
        return frozenset(self.base.spec.dropped) if isinstance(self.base.spec, Student) else frozenset()

    def contains(self, other: Structure) -> bool:
        """Whether the other is this one with blocks and channels left out."""
        if self.base.fresh or other.base.fresh or not self.dropped <= other.dropped:
            return False
        own, groups = self.plan.groups, {group.id: group.size for group in other.base.graph.groups}
        return all(own.get(name, size) >= other.plan.groups.get(name, size) for name, size in groups.items())


class Bases:
    """The bases of one run, made when first asked for.

    Args:
        context: of the run.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._made: dict[Student, Base | None] = {}
        self._harms: dict[str, float] = {}

    def __call__(self, spec: Original | Student) -> Base | None:
        """The base that a plan stands on; None where it cannot be built, which is noted."""
        context = self.context
        if isinstance(spec, Original):
            return context.original
        if spec not in self._made:
            try:
                self._made[spec] = build_student(
                    context.task, context.original, spec, context.cost_model, context.config.seed
                )
            except Exception as error:  # The caller's own factory may do anything.
                self._made[spec] = None
                context.delivery.fail(f"student-{spec.init}-{spec.width:g}-{spec.depth:g}", error)
        return self._made[spec]

    @property
    def made(self) -> list[Base]:
        """Those that were, beside the original."""
        return [base for base in self._made.values() if base is not None]

    def harm(self, block: str) -> float:
        """The divergence of the original without one residual block."""
        if block not in self._harms:
            evaluator = self.context.evaluator
            graph = drop_blocks(self.context.original.graph, [block])
            self._harms[block] = evaluator.divergence_of(build_module(graph, evaluator.database.weights))
        return self._harms[block]


def id_of(key: str) -> str:
    """What tables call a structure, of whose key they show the beginning."""
    return f"s{key[:7]}"


def stitched(context: Context, scored: Sequence[Scored]) -> list[Structure]:
    """The widths of stitched candidates, each with the least divergence that was seen for it."""
    best: dict[str, Scored] = {}
    for s in sorted(scored, key=lambda s: (s.divergence, s.number)):
        best.setdefault(s.plan.shape_digest, s)
    found = structures_of(context, context.original, [s.plan for s in best.values()])
    for structure, s in zip(found, best.values(), strict=True):
        structure.divergence = s.divergence
    return found


def students(context: Context, bases: Bases) -> list[Structure]:
    """Shallower models at many widths, none of them judged; the least harmful residual blocks leave first."""
    offered = context.space.students
    if "inherit" not in offered.init or not offered.depths:
        return []
    blocks = sorted((block.name for block in find_blocks(context.original.graph)), key=bases.harm)
    options = {knob.group: [o.keep for o in knob.options if o.keep] for knob in context.menu.knobs if knob.group}
    found: dict[str, Structure] = {}
    for spec in shallow_specs(blocks, offered.depths):
        base = bases(spec)
        if base is None:
            continue
        plans = [CompressionPlan(base=spec, groups=groups) for groups in _widths(base.graph, options)]
        for structure in structures_of(context, base, plans):
            found.setdefault(structure.key, structure)
    return list(found.values())


def fresh_students(context: Context, bases: Bases) -> list[Structure]:
    """Narrower models with weights of their own, the widest first."""
    offered = context.space.students
    found = []
    for spec in fresh_specs(offered.widths) if "fresh" in offered.init else []:
        base = bases(spec)
        if base is not None:
            found += structures_of(context, base, [CompressionPlan(base=spec)])
    return found


def _widths(graph: ModelGraph, options: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Channels of each group, of those on offer: every share of ``SHARES`` with every taper."""
    made = {name: place for place, layer in enumerate(graph.layers) for name in layer.weights}
    first = {
        group.id: min((made[m.tensor] for m in group.members if m.tensor in made), default=0) for group in graph.groups
    }
    places = {name: place / max(len(first) - 1, 1) for place, name in enumerate(sorted(first, key=lambda g: first[g]))}
    for share in SHARES:
        for taper in TAPERS:
            found = {}
            for group in graph.groups:
                wanted = group.size * share * taper ** (places[group.id] - 0.5)
                found[group.id] = min(options.get(group.id, [group.size]), key=lambda keep: abs(keep - wanted))
            yield found


def structures_of(context: Context, base: Base, plans: Sequence[CompressionPlan]) -> list[Structure]:
    """Plans of one base as structures."""
    if not plans:
        return []
    whole = context.original.skeleton.price([CompressionPlan()])
    table = base.skeleton.price([_with(plan, LayerPlan(), context, base) for plan in plans])
    macs, parameters = table.macs / whole.macs[0], table.size_bytes / whole.size_bytes[0]
    original = context.original.graph
    dropped = base.spec.dropped if isinstance(base.spec, Student) else ()
    left_out = len(dropped) / max(len(find_blocks(original)), 1)
    layers = len(base.graph.compressible) / len(original.compressible)
    whole_work, work = _activations(original, {}), [_activations(base.graph, plan.groups) for plan in plans]
    return [
        Structure(
            base, plan, costs, float(macs[i]), float(parameters[i]), left_out, 0.5 * layers + 0.5 * work[i] / whole_work
        )
        for i, (plan, costs) in enumerate(zip(plans, _least_costs(context, base, plans), strict=True))
    ]


def _activations(graph: ModelGraph, keep: Mapping[str, int]) -> float:
    """Numbers that the weight layers give for one sample."""
    sizes = {layer.outputs[0]: float(graph.tensors[layer.outputs[0]].elements) for layer in graph.compressible}
    for group in graph.groups:
        for member in group.members:
            if member.role == "activation" and member.tensor in sizes:
                sizes[member.tensor] *= keep.get(group.id, group.size) / group.size
    return sum(sizes.values())


def reprice(context: Context, structures: Sequence[Structure]) -> None:
    """Brings costs up to what is predicted now."""
    for base in {id(s.base): s.base for s in structures}.values():
        own = [s for s in structures if s.base is base]
        for structure, costs in zip(own, _least_costs(context, base, [s.plan for s in own]), strict=True):
            structure.costs = costs


def _least_costs(context: Context, base: Base, plans: Sequence[CompressionPlan]) -> list[dict[str, float]]:
    """The least of each predicted cost of each plan, over the formats that all layers can share."""
    table = base.skeleton.price([_with(plan, form, context, base) for plan in plans for form in context.menu.formats])
    columns = {name: np.asarray(getattr(table, name)).reshape(len(plans), -1).min(axis=1) for name in context.costs}
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(len(plans))]


def _with(plan: CompressionPlan, form: LayerPlan, context: Context, base: Base) -> CompressionPlan:
    """The plan with one format in all layers that may take it, and floating point in the others."""
    formats = context.formats
    layers = {
        layer.name: form if form in formats.get(layer.name, (form,)) else LayerPlan()
        for layer in base.graph.compressible
    }
    return priced(plan).model_copy(update={"layers": layers})
