"""Whose turn it is, by expected gain for its time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocompress.plan import CompressionPlan, Original
from autocompress.search.bases import Base
from autocompress.search.context import Context
from autocompress.search.deliver import ORIGINAL
from autocompress.search.gains import Gains
from autocompress.search.recover import Recovered
from autocompress.search.structures import Structure
from autocompress.search.turns import ENTRANTS, GROWTH, PROMOTED, Turns

REFERENCE = {"latency_ms": 1.0, "size_bytes": 1e6}
BASE = cast(Base, SimpleNamespace(spec=Original(), fresh=False))


def structure(name: str, share: float, error: float | None = None, rung: int = 0, **more: Any) -> Structure:
    """A structure with a share of the original's MACs, parameters and costs."""
    costs = {cost: value * share for cost, value in REFERENCE.items()}
    recovered = None if error is None else cast(Recovered, SimpleNamespace(error=error, seconds=10.0 * share))
    return Structure(
        BASE, CompressionPlan(groups={name: 1}), costs, share, share, 0.0, share, recovered=recovered, rung=rung, **more
    )


def make(timed: bool = True, failures: tuple[str, ...] = (), **hard: float) -> Turns:
    original = SimpleNamespace(
        latency_ms=SimpleNamespace(measured=1.0, predicted=None), size_bytes=10**6, peak_memory_bytes=1,
        energy_mj=None, macs=1,
    )  # fmt: skip
    context = SimpleNamespace(
        timed=timed, error=0.05, hard=hard, reference=REFERENCE, clock=SimpleNamespace(leg=1),
        gains=Gains(("latency_ms", "size_bytes"), True, REFERENCE),
        delivery=SimpleNamespace(failures=failures, points={ORIGINAL: original}),
    )  # fmt: skip
    turns = Turns(cast(Context, context))
    turns.step_s.append(0.1)
    return turns


def names(turns: Turns, available_s: float = 1000.0, at_once: int = 1) -> list[str]:
    return [next(iter(t.structure.plan.groups)) for t in turns.next(100, at_once, available_s, 0.0)]


def test_what_promises_the_most_for_its_time_comes_first() -> None:
    turns = make()
    turns.waiting = [structure("whole", 1.0), structure("eighth", 0.125), structure("half", 0.5)]
    assert names(turns) == ["eighth"]
    assert names(turns, at_once=2) == ["eighth"]  # the others would take many times longer
    turns.waiting.append(structure("sixth", 0.17))
    assert len(set(names(turns, at_once=2))) == 2


def test_what_was_recovered_or_failed_does_not_enter_again() -> None:
    small = structure("eighth", 0.125)
    turns = make(failures=(f"{small.id}-rung1",))
    turns.waiting = [small, structure("half", 0.5)]
    assert names(turns) == ["half"]
    done = structure("half", 0.5, error=0.05, rung=1)
    turns.recovered[done.key] = done
    assert names(turns) == []  # its quality cannot be better


def test_budgets_keep_structures_out() -> None:
    turns = make(latency_ms=0.3)
    turns.waiting = [structure("half", 0.5), structure("quarter", 0.25)]
    assert names(turns) == ["quarter"]
    assert names(make(latency_ms=0.1)) == []


def test_a_longer_training_takes_its_turn_when_it_promises_more() -> None:
    turns = make()
    lossy = structure("eighth", 0.125, error=0.12, rung=1)
    turns.recovered[lossy.key] = lossy
    turns.waiting = [structure("more", 0.9)]
    assert names(turns) == ["eighth"]
    (turn,) = turns.next(100, 1, 1000.0, 0.0)
    assert turn.rung == 2
    assert turn.seconds == pytest.approx(GROWTH * 10.0 * 0.125)
    assert turn.drop < 0.07
    lossy.rung = 2  # Two rungs took its time, the second GROWTH times as long as the first.
    (turn,) = turns.next(100, 1, 1000.0, 0.2)
    assert turn.seconds == pytest.approx(GROWTH**2 * 10.0 * 0.125 / (1.0 + GROWTH) / 0.8)


def test_what_does_not_fit_into_the_time_is_not_begun() -> None:
    turns = make()
    quick, slow = structure("eighth", 0.125), structure("third", 0.33)
    turns.waiting = [quick, slow]
    turns.delivery_s = [1.0]
    assert names(turns, available_s=2.5) == ["eighth"]
    done = structure("done", 0.5, error=0.06, rung=1)
    turns.recovered[done.key] = done
    assert names(turns, available_s=1.2) == []


def test_without_a_time_budget_counts_limit_the_turns() -> None:
    turns = make(timed=False)
    turns.waiting = [structure(f"s{i}", 0.1 + 0.05 * i) for i in range(8)]
    turns.entered = ENTRANTS
    assert names(turns) == []
    lossy = structure("eighth", 0.125, error=0.2, rung=1)
    turns.recovered[lossy.key] = lossy
    assert names(turns) == ["eighth"]
    turns.promoted = PROMOTED
    assert names(turns) == []


def test_forecasts_follow_what_was_seen() -> None:
    turns = make()
    few, many = structure("few", 0.1), structure("many", 0.11, divergence=0.5)
    before = turns._forecast([few, many])
    for share in (0.08, 0.1, 0.13):
        seen = structure(f"seen{share}", share)
        turns.observe(seen, cast(Recovered, SimpleNamespace(error=0.4)), 1)
    after = turns._forecast([few, many])
    assert after[0] > before[0]
    assert turns._forecast([]) == []


def test_a_structure_counts_by_what_more_rungs_make_of_it_where_there_is_time_for_them() -> None:
    turns = make()
    late, modest = structure("late", 0.125), structure("modest", 0.9)
    modest.work = 0.1
    turns.waiting = [late, modest]
    turns._forecast = lambda waiting: [0.4 if s is late else 0.02 for s in waiting]  # type: ignore[method-assign]
    assert names(turns, available_s=1000.0) == ["late"]
    assert names(turns, available_s=turns.delivery_s[-1] + 1.3) == ["modest"]


def test_what_is_trained_beside_another_is_judged_by_what_it_comes_to_in_the_same_time() -> None:
    turns = make()
    turns.waiting = [structure("eighth", 0.125), structure("sixth", 0.17)]
    first, second = turns.next(100, 2, 1000.0, 0.0)
    alone = {next(iter(t.structure.plan.groups)): t for t in turns._possible(100, 0.0, 1000.0)}
    quick, slow = alone["eighth"], alone["sixth"]
    stretched = turns._stretched(quick, slow.seconds)
    assert stretched.seconds == slow.seconds
    assert stretched.drop < quick.drop
    assert turns._stretched(slow, quick.seconds) == slow
    assert second.seconds is not None
    assert first.seconds is not None
    assert second.seconds >= first.seconds
