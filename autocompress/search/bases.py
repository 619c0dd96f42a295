"""What candidates start from: the original, or a student: narrower, shallower, or built anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autocompress.graph.blocks import drop_blocks, find_blocks
from autocompress.graph.read import read_model
from autocompress.hardware.models import CostModel
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import ModelGraph, Original, Student
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


def student_specs(
    graph: ModelGraph,
    harm: Callable[[str], float],
    widths: Sequence[float],
    depths: Sequence[float],
    init: Sequence[str],
) -> list[Student]:
    """The students worth building: the shallowest at full width first, then one step away from it in depth or width.

    Args:
        graph: the original.
        harm: how much the model suffers when one residual block leaves; the least harmful ones leave first.
        widths: shares of all channels; the full width is always among them.
        depths: shares of the residual blocks that can leave which stay.
        init: ``inherit``, ``fresh`` or both.
    """
    blocks = sorted((block.name for block in find_blocks(graph)), key=harm)
    ranked: list[tuple[int, Student]] = []
    if "inherit" in init:
        counts = [(depth, round((1.0 - depth) * len(blocks))) for depth in sorted(depths)]
        for place, (depth, count) in enumerate([c for c in counts if c[1]]):
            for step, width in enumerate(sorted({1.0, *widths}, reverse=True)):
                dropped = tuple(sorted(blocks[:count]))
                ranked.append((place + step, Student(width=width, depth=depth, dropped=dropped)))
    if "fresh" in init:
        ranked += [(1 + step, Student(width=width, init="fresh")) for step, width in enumerate(sorted(widths)[::-1])]
    return [spec for _, spec in sorted(ranked, key=lambda item: item[0])]
