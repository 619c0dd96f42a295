"""What candidates start from: the original, or a student built by the task's own model factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autocompress.graph.read import read_model
from autocompress.hardware.cost import FittedCostModel, Skeleton
from autocompress.plan import ModelGraph, Original, Student
from autocompress.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Base:
    """A model that plans refer to.

    Attributes:
        spec: what the plan says of it.
        graph: the whole base.
        weights: its float weights: trained for the original, copied or fresh for a student.
        skeleton: prices plans of this graph.
        stitched: whether the database of compressed layers knows it; a student has to be trained to be judged.
    """

    spec: Original | Student
    graph: ModelGraph
    weights: Mapping[str, torch.Tensor]
    skeleton: Skeleton
    stitched: bool

    @property
    def fresh(self) -> bool:
        return isinstance(self.spec, Student) and self.spec.init == "fresh"


def build_student(task: Task, original: Base, spec: Student, cost_model: FittedCostModel, seed: int) -> Base | None:
    """Builds a student with the task's factory; None where the factory cannot make it or it is no smaller.

    An inheriting student keeps the original's weights by name, which needs equal shapes: a shallower network of the
    same widths.  A narrower one that inherits is the original with its groups pruned, and needs no factory.
    """
    arguments = {}
    if spec.width != 1.0:
        arguments["width"] = spec.width
    if spec.depth != 1.0:
        arguments["depth"] = spec.depth
    if task.factory is None or not arguments or not set(arguments) <= task.accepts:
        return None
    if spec.init == "inherit" and spec.width != 1.0:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = task.factory(**arguments)
    graph, weights = read_model(module, task.example_inputs)
    if graph.macs() >= original.graph.macs():
        return None
    if spec.init == "inherit":
        for name, value in original.weights.items():
            if name in weights and weights[name].shape == value.shape:
                weights[name] = value.clone()
    return Base(spec, graph, weights, cost_model.lower(graph), stitched=False)


def student_specs(
    task: Task, widths: tuple[float, ...], depths: tuple[float, ...], init: tuple[str, ...]
) -> list[Student]:
    """The students worth building for a task, those that inherit first."""
    specs = []
    if "inherit" in init and "depth" in task.accepts:
        specs += [Student(width=1.0, depth=depth) for depth in sorted(depths, reverse=True)]
    if "fresh" in init and "width" in task.accepts:
        specs += [Student(width=width, init="fresh") for width in sorted(widths, reverse=True)]
    return specs
