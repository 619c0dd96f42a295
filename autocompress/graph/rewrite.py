"""Structured channel pruning: a group's channels leave every tensor that produces, carries or reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.errors import UsageError
from autocompress.plan import Group, Layer, ModelGraph


def rewrite(graph: ModelGraph, keep: Mapping[str, int]) -> ModelGraph:
    """The graph with groups shrunk to ``keep[group]`` channels; groups that are not named stay whole."""
    sizes: dict[str, list[int]] = {}
    groups: list[Group] = []
    known = {group.id for group in graph.groups}
    for name in keep:
        if name not in known:
            raise UsageError(f"the plan prunes {name!r}, which is no group of this model; groups: {sorted(known)}")
    for group in graph.groups:
        kept = keep.get(group.id, group.size)
        if not 1 <= kept <= group.size:
            raise UsageError(f"group {group.id!r} has {group.size} channels; cannot keep {kept}")
        groups.append(group.model_copy(update={"size": kept}))
        if kept == group.size:
            continue
        for member in group.members:
            shape = sizes.setdefault(member.tensor, list(graph.tensors[member.tensor].shape))
            shape[member.axis] -= (group.size - kept) * member.repeat
    tensors = dict(graph.tensors)
    for name, shape in sizes.items():
        tensors[name] = tensors[name].model_copy(update={"shape": tuple(shape)})
    layers = tuple(_regroup(layer, graph, sizes) for layer in graph.layers)
    return graph.model_copy(update={"layers": layers, "tensors": tensors, "groups": tuple(groups)})


def _regroup(layer: Layer, graph: ModelGraph, sizes: Mapping[str, list[int]]) -> Layer:
    """A grouped convolution loses whole groups, a depthwise one as many as channels."""
    weight = layer.inputs[1] if layer.op == "Conv" else ""
    count = layer.attributes.get("group", 1)
    if weight in sizes and isinstance(count, int) and count > 1:
        kept = count * sizes[weight][0] // graph.tensors[weight].shape[0]
        return layer.model_copy(update={"attributes": {**layer.attributes, "group": kept}})
    return layer


Slices = dict[str, list[tuple[int, torch.Tensor]]]
"""For a stored tensor, the indices (int64, ascending) that remain along each axis that lost some."""


def slices_of(graph: ModelGraph, kept: Mapping[str, torch.Tensor]) -> Slices:
    """What remains of each stored tensor when each group keeps the channels ``kept[group]`` (int64, ascending)."""
    chosen: dict[tuple[str, int], torch.Tensor] = {}
    for group in graph.groups:
        if group.id not in kept or len(kept[group.id]) == group.size:
            continue
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[kept[group.id].cpu()] = True
        for member in group.members:
            if member.role == "activation":
                continue
            key = (member.tensor, member.axis)
            if key not in chosen:
                chosen[key] = torch.ones(graph.tensors[member.tensor].shape[member.axis], dtype=torch.bool)
            places = slice(member.offset, member.offset + group.size * member.repeat)
            chosen[key][places] = stays.repeat_interleave(member.repeat) if member.repeat > 1 else stays
    found: Slices = {}
    for (name, axis), mask in chosen.items():
        found.setdefault(name, []).append((axis, mask.nonzero().flatten()))
    return found


def take(weight: torch.Tensor, slices: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The part of a tensor that remains; gradients flow back to the whole."""
    for axis, index in slices:
        weight = weight.index_select(axis, index.to(weight.device))
    return weight


def slice_weights(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights that remain when each group keeps the channels ``kept[group]`` (int64 indices, ascending)."""
    result = dict(weights)
    for name, slices in slices_of(graph, kept).items():
        result[name] = take(result[name], slices)
    return result
