"""Finds the channels that must shrink together, with Torch-Pruning's dependency graph (DepGraph, 2301.12900).

Every group found is proved before it is offered: one channel is taken away and the graph is run on meta tensors.
A group whose removal breaks the graph, changes the model's output, or touches something that cannot be sliced is
skipped with its reason.
"""

from __future__ import annotations

import copy
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autocompress.plan import Group, Layer, Member, ModelGraph
from autocompress.tasks.vision import import_torchvision

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 60
"""Torch-Pruning does not end on some attention models (swin): past this the model has no groups."""


class _Unsupported(Exception):
    """Why a group cannot be pruned."""


def find_groups(
    module: nn.Module, graph: ModelGraph, weights: dict[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The prunable groups in execution order, and for each weight layer that has none the reason."""
    skipped: dict[str, str] = {}
    groups: list[Group] = []
    order = {layer.name: position for position, layer in enumerate(graph.layers)}
    by_path = {layer.module_path: layer for layer in graph.compressible if layer.module_path}
    shared = {
        other for layer in graph.layers for other in (*layer.shared_with, *((layer.name,) if layer.shared_with else ()))
    }
    try:
        with _time_limit(TIME_LIMIT_S):
            raw = list(_dependency_groups(module, example_inputs))
    except Exception as error:
        reason = f"coupled channels could not be traced ({type(error).__name__}: {str(error)[:120]})"
        return (), {layer.name: reason for layer in graph.compressible}
    for producers, items in raw:
        found = [by_path[path] for path in producers if path in by_path]
        if not found:
            continue
        root = min(found, key=lambda layer: order[layer.name])
        try:
            if any(layer.name in shared for layer in found):
                raise _Unsupported("its weights are used more than once")
            group = _to_group(root.name, items, graph, by_path)
            group = _prove(group, graph, weights, example_inputs)
            groups.append(group)
        except _Unsupported as error:
            for layer in found:
                skipped[layer.name] = f"channels cannot be pruned: {error}"
    covered = {m.tensor for group in groups for m in group.members if m.role != "activation"}
    for layer in graph.compressible:
        if layer.name not in skipped and not _produced_by(layer, groups) and layer.inputs[1] not in covered:
            skipped[layer.name] = "channels cannot be pruned: no coupled group was found for it"
    return tuple(sorted(groups, key=lambda g: order[g.id])), skipped


def _produced_by(layer: Layer, groups: list[Group]) -> bool:
    return any(m.tensor == layer.inputs[1] and m.role in ("out", "through") for g in groups for m in g.members)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after ``seconds`` in the main thread of a POSIX process; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _dependency_groups(
    module: nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> Iterator[tuple[list[str], list[tuple[str, type, str, list[int], list[int]]]]]:
    """Torch-Pruning's groups as (producer paths, [(path, module type, in|out, local indices, root indices)])."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_torchvision()
        import torch_pruning as tp

        # Torch-Pruning wants a graph that autograd can walk, whatever the caller froze.
        model = copy.deepcopy(module).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        paths = {id(m): name for name, m in model.named_modules()}
        with torch.enable_grad():
            dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs)
        for group in dependencies.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]):
            items: list[tuple[str, type, str, list[int], list[int]]] = []
            producers: list[str] = []
            for item in group:
                target = item.dep.target.module
                path = paths.get(id(target))
                if path is None:
                    if isinstance(target, nn.Parameter):
                        items.append(("", nn.Parameter, "out", [], []))
                    continue
                side = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
                items.append((path, type(target), side, list(item.idxs), list(item.root_idxs)))
                if side == "out" and isinstance(target, (nn.Conv2d, nn.Linear)):
                    producers.append(path)
            yield producers, items


def _to_group(
    name: str,
    items: list[tuple[str, type, str, list[int], list[int]]],
    graph: ModelGraph,
    by_path: dict[str | None, Layer],
) -> Group:
    """Turns module-level dependencies into axes of stored tensors."""
    members: dict[tuple[str, int], Member] = {}
    size = 0
    for path, kind, side, local, roots in items:
        if kind is nn.Parameter:
            raise _Unsupported("a bare nn.Parameter is coupled to it")
        layer = by_path.get(path)
        if layer is None:
            if issubclass(kind, (nn.Conv2d, nn.Linear)):
                raise _Unsupported(f"{path} is not a layer of the exported graph")
            for affected in _norm_layers(graph, path):
                offset, repeat = _stride(local, roots, path)
                for weight in affected.weights:
                    members[weight, 0] = Member(tensor=weight, axis=0, role="through", offset=offset, repeat=repeat)
            continue
        offset, repeat = _stride(local, roots, path)
        weight = layer.inputs[1]
        shape = graph.tensors[weight].shape
        groups = int(layer.attributes.get("group", 1))  # type: ignore[arg-type]
        depthwise = layer.op == "Conv" and groups > 1 and shape[1] == 1 and groups == shape[0]
        if groups > 1 and not depthwise:
            raise _Unsupported(f"{path} is a grouped convolution ({groups} groups)")
        out_axis = 0 if layer.op == "Conv" or layer.attributes.get("transB") else 1
        if depthwise or side == "out":
            role = "through" if depthwise else "out"
            members[weight, out_axis] = Member(tensor=weight, axis=out_axis, role=role, offset=offset, repeat=repeat)  # type: ignore[arg-type]
            for bias in layer.inputs[2:3]:
                members[bias, 0] = Member(tensor=bias, axis=0, role=role, offset=offset, repeat=repeat)  # type: ignore[arg-type]
            if not depthwise:
                size = max(size, len(set(roots)))
            if layer.op == "MatMul":
                for bias in _matmul_bias(graph, layer):
                    members[bias, 0] = Member(tensor=bias, axis=0, role="out", offset=offset, repeat=repeat)
        else:
            members[weight, 1 - out_axis] = Member(
                tensor=weight, axis=1 - out_axis, role="in", offset=offset, repeat=repeat
            )
    if size < 2:
        raise _Unsupported("it has fewer than two channels")
    return Group(id=name, kind="channel", size=size, members=tuple(members.values()))


def _matmul_bias(graph: ModelGraph, layer: Layer) -> tuple[str, ...]:
    readers = graph.consumers.get(layer.outputs[0], ())
    if len(readers) == 1 and readers[0].op == "Add":
        return readers[0].weights
    return ()


def _norm_layers(graph: ModelGraph, path: str) -> list[Layer]:
    """Normalisation layers of the graph that still hold the weights of the module at ``path``."""
    return [layer for layer in graph.layers if any(w.startswith(f"{path}.") for w in layer.weights)]


def _stride(local: list[int], roots: list[int], path: str) -> tuple[int, int]:
    """Finds (offset, repeat) such that channel ``c`` stands at ``offset + c * repeat ...``."""
    places: dict[int, list[int]] = {}
    for position, root in zip(local, roots, strict=True):
        places.setdefault(root, []).append(position)
    repeat = len(next(iter(places.values())))
    offset = min(places[min(places)]) - min(places) * repeat
    for root, positions in places.items():
        if sorted(positions) != list(range(offset + root * repeat, offset + (root + 1) * repeat)):
            raise _Unsupported(f"its channels are interleaved in {path}")
    return offset, repeat


def _prove(
    group: Group, graph: ModelGraph, weights: dict[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> Group:
    """Takes one channel away, runs the graph, and notes which activations shrank and where."""
    from autocompress.graph.read import trace_shapes
    from autocompress.graph.rewrite import rewrite, slice_weights

    kept = {group.id: torch.arange(group.size - 1)}
    trial = graph.model_copy(update={"groups": (group,)})
    try:
        smaller = rewrite(trial, {group.id: group.size - 1})
        shapes = trace_shapes(smaller, slice_weights(trial, weights, kept), example_inputs)
    except Exception as error:
        raise _Unsupported(
            f"the model does not run without one of them ({str(error).splitlines()[0][:100]})"
        ) from error
    members = list(group.members)
    for name, (shape, _) in shapes.items():
        before = graph.tensors[name].shape
        if shape == before:
            continue
        if name in graph.outputs:
            raise _Unsupported("they are the model's output")
        changed = [axis for axis, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b]
        if len(changed) != 1:
            raise _Unsupported(f"the activation {name} changes along {len(changed)} axes")
        axis = changed[0]
        members.append(Member(tensor=name, axis=axis, role="activation", repeat=before[axis] - shape[axis]))
    return group.model_copy(update={"members": tuple(members)})
