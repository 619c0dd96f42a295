"""What candidates start from: the original, or a student: narrower, shallower, or built anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autocompress.graph.blocks import drop_blocks
from autocompress.graph.read import read_model
from autocompress.hardware.models import CostModel
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, ModelGraph, Original, Student
from autocompress.search.menu import complete
from autocompress.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Base:
    """A model that plans refer to.

    Attributes:
        spec: what the plan says of it.
        graph: the whole base, before its channels are pruned.
        weights: its float weights; None for a student that inherits, whose weights come from the original's.
        skeleton: prices plans of this graph.
    """

    spec: Original | Student
    graph: ModelGraph
    weights: Mapping[str, torch.Tensor] | None
    skeleton: Skeleton

    @property
    def fresh(self) -> bool:
        return isinstance(self.spec, Student) and self.spec.init == "fresh"


def build_student(task: Task, original: Base, spec: Student, cost_model: CostModel, seed: int) -> Base | None:
    """Makes a student's base; None where the task's factory cannot build it or it is no smaller than the original."""
    if spec.init == "inherit":
        graph, weights = drop_blocks(original.graph, spec.dropped), None
    else:
        arguments = {"width": spec.width} if spec.width != 1.0 else {}
        if task.factory is None or not arguments or not set(arguments) <= task.accepts:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = task.factory(**arguments)
        graph, weights = read_model(module, task.example_inputs)
        if graph.macs() >= original.graph.macs():
            return None
    skeleton = cost_model.lower(graph)
    skeleton.adopt(original.skeleton)
    return Base(spec, graph, weights, skeleton)


def on_base(plan: CompressionPlan, base: Base) -> CompressionPlan:
    """A plan of the original's, on a base that lacks some of its layers."""
    layers = {layer.name: plan.layers[layer.name] for layer in base.graph.compressible}
    groups = {group.id: plan.groups[group.id] for group in base.graph.groups if group.id in plan.groups}
    return complete(base.graph, CompressionPlan(base=base.spec, groups=groups, layers=layers))


def shallow_specs(blocks: Sequence[str], depths: Sequence[float]) -> list[Student]:
    """Students of the original's widths that lack residual blocks, the shallowest first.

    Args:
        blocks: the residual blocks that can leave, in the order in which they should.
        depths: shares of them that stay; those that leave all of them have none.
    """
    counts = dict.fromkeys(round((1.0 - depth) * len(blocks)) for depth in sorted(depths))
    return [
        Student(width=1.0, depth=1.0 - count / len(blocks), dropped=tuple(sorted(blocks[:count])))
        for count in counts
        if count
    ]


def fresh_specs(widths: Sequence[float]) -> list[Student]:
    """Narrower students with weights of their own, the widest first."""
    return [Student(width=width, init="fresh") for width in sorted(widths, reverse=True)]
