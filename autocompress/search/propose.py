"""Plans worth evaluating next: the pool comes from the front by mutation and crossover, the batch from its gain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autocompress.pareto import pareto_mask
from autocompress.search.estimate import DivergenceEstimate
from autocompress.search.gain import GainTable, greedy
from autocompress.search.menu import Menu
from autocompress.search.pricing import NamedPrices

Array = npt.NDArray[np.float64]
Choices = npt.NDArray[np.int64]

BATCH = 8
ROUNDS, CHILDREN, PARENTS = 3, 1500, 150
"""Each round makes children of the most promising so far; all of them form the pool."""

MUTATIONS = 1.5
"""Knobs that a child changes, on average."""

QUANTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Standard normal quantiles that stand for an estimate's error."""


@dataclass(frozen=True)
class Boxes:
    """Turns divergences and costs into the unit box that gains are reckoned in.

    Attributes:
        drop: from divergences in nats to the drop's axis, elementwise; rising.
        costs: from costs ``[n, names]`` to axes ``[n, axes]``.
    """

    drop: Callable[[Array], Array]
    costs: Callable[[Array], Array]


class Proposals:
    """Batches of choices by expected gain.

    Args:
        menu: the knobs.
        estimate: of divergences; it learns from what was evaluated whenever a batch is made.
        pricer: gives the objectives' costs, then those of the limits.
        objectives: how many of the pricer's costs are objectives.
        limits: by cost name; a plan over one is never proposed.
        boxes: axes of the gain.
        seeds: choices that every pool holds beside the children, as long as they are new.
        seed: of the random choices.
    """

    def __init__(
        self,
        menu: Menu,
        estimate: DivergenceEstimate,
        pricer: NamedPrices,
        objectives: int,
        limits: Mapping[str, float],
        boxes: Boxes,
        seeds: Sequence[Sequence[int]],
        seed: int,
    ) -> None:
        self.estimate, self.pricer, self.boxes = estimate, pricer, boxes
        self._objectives, self._seed = objectives, seed
        self._limits = np.array([limits.get(name, np.inf) for name in pricer.names])
        self._near = [_neighbours(len(k.options), [(o.keep, o.format) for o in k.options]) for k in menu.knobs]
        self._seeds = np.array(seeds, dtype=np.int64).reshape(-1, len(menu.knobs))

    def batch(
        self, seen: Mapping[tuple[int, ...], float], tried: Collection[tuple[int, ...]], count: int = BATCH
    ) -> list[tuple[int, ...]]:
        """The choices to evaluate next; none of them was tried, and all keep the limits.

        Args:
            seen: divergences by choices, in the order of evaluation.
            tried: choices that must not be proposed, whatever became of them.
            count: at most so many.
        """
        rng = np.random.default_rng([self._seed, len(tried)])
        known = np.array(list(seen), dtype=np.int64).reshape(-1, len(self._near))
        self.estimate.learn(known, list(seen.values()))
        true = np.array(list(seen.values()), dtype=np.float64)
        present = self._boxed(true[:, None], self.pricer(known))[:, 0] if len(known) else self._nothing()
        table = GainTable(present)
        parents = np.concatenate([known[pareto_mask(present)] if len(known) else known, self._seeds])
        pool, drops, costs = self._scored(parents, tried)
        for _ in range(ROUNDS):
            children, *scored = self._scored(self._children(parents, rng), {*tried, *map(tuple, pool.tolist())})
            pool, drops, costs = (
                np.concatenate(pair) for pair in zip((pool, drops, costs), (children, *scored), strict=True)
            )
            gains = np.round(table.gains(drops, costs), 7)
            best = np.argsort(-gains, kind="stable")[:PARENTS]
            parents = pool[best[gains[best] > 0.0]] if (gains > 0.0).any() else parents
        return [tuple(pool[index].tolist()) for index in greedy(present, drops, costs, count)]

    def _nothing(self) -> Array:
        return np.ones((1, 1 + self.boxes.costs(np.ones((1, self._objectives))).shape[1]))

    def _boxed(self, divergences: Array, prices: Array) -> Array:
        """``[plans, samples, 1 + axes]``."""
        axes = self.boxes.costs(prices[:, : self._objectives])
        drops = self.boxes.drop(divergences)
        return np.concatenate([drops[..., None], np.repeat(axes[:, None], drops.shape[1], axis=1)], axis=2)

    def _scored(self, choices: Choices, tried: Collection[tuple[int, ...]]) -> tuple[Choices, Array, Array]:
        """Those of the choices that are new and keep the limits, with samples of their drops and their cost axes."""
        fresh = [row for row in dict.fromkeys(map(tuple, choices.tolist())) if row not in tried]
        rows = np.array(fresh, dtype=np.int64).reshape(-1, choices.shape[1])
        prices = self.pricer(rows)
        kept = (prices <= self._limits).all(axis=1)
        rows, prices = rows[kept], prices[kept]
        errors = np.exp(self.estimate.error * np.array(QUANTILES))
        drops = self.boxes.drop(self.estimate(rows)[:, None] * errors)
        return rows, drops, self.boxes.costs(prices[:, : self._objectives])

    def _children(self, parents: Choices, rng: np.random.Generator) -> Choices:
        if not len(parents):
            sizes = [len(table) for table in self._near]
            return np.stack([rng.integers(size, size=CHILDREN) for size in sizes], axis=1)
        pairs = parents[rng.integers(len(parents), size=(2, CHILDREN))]
        crossed = (rng.random((CHILDREN, len(self._near))) < 0.5) & (rng.random((CHILDREN, 1)) < 0.5)
        children = np.where(crossed, pairs[1], pairs[0])
        changed = rng.random(children.shape) < MUTATIONS / len(self._near)
        # Both draws are made for every knob, so that the random numbers do not depend on the values.
        stepped = rng.random(children.shape) < 0.7
        places = rng.random(children.shape)
        for knob, near in enumerate(self._near):
            column = children[:, knob]
            step = near[column, (places[:, knob] * near.shape[1]).astype(np.int64)]
            jump = (places[:, knob] * len(near)).astype(np.int64)
            children[:, knob] = np.where(changed[:, knob], np.where(stepped[:, knob], step, jump), column)
        return np.asarray(children)


def _neighbours(count: int, aspects: Sequence[tuple[object, object]]) -> Choices:
    """``[options, most neighbours]``: for each option those alike in width or in format, repeated to one length."""
    rows = []
    for own in range(count):
        width, form = aspects[own]
        alike = [i for i, (w, f) in enumerate(aspects) if i != own and (w == width or f == form)]
        rows.append(alike or [own])
    longest = max(len(row) for row in rows)
    return np.array([(row * longest)[:longest] for row in rows], dtype=np.int64)
