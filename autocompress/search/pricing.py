"""Prices choices of a menu by the thousand, without building their plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan
from autocompress.search.menu import Menu

Choices = tuple[int, ...]
"""One option index a knob."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ChoicePricer:
    """The predicted costs of choices.

    Args:
        menu: the knobs; every layer and group of the graph that none of them holds stays as it is.
        skeleton: of the menu's graph.
    """

    def __init__(self, menu: Menu, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._dense = skeleton.encode([CompressionPlan()])
        places = {name: index for index, name in enumerate(skeleton.group_ids)}
        layers = {name: index for index, name in enumerate(skeleton.layer_names)}
        self._groups = [(k, places[knob.group]) for k, knob in enumerate(menu.knobs) if knob.group is not None]
        self._layers = [(k, layers[layer]) for k, knob in enumerate(menu.knobs) for layer in knob.layers]
        self._keeps = [np.array([option.keep or 0 for option in knob.options]) for knob in menu.knobs]
        # The skeleton numbers formats as it meets them, so it is shown each option once.
        some = skeleton.layer_names[0]
        shown = [CompressionPlan(layers={some: option.format}) for knob in menu.knobs for option in knob.options]
        codes = skeleton.encode(shown)[1][:, 0]
        ends = np.cumsum([len(knob.options) for knob in menu.knobs])[:-1]
        self._codes = np.split(codes, ends)

    def __call__(self, choices: Ints) -> Mapping[str, Floats]:
        """Costs by name, one entry a row of ``choices`` ``[n, knobs]``; energy only where the profile knows it."""
        keeps, formats = (np.repeat(row, len(choices), axis=0) for row in self._dense)
        for knob, column in self._groups:
            keeps[:, column] = self._keeps[knob][choices[:, knob]]
        for knob, column in self._layers:
            formats[:, column] = self._codes[knob][choices[:, knob]]
        table = self.skeleton.price_arrays(keeps, formats)
        found = {
            "latency_ms": table.latency_ms,
            "size_bytes": table.size_bytes,
            "peak_memory_bytes": table.peak_memory_bytes,
            "macs": table.macs,
        }
        if table.energy_mj is not None:
            found["energy_mj"] = table.energy_mj
        return found


class NamedPrices:
    """The same as a table of some costs.

    Args:
        menu: the knobs.
        skeleton: of the menu's graph.
        names: the costs wanted, in order.
    """

    def __init__(self, menu: Menu, skeleton: Skeleton, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._pricer = ChoicePricer(menu, skeleton)

    def __call__(self, choices: npt.ArrayLike) -> Floats:
        """Costs ``[plans, names]`` of choices ``[plans, knobs]``."""
        chosen = np.asarray(choices, dtype=np.int64)
        if not len(chosen):
            return np.zeros((0, len(self.names)))
        costs = self._pricer(chosen)
        return np.stack([np.asarray(costs[name], dtype=np.float64) for name in self.names], axis=1)


def neighbours(choices: Choices, sizes: Sequence[int]) -> Ints:
    """Every choice that differs in one knob, a row each, knob by knob.

    >>> neighbours((0, 1), (2, 2)).tolist()
    [[1, 1], [0, 0]]
    """
    rows = [
        [*choices[:knob], option, *choices[knob + 1 :]]
        for knob, size in enumerate(sizes)
        for option in range(size)
        if option != choices[knob]
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, len(choices))
