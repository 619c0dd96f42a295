"""Finds the channels that must shrink together, and proves that they can.

Every group found is proved before it is offered: one channel is taken away and the graph is run on meta tensors.
A group whose removal breaks the graph, changes the model's output, or touches something that cannot be sliced is
skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from autocompress.graph.flow import Flow, Place, along_axis, narrowed, varying_axes
from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.graph.shapes import on_meta, trace_shapes
from autocompress.plan import Group, Layer, Member, ModelGraph


class _Unsupported(Exception):
    """Why a group cannot be pruned."""


def find_groups(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The prunable groups in execution order, and for each weight layer that has none the reason."""
    shells = on_meta(graph, weights)
    try:
        flow = Flow(graph, weights)
    except Exception as error:
        # Models are arbitrary code: one that cannot be followed is still quantized and distilled.
        reason = f"channels cannot be pruned: they could not be followed ({type(error).__name__}: {str(error)[:120]})"
        return (), {layer.name: reason for layer in graph.compressible}
    makers = {place.tensor: place for place in flow.places if place.role == "out"}
    linked = _linked(flow, makers.values())
    produced = {place.tensor: place for place in flow.places if place.role != "in"}
    layers_of: dict[int, list[Layer]] = {}
    skipped: dict[str, str] = {}
    for layer in graph.compressible:
        place = produced.get(layer.inputs[1])
        if place is None:
            skipped[layer.name] = f"channels cannot be pruned: {layer.op} of this form is not followed"
            continue
        for number in dict.fromkeys(linked[flow.classes[place.labels.numpy()]].tolist()):
            layers_of.setdefault(number, []).append(layer)
    stuck: dict[int, str] = {}
    for found, reason in flow.frozen.items():
        stuck.setdefault(int(linked[found]), reason)
    activations, tangled = _activation_members(graph, flow, linked)
    found_groups: list[Group] = []
    layers_by_group: dict[str, list[Layer]] = {}
    for number, layers in layers_of.items():
        try:
            if number in stuck:
                raise _Unsupported(stuck[number])
            if number in tangled:
                raise _Unsupported(tangled[number])
            group = _to_group(number, layers, flow, linked)
            found_groups.append(group.model_copy(update={"members": (*group.members, *activations.get(number, ()))}))
            layers_by_group[group.id] = layers
        except _Unsupported as error:
            for layer in layers:
                skipped.setdefault(layer.name, f"channels cannot be pruned: {error}")
    groups = tuple(found_groups)
    if _fault(groups, graph, shells, example_inputs) is None:
        return groups, skipped
    faults = {group.id: _fault((group,), graph, shells, example_inputs) for group in groups}
    for name, fault in faults.items():
        if fault is not None:
            skipped |= {layer.name: f"channels cannot be pruned: {fault}" for layer in layers_by_group[name]}
    return tuple(group for group in groups if faults[group.id] is None), skipped


def _linked(flow: Flow, makers: Iterable[Place]) -> np.ndarray:
    """For each class of labels the number of its group: what one layer makes is chosen among together."""
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    for place in makers:
        found = flow.classes[place.labels.numpy()]
        pairs.append(np.stack([found, np.full_like(found, found[0])]))
    rows, columns = np.concatenate(pairs, axis=1)
    count = int(flow.classes.max()) + 1
    _, linked = connected_components(coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), (count, count)), False)
    return np.asarray(linked)


def _to_group(number: int, layers: list[Layer], flow: Flow, linked: np.ndarray) -> Group:
    """Finds where each channel of a group stands in every stored tensor."""
    root = layers[0]
    own = next(place for place in flow.places if place.tensor == root.inputs[1] and place.role != "in")
    found = flow.classes[own.labels.numpy()]
    channels = list(dict.fromkeys(found[linked[found] == number].tolist()))
    if len(channels) < 2:
        raise _Unsupported("there are fewer than two that can be told apart")
    if len(channels) < int((linked == number).sum()):
        raise _Unsupported(f"some of those tied to them are not made by {root.name}")
    rank = np.full(len(linked), -1)
    rank[channels] = np.arange(len(channels))
    members: dict[tuple[str, int], Member] = {}
    for place in flow.places:
        ranks = rank[flow.classes[place.labels.numpy()]]
        positions = np.flatnonzero(ranks >= 0)
        if not len(positions):
            continue
        offset, repeat = int(positions[0]), len(positions) // len(channels)
        expected = np.repeat(np.arange(len(channels)), repeat)
        contiguous = len(positions) == len(expected) and positions[-1] - positions[0] + 1 == len(positions)
        if not contiguous or not np.array_equal(ranks[positions], expected):
            raise _Unsupported(f"they are interleaved with others in {place.tensor}")
        members[place.tensor, place.axis] = Member(
            tensor=place.tensor, axis=place.axis, role=place.role, offset=offset, repeat=repeat
        )
    return Group(id=root.name, kind="channel", size=len(channels), members=tuple(members.values()))


def _activation_members(
    graph: ModelGraph, flow: Flow, linked: np.ndarray
) -> tuple[dict[int, list[Member]], dict[int, str]]:
    """For each group, the axes of activations that carry it; and the groups that one carries along several axes."""
    sizes = np.bincount(linked)
    members: dict[int, list[Member]] = {}
    tangled: dict[int, str] = {}
    for name, labels in flow.values.items():
        tensor = graph.tensors[name]
        if not tensor.dtype.startswith("float") or labels.dim() == 0:
            continue
        (narrow,) = narrowed(labels)
        numbers = torch.from_numpy(linked[flow.classes[narrow.numpy()]])
        axes = varying_axes(torch.from_numpy(flow.classes[narrow.numpy()]))
        if len(axes) > 1:
            tangled |= dict.fromkeys(numbers.flatten().tolist(), f"{name} carries them along more than one axis")
        if len(axes) != 1:
            continue
        axis = _without_batch(tuple(labels.shape), tensor.shape, axes[0])
        along = along_axis(numbers, axes[0]).numpy()
        for number, first, count in zip(*np.unique(along, return_index=True, return_counts=True), strict=True):
            if count % sizes[number]:
                tangled[int(number)] = f"{name} carries only some of them"
                continue
            member = Member(
                tensor=name, axis=axis, role="activation", offset=int(first), repeat=int(count // sizes[number])
            )
            members.setdefault(int(number), []).append(member)
    return members, tangled


def _without_batch(shape: tuple[int, ...], one_sample: tuple[int, ...], axis: int) -> int:
    """Where an axis of a batch of one stands once the batch is left out.

    >>> _without_batch((1, 64, 8, 8), (64, 8, 8), 1), _without_batch((197, 1, 768), (197, 768), 2)
    (0, 1)
    """
    if len(shape) == len(one_sample):
        return axis
    batch = next(a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == one_sample)
    return axis - (batch < axis)


def _fault(
    groups: tuple[Group, ...],
    graph: ModelGraph,
    shells: Mapping[str, torch.Tensor],
    example_inputs: tuple[torch.Tensor, ...],
) -> str | None:
    """Takes one channel of each group away and runs the graph: what is wrong with the groups, or None."""
    trial = graph.model_copy(update={"groups": groups})
    kept = {group.id: torch.arange(group.size - 1) for group in groups}
    smaller = rewrite(trial, {name: len(channels) for name, channels in kept.items()})
    try:
        shapes = trace_shapes(smaller, slice_weights(trial, shells, kept), example_inputs)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"the model does not run without one of them ({lines[0][:100]})"
    for name, tensor in shapes.items():
        if tensor.shape != smaller.tensors[name].shape:
            return f"without one of them {name} has shape {tensor.shape}, not {smaller.tensors[name].shape}"
    return None
