"""Which models to profile: the fewest that between them run every kernel class at every size.

Class coverage matters more than the number of models or the regressor, so candidates are lowered first, which costs
milliseconds, and only those that add something are exported and timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from autocompress.hardware.kernels import Work, cost_size
from autocompress.hardware.lowering import Lowering, products_of
from autocompress.hardware.steps import Mask, make_steps, quantized_tensors
from autocompress.plan import LayerPlan, ModelGraph

WANTED = 6
"""Kernels of one class and size after which more of them add nothing."""

Cell = tuple[str, int]
"""A kernel class and the size of its work, in powers of four."""


def lowered_kernels(
    graph: ModelGraph, layers: Mapping[str, LayerPlan], block: int, batch: int
) -> list[tuple[str, str, Work]]:
    """``(label, kind, work)`` of the kernels that the runtime makes of a graph under one plan."""
    found: list[tuple[str, str, Work]] = []
    steps = make_steps(graph)
    dims = {name: tensor.shape for name, tensor in graph.tensors.items()}
    int8 = {
        layer.name: np.array([layers.get(layer.name, LayerPlan()).compute == "int8"]) for layer in graph.compressible
    }

    def emit(label: str, kind: str, work: Work, mask: Mask, whole: bool) -> None:
        if mask.any() and whole:
            found.append((label, kind, work))

    held = quantized_tensors(graph, steps, int8, 1)
    known = [layers.get(layer.name, LayerPlan()) for layer in graph.compressible]
    products = products_of(list(int8), known, np.arange(len(known))[None])
    Lowering(graph, steps, dims, int8, held, 1, block, batch, emit, products=products).run()
    return found


def cells(kernels: Sequence[tuple[str, str, Work]]) -> Counter[Cell]:
    """How many kernels of each class and size there are."""
    return Counter((kind, round(np.log2(max(float(cost_size(work)), 1.0)) / 2)) for _, kind, work in kernels)


def choose(candidates: Sequence[Counter[Cell]], count: int) -> list[int]:
    """Indices of the candidates that cover most, the one that adds most each time.

    A cell counts less the more often it is covered already, and nothing from ``WANTED`` on.

    >>> choose([Counter({("a", 1): 3}), Counter({("a", 1): 3, ("b", 1): 1}), Counter({("c", 2): 1})], 2)
    [1, 2]
    """
    names = sorted({cell for candidate in candidates for cell in candidate})
    have = np.array([[min(candidate[name], WANTED) for name in names] for candidate in candidates], dtype=float)
    covered = np.zeros(len(names))
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        # The gain of a cell falls off as the square root of a count does.
        gain = np.sqrt(np.minimum(covered + have, WANTED)) - np.sqrt(np.minimum(covered, WANTED))
        worth = gain.sum(axis=1)
        worth[chosen] = -1.0
        best = int(worth.argmax())
        if worth[best] <= 0:
            break
        chosen.append(best)
        covered += have[best]
    return chosen
