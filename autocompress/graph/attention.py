"""Undoes what the exporter makes of attention: keys are turned in three steps with sizes worked out while running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocompress.plan import Layer

Shape = tuple[int, ...]


def joined_transposes(layers: Sequence[Layer], shapes: Mapping[str, Shape], outputs: Sequence[str]) -> list[Layer]:
    """Turns ``Reshape -> Transpose -> Reshape`` that only swaps the last two axes into one Transpose.

    Runtimes compute a product with a tensor turned so without ever turning it; behind two Reshapes they cannot see it.

    Args:
        layers: in execution order.
        shapes: of all activations, the batch included.
        outputs: of the model, whose producers stay.
    """
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.activations:
            readers.setdefault(name, []).append(layer)

    def next_of(layer: Layer, op: str) -> Layer | None:
        found = readers.get(layer.outputs[0], [])
        alone = len(found) == 1 and layer.outputs[0] not in outputs
        return found[0] if alone and found[0].op == op and found[0].inputs[0] == layer.outputs[0] else None

    replaced: dict[str, Layer | None] = {}
    for first in layers:
        turn = next_of(first, "Transpose") if first.op == "Reshape" else None
        last = next_of(turn, "Reshape") if turn is not None else None
        if turn is None or last is None or turn.attributes.get("perm") != (0, 2, 1):
            continue
        before, after = shapes[first.inputs[0]], shapes[last.outputs[0]]
        flat = shapes[first.outputs[0]]
        swapped = (*before[:-2], before[-1], before[-2])
        if len(before) < 3 or len(flat) != 3 or flat[1:] != before[-2:] or after != swapped:
            continue
        rank = len(before)
        order = (*range(rank - 2), rank - 1, rank - 2)
        replaced[first.name] = replaced[turn.name] = None
        replaced[last.name] = Layer(
            name=last.name, op="Transpose", inputs=first.inputs[:1], outputs=last.outputs, attributes={"perm": order}
        )
    found = [replaced.get(layer.name, layer) for layer in layers]
    return [layer for layer in found if layer is not None]
