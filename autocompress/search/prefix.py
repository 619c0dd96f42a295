"""Judges plans that differ little from a base plan: what lies before the first difference is computed once.

A pass over the base plan stops wherever some plan begins to differ, and the passes of those plans begin there.  Only
the activations that are read from there on are kept, so memory does not grow with depth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.channel_correction import StatisticsCorrection
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.simulation import build_compressed
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph
from autocompress.progress import Progress
from autocompress.search.evaluate import WORST, StitchedEvaluator
from autocompress.search.failures import is_expected, reason_of
from autocompress.search.seeds import Judge
from autocompress.search.together import together

logger = logging.getLogger(__name__)


class _Line:
    """A pass over a module, as far as it has come."""

    def __init__(self, module: GraphModule, inputs: torch.Tensor) -> None:
        self.module = module
        self.values = module.enter(inputs)
        self.position = 0

    def go(self, position: int) -> None:
        self.module.advance(self.values, self.position, position)
        self.position = position

    def branch(self, taps: dict[str, Tap], base: dict[str, Tap]) -> dict[str, torch.Tensor]:
        """The activations here as another plan has them, which may round what the base leaves as it is."""
        return {
            name: taps[name](value) if name in taps and name not in base else value
            for name, value in self.values.items()
        }


class PrefixJudge:
    """Gives what ``StitchedEvaluator.quick`` gives, for plans that share their first layers with a base plan.

    Args:
        evaluator: builds and judges.
        base: the plan that the others are near.
    """

    def __init__(self, evaluator: StitchedEvaluator, base: CompressionPlan) -> None:
        self.evaluator, self.base = evaluator, base

    def judge(self, plans: Sequence[CompressionPlan]) -> Iterator[tuple[int, float]]:
        """The index of each plan with its divergence, in the order in which they begin to differ from the base."""
        evaluator = self.evaluator
        stitched = evaluator.database.stitch(self.base)
        starts = [self._start(stitched, plan) for plan in plans]
        inputs, samples = evaluator.correction_inputs, evaluator.quick_inputs
        with torch.no_grad():
            correction = evaluator.correction(self.base)
            correcting = _Line(correction.module, inputs)
            running = _Line(build_compressed(evaluator.build(self.base)), samples)
            for index in sorted(range(len(plans)), key=lambda i: starts[i]):
                start = starts[index]
                correcting.go(start)
                running.go(start)
                try:
                    own = evaluator.correction(plans[index])
                    module = build_compressed(self._corrected(own, start, correction, correcting))
                    values = running.branch(module.taps, running.module.taps) if start else module.enter(samples)
                    module.advance(values, start, len(module.graph.layers))
                    divergence = evaluator.divergence(module.leave(values).float())
                except Exception as error:
                    # A swap that cannot be built or run counts as the worst there is; the others are judged.
                    logger.warning("a sensitivity is unknown: %s", reason_of(error), exc_info=not is_expected(error))
                    divergence = WORST
                yield index, divergence

    def _start(self, base: CompressedModel, plan: CompressionPlan) -> int:
        """Where a plan begins to differ; at the beginning where it cannot be stitched, which is told when judged."""
        database = self.evaluator.database
        try:
            return first_difference(database.graph, base, database.stitch(plan))
        except Exception:
            return 0

    def _corrected(
        self, own: StatisticsCorrection, start: int, base: StatisticsCorrection, line: _Line
    ) -> CompressedModel:
        """A plan's model, its layers up to ``start`` corrected as the base's were."""
        layers = own.module.graph.layers
        for layer in layers[:start]:
            for name in layer.weights:
                own.weights[name] = base.weights[name]
            if layer.name in base.scales:
                own.scales[layer.name] = base.scales[layer.name]
        values = line.branch(own.taps, base.taps) if start else own.module.enter(self.evaluator.correction_inputs)
        own.module.advance(values, start, len(layers))
        return own.result()


def side_by_side(judge: Judge, progress: Progress) -> Judge:
    """Judges halves of the plans at once, each with half of the threads: a forward pass keeps few of them busy.

    Last digits then differ from those of one pass with all threads.
    """

    def both(plans: Sequence[CompressionPlan]) -> Iterator[tuple[int, float]]:
        count = min(2, torch.get_num_threads(), len(plans)) or 1
        parts = [range(first, len(plans), count) for first in range(count)]

        def job(part: range, each: Progress) -> list[tuple[int, float]]:
            found = []
            for index, divergence in judge([plans[i] for i in part]):
                each.advance()
                found.append((part[index], divergence))
            return found

        for result in together([partial(job, part) for part in parts], progress):
            if isinstance(result, Exception):
                raise result
            yield from result

    return both


def first_difference(graph: ModelGraph, base: CompressedModel, other: CompressedModel) -> int:
    """The position of the first layer that computes something else, or reads something else, than in the base.

    Args:
        graph: of the original model, which both were made from.
        base: as stitched.
        other: as stitched.
    """
    size = {group.id: group.size for group in graph.groups}
    sliced = {
        member.tensor
        for group in graph.groups
        for member in group.members
        if other.plan.groups.get(group.id, size[group.id]) != base.plan.groups.get(group.id, size[group.id])
    }
    formats = base.plan.activations.keys() | other.plan.activations.keys()
    rounded = {name for name in formats if _rounding(base, name) != _rounding(other, name)}
    # A tensor that the base leaves as it is can be rounded when it is first read; else it must be made again.
    made = {name for name in rounded if name in base.plan.activations}
    if made.intersection(graph.inputs):
        return 0
    for position, layer in enumerate(graph.layers):
        reads = rounded.intersection(layer.activations) or sliced.intersection(layer.weights)
        if reads or made.intersection(layer.outputs) or _plan(base, layer.name) != _plan(other, layer.name):
            return position
    return len(graph.layers)


def _plan(compressed: CompressedModel, layer: str) -> LayerPlan:
    return compressed.plan.layers.get(layer, LayerPlan())


def _rounding(compressed: CompressedModel, tensor: str) -> tuple[object, ...]:
    return compressed.plan.activations.get(tensor), compressed.ranges.get(tensor)
