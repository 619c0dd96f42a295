"""Prices of choices by the thousand: from option indices straight to the cost model's arrays, no plan in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan
from autocompress.search.menu import Menu

Array = npt.NDArray[np.float64]


class ChoicePricer:
    """Prices choices of one menu as the skeleton now does.

    Args:
        menu: the knobs.
        skeleton: of the menu's graph.
        names: the costs wanted, in order.
    """

    def __init__(self, menu: Menu, skeleton: Skeleton, names: Sequence[str]) -> None:
        self.skeleton, self.names = skeleton, tuple(names)
        # As an encoded plan is: groups and layers that no knob decides keep what they have there.
        keeps, codes = skeleton.encode([menu.plan([0] * len(menu.knobs))])
        self._keeps, self._codes = keeps[0], codes[0]
        groups = {name: column for column, name in enumerate(skeleton.group_ids)}
        layers = {name: column for column, name in enumerate(skeleton.layer_names)}
        formats = list(dict.fromkeys(option.format for knob in menu.knobs for option in knob.options))
        _, known = skeleton.encode([CompressionPlan(layers={skeleton.layer_names[0]: form}) for form in formats])
        code = dict(zip(formats, known[:, 0].tolist(), strict=True))
        self._widths: list[tuple[int, int, npt.NDArray[np.int64]]] = []
        self._formats: list[tuple[int, int, npt.NDArray[np.int64]]] = []
        for place, knob in enumerate(menu.knobs):
            if knob.group is not None:
                counts = np.array([option.keep for option in knob.options], dtype=np.int64)
                self._widths.append((groups[knob.group], place, counts))
            own = np.array([code[option.format] for option in knob.options], dtype=np.int64)
            self._formats += [(layers[layer], place, own) for layer in knob.layers]

    def __call__(self, choices: npt.ArrayLike) -> Array:
        """Costs ``[plans, names]`` of choices ``[plans, knobs]``."""
        chosen = np.asarray(choices, dtype=np.int64)
        if not len(chosen):
            return np.zeros((0, len(self.names)))
        keeps = np.tile(self._keeps, (len(chosen), 1))
        codes = np.tile(self._codes, (len(chosen), 1))
        for column, place, table in self._widths:
            keeps[:, column] = table[chosen[:, place]]
        for column, place, table in self._formats:
            codes[:, column] = table[chosen[:, place]]
        prices = self.skeleton.price_arrays(keeps, codes)
        return np.stack([np.asarray(getattr(prices, name), dtype=np.float64) for name in self.names], axis=1)
