"""Residual blocks that can leave whole: ``y = x + f(x)`` becomes ``y = x``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autocompress.plan import Layer, ModelGraph


@dataclass(frozen=True)
class Block:
    """A residual branch.

    Attributes:
        name: the module path its weight layers share, such as ``layer1.0``.
        layers: what goes with it: the branch and the addition.
        source: the tensor that is added to the branch.
        output: the sum.
    """

    name: str
    layers: frozenset[str]
    source: str
    output: str


def find_blocks(graph: ModelGraph) -> tuple[Block, ...]:
    """The blocks of a graph, in execution order: additions of a tensor and a branch that reads that tensor alone.

    A block whose shortcut has weights of its own (it changes width or resolution) is not among them.
    """
    found = []
    for layer in graph.layers:
        if layer.op != "Add" or len(layer.activations) != 2 or layer.outputs[0] in graph.outputs:
            continue
        for branch, source in (layer.activations, layer.activations[::-1]):
            members = _branch(graph, layer, branch, source)
            if members:
                names = frozenset([layer.name, *(m.name for m in members)])
                found.append(Block(_shared_path(members) or layer.name, names, source, layer.outputs[0]))
                break
    return tuple(found)


def _shared_path(members: list[Layer]) -> str:
    """The module that holds all the weight layers of a branch."""
    paths = [m.module_path.split(".")[:-1] for m in members if m.module_path]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _branch(graph: ModelGraph, addition: Layer, end: str, source: str) -> list[Layer]:
    """The layers between ``source`` and ``end``; none where anything else enters or leaves there."""
    members: dict[str, Layer] = {}
    waiting = [end]
    while waiting:
        tensor = waiting.pop()
        if tensor == source:
            continue
        producer = graph.producers.get(tensor)
        if producer is None:
            return []
        if producer.name not in members:
            members[producer.name] = producer
            waiting += producer.activations
    inside = {*members, addition.name}
    leaves = any(
        r.name not in inside for m in members.values() for out in m.outputs for r in graph.consumers.get(out, ())
    )
    reads = any(source in m.activations for m in members.values())
    return [] if leaves or not reads else list(members.values())


def drop_blocks(graph: ModelGraph, names: Iterable[str]) -> ModelGraph:
    """The graph without the named blocks; groups lose the members that went, and inner groups go with their block."""
    for name in names:
        block = next((b for b in find_blocks(graph) if b.name == name), None)
        if block is None:
            known = ", ".join(b.name for b in find_blocks(graph)) or "none"
            raise ValueError(f"the graph has no residual block {name!r}; blocks: {known}")
        graph = _drop(graph, block)
    return graph


def _drop(graph: ModelGraph, block: Block) -> ModelGraph:
    renamed = {block.output: block.source}
    gone = set(block.layers)
    producer = graph.producers.get(block.source)
    if producer is not None and producer.op == "Relu":
        # A Relu behind the addition now follows another Relu: it has nothing left to do.
        for reader in graph.consumers.get(block.output, ()):
            if reader.op == "Relu" and reader.outputs[0] not in graph.outputs:
                gone.add(reader.name)
                renamed[reader.outputs[0]] = block.source
    layers = tuple(
        layer.model_copy(update={"inputs": tuple(renamed.get(i, i) for i in layer.inputs)})
        for layer in graph.layers
        if layer.name not in gone
    )
    used = {*graph.inputs, *(name for layer in layers for name in (*layer.inputs, *layer.outputs) if name)}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in used}
    groups = []
    for group in graph.groups:
        members = tuple(m for m in group.members if m.tensor in tensors)
        if any(m.role == "out" for m in members):
            groups.append(group.model_copy(update={"members": members}))
    skipped = {name: reason for name, reason in graph.skipped.items() if name not in gone}
    return graph.model_copy(update={"layers": layers, "tensors": tensors, "groups": tuple(groups), "skipped": skipped})
