"""A recovered structure made smaller: what it has learned is where the training of a narrower one begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from autocompress.graph.blocks import drop_blocks
from autocompress.graph.executor import GraphModule
from autocompress.methods.database import LayerDatabase
from autocompress.methods.statistics import collect
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph

SAMPLES = 1024
"""Calibration samples that the remaining weights are re-fitted on."""


def narrowed(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    keep: Mapping[str, int],
    dropped: Collection[str],
    batches: Sequence[tuple[torch.Tensor, ...]],
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """Leaves out channels and blocks of a model, and re-fits what stays to the outputs that it had.

    Args:
        graph: of the wider model.
        weights: its float weights.
        keep: channels that stay, by group.
        dropped: residual blocks that leave.
        batches: calibration inputs.

    Returns:
        The smaller graph and its weights.
    """
    some = _first(batches, SAMPLES)
    module = GraphModule(graph, weights).eval()
    database = LayerDatabase(graph, weights, collect(module, some, seed=0))
    groups = {group.id: min(keep.get(group.id, group.size), group.size) for group in graph.groups}
    plan = CompressionPlan(groups=groups, layers={layer.name: LayerPlan() for layer in graph.compressible})
    correction = database.correction(plan)
    with torch.no_grad():
        correction.module(*some[0])
    stitched = correction.result()
    smaller = drop_blocks(stitched.graph, dropped)
    return smaller, {name: stitched.weights[name] for name in smaller.weight_names()}


def _first(batches: Sequence[tuple[torch.Tensor, ...]], count: int) -> list[tuple[torch.Tensor, ...]]:
    found: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        if sum(len(b[0]) for b in found) >= count:
            break
        found.append(batch)
    return found
