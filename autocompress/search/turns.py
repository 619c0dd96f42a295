"""Whose turn it is: the trainings that promise the most hypervolume for their time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.plan import CompressionPlan, FrontPoint
from autocompress.search.context import Context, priced, prices
from autocompress.search.deliver import ORIGINAL, Delivery
from autocompress.search.forecast import CapacityForecast, doubted
from autocompress.search.gains import Outcome
from autocompress.search.ladder import RecoveryForecast
from autocompress.search.recover import Recovered
from autocompress.search.structures import Structure

DELIVERY_S = 4.0
"""Seconds that delivering structures is thought to take before any has been."""

DOUBT, UNSEEN, SEEN = (-0.2, 0.0, 0.2), 1.5, 0.5
"""A predicted loss is off by such logarithms, so that what is predicted to gain nothing may gain something: that of a
structure that was not trained yet by more, another's by less."""

FORMAT_DOUBT = 0.003
"""Quality, as a fraction, by which a model in its formats may be better than its float weights on validation."""

UNEVEN = 1.5
"""Trainings run side by side for the same time, so none that would take so many times longer than the other."""

GROWTH = 2.0**0.5
"""How much longer each rung trains than the one before it."""

LEAST_SHARE = 0.25
"""Share of a rung's way below which no training is gone on with."""

ENTRANTS, PROMOTED = 4, 3
"""Without a time budget: how many structures enter, and how many trainings go on."""


@dataclass(frozen=True)
class Turn:
    """A structure's next rung, and what it is expected to come to.

    Attributes:
        structure: to be trained.
        drop: of quality that is expected after it, as a fraction.
        seconds: of training; None where steps are counted.
    """

    structure: Structure
    drop: float
    seconds: float | None

    @property
    def rung(self) -> int:
        return self.structure.rung + 1


class Turns:
    """Chooses what is trained next, among structures that were not trained yet and longer trainings of those that were.

    Args:
        context: of the run.

    Attributes:
        recovered: structures that were trained, by key.
        waiting: structures that may be.
        entered: how many of them this leg of the run has trained.
        promoted: how many trainings it has gone on with.
        step_s: seconds of a training step of the original, by what was seen of late.
        delivery_s: seconds that delivering what was trained took, likewise.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.recovered: dict[str, Structure] = {}
        self.waiting: list[Structure] = []
        self.entered = self.promoted = 0
        self.step_s: list[float] = []
        self.delivery_s = [DELIVERY_S]
        self._judged, self._sized = RecoveryForecast(), CapacityForecast()

    def observe(self, structure: Structure, recovered: Recovered, rung: int) -> None:
        """Lets the forecasts learn from a recovery."""
        gap = recovered.error - self.context.error
        if structure.divergence is not None and rung == 1:
            self._judged.add(structure.divergence, gap)
        if not structure.base.fresh:
            self._sized.add(structure.macs, structure.parameters, structure.left_out, rung, gap)

    def next(self, first: int, at_once: int, available_s: float, formats_share: float) -> list[Turn]:
        """The turns that promise the most for their time; none where nothing promises anything or time is too short.

        Args:
            first: steps of a first rung.
            at_once: how many to take side by side.
            available_s: seconds for training them and delivering what they come to.
            formats_share: share of a turn's time, after a first rung, that trains with number formats simulated.
        """
        turns = self._possible(first, formats_share, available_s)
        present = [self.outcome(s) for s in self.recovered.values()]
        if self.context.timed:
            # They are measured, so they play no part where steps are counted and must repeat.
            present += [outcome for point, outcome in self._delivered() if point.plan.recipe.steps == 0]
        left = self._left(available_s)
        chosen: list[Turn] = []
        while turns and len(chosen) < at_once:
            best = self._best(turns, present, left)
            if best is None:
                break
            chosen.append(best)
            present.append(Outcome(best.drop, best.structure.costs))
            longest = UNEVEN * (best.seconds or 0.0)
            turns = [t for t in turns if t.structure.key != best.structure.key and (t.seconds or 0.0) <= longest]
            if len(chosen) == 1:
                turns = [self._stretched(t, best.seconds) for t in turns]
        return chosen

    def _stretched(self, turn: Turn, seconds: float | None) -> Turn:
        """The turn trained for at least so long: side by side, the shortest lasts as long as the longest."""
        if turn.seconds is None or seconds is None or turn.seconds >= seconds:
            return turn
        drop, lasting, taken = turn.drop, turn.seconds, turn.seconds
        while taken < seconds:
            lasting *= GROWTH
            share = min(1.0, (seconds - taken) / lasting)
            drop, taken = self._sized.promoted(drop, turn.structure.macs, share), taken + lasting
        return dataclasses.replace(turn, drop=drop, seconds=seconds)

    def _left(self, available_s: float) -> float:
        """Seconds for training alone."""
        return max(available_s - max(self.delivery_s[-3:]), 0.0)

    def _best(self, turns: Sequence[Turn], present: Sequence[Outcome], left: float) -> Turn | None:
        """The turn with the best prospect: the most gain for its time, after the turn or after more of its like."""
        gains = self.context.gains
        prospects = [(turn, drop, seconds) for turn in turns for drop, seconds in self._prospects(turn, left)]
        total = np.zeros(len(prospects))
        for doubt in DOUBT:
            promised = [
                Outcome(doubted(drop, doubt * (UNSEEN if turn.rung == 1 else SEEN)), turn.structure.costs)
                for turn, drop, _ in prospects
            ]
            total += gains.each(present, promised)
        if total.max() <= 0.0 and gains.axes:
            # With quality alone to win, the next best guess is worth a try: forecasts err.
            return None
        lasting = np.array([seconds for _, _, seconds in prospects])
        return prospects[int(np.argmax(np.where(total > 0.0, total / lasting, total)))][0]

    def _prospects(self, turn: Turn, left: float) -> Iterator[tuple[float, float]]:
        """(expected drop, seconds until then) after a turn, and after further rungs as far as there is time for them.

        A first rung alone may promise nothing of a structure that would be the best after some more.
        """
        if turn.seconds is None:
            yield turn.drop, 1.0
            return
        delivery = float(np.mean(self.delivery_s[-5:]))
        drop, lasting, taken = turn.drop, turn.seconds, turn.seconds + delivery
        yield drop, taken
        while taken + GROWTH * lasting <= left:
            drop, lasting = self._sized.promoted(drop, turn.structure.macs), GROWTH * lasting
            taken += lasting + delivery
            yield drop, taken

    def _possible(self, first: int, formats_share: float, available_s: float) -> list[Turn]:
        """Every training that could come next and ends in time, or nearly does."""
        context = self.context
        failures = context.delivery.failures
        left = self._left(available_s)

        def first_seconds(structure: Structure) -> float | None:
            return first * float(np.median(self.step_s[-5:])) * structure.work if context.timed else None

        entering, found = [], []
        if context.timed or self.entered < ENTRANTS:
            waiting = [
                s for s in self.waiting if s.key not in self.recovered and f"{s.id}-rung1" not in failures
                and all(s.costs.get(name, 0.0) <= limit for name, limit in context.hard.items())
            ]  # fmt: skip
            forecast = self._forecast(waiting)
            entering = [Turn(s, drop, first_seconds(s)) for s, drop in zip(waiting, forecast, strict=True)]
        if context.timed or self.promoted < PROMOTED:
            for s in self.recovered.values():
                # Each time that a search is given more trials, structures may go one rung further up than before.
                higher = context.timed or s.rung <= context.clock.leg
                if higher and f"{s.id}-rung{s.rung + 1}" not in failures:
                    seconds, share = None, 1.0
                    if context.timed and s.recovered is not None:
                        # GROWTH times the rung before: rungs of 1, g, g^2, ... take (g^n - 1) / (g - 1) together.
                        grown = GROWTH**s.rung
                        seconds = s.recovered.seconds * (GROWTH - 1.0) * grown / (grown - 1.0) / (1.0 - formats_share)
                        # It may end sooner, and promises less then.
                        share = min(1.0, left / seconds)
                        seconds *= share
                    if share >= LEAST_SHARE:
                        found.append(Turn(s, self._sized.promoted(self.outcome(s).drop, s.macs, share), seconds))
        if not context.timed:
            return entering + found
        shortest = min((turn.seconds or 0.0 for turn in entering), default=0.0)
        if self.recovered:
            return found + [turn for turn in entering if (turn.seconds or 0.0) <= left]
        return [turn for turn in entering if (turn.seconds or 0.0) <= max(left, 1.01 * shortest)]

    def _delivered(self) -> list[tuple[FrontPoint, Outcome]]:
        """What was delivered, its costs on the scale of the predicted ones."""
        context = self.context
        points, reference = context.delivery.points, context.reference
        original = Delivery.costs(points[ORIGINAL])
        found = []
        for name, point in points.items():
            if name != ORIGINAL:
                costs = {n: c / original[n] * reference[n] for n, c in Delivery.costs(point).items() if n in reference}
                found.append((point, Outcome(context.delivery.drop_of(point) / 100.0, costs)))
        return found

    def _forecast(self, waiting: Sequence[Structure]) -> list[float]:
        """The quality that structures are expected to lose, once they are recovered for a first rung."""
        if not waiting:
            return []
        by_size = self._sized.predict(
            [s.macs for s in waiting], [s.parameters for s in waiting], [s.left_out for s in waiting], 1
        )
        known = np.array([s.divergence if s.divergence is not None else np.nan for s in waiting])
        by_judgement = self._judged.predict(np.nan_to_num(known, nan=1.0))
        # Both are known of a stitched one: each errs in its own way.
        both = np.sqrt(np.maximum(by_size, 5e-4) * by_judgement)
        return [float(drop) for drop in np.where(np.isnan(known), by_size, both)]

    def outcome(self, structure: Structure) -> Outcome:
        """What a trained structure has come to."""
        assert structure.recovered is not None
        return Outcome(structure.recovered.error - self.context.error, structure.costs)

    def promising(self, structure: Structure, plans: Sequence[CompressionPlan]) -> list[CompressionPlan]:
        """Those format assignments that may add something to what was delivered, the most promising first."""
        if not plans:
            return []
        skeleton = structure.base.skeleton
        delivered = [outcome for _, outcome in self._delivered()]
        drop = max(self.outcome(structure).drop - FORMAT_DOUBT, 0.0)
        gains = self.context.gains.each(delivered, [Outcome(drop, prices(skeleton, priced(plan))) for plan in plans])
        found = [(gain, plan) for gain, plan in zip(gains, plans, strict=True) if gain > 0.0]
        return [plan for _, plan in sorted(found, key=lambda item: -item[0])]
