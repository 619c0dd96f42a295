"""Proposals: new, within the budgets, repeatable, and better than choices at random."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.pareto import hypervolume
from autocompress.search.estimate import DivergenceEstimate
from autocompress.search.ladder import box, cost_axes
from autocompress.search.pricing import NamedPrices
from autocompress.search.propose import Boxes, Proposals
from autocompress.search.seeds import Sensitivity, dp_surface, uniform_seeds
from tests.fixtures.search import make_menu, make_skeleton

MENU, SKELETON = make_menu(), make_skeleton()
COSTS = ("latency_ms", "size_bytes")
PRICER = NamedPrices(MENU, SKELETON, COSTS)
DENSE = MENU.uniform(1.0, "fp32", 32)
REFERENCE = dict(zip(COSTS, PRICER([DENSE])[0].tolist(), strict=True))
BOXES = Boxes(lambda d: np.asarray(d) ** 0.25, lambda costs: cost_axes(costs, COSTS, REFERENCE))


def make_sensitivity() -> Sensitivity:
    """A little for each channel that is gone and each bit that is."""
    rows = []
    for knob in MENU.knobs:
        size = max(option.keep or 1 for option in knob.options)
        gone = [1.0 - (option.keep or 1) / size for option in knob.options]
        bits = [(32 - option.format.storage.bits) / 500 for option in knob.options]
        rows.append(np.array([g**2 + b for g, b in zip(gone, bits, strict=True)]))
    return Sensitivity(tuple(rows))


SENSITIVITY = make_sensitivity()
SEEDS = [*uniform_seeds(MENU), *dp_surface(MENU, SENSITIVITY, PRICER)]


def make(limits: dict[str, float] | None = None, seed: int = 0) -> Proposals:
    pricer = NamedPrices(MENU, SKELETON, (*COSTS, "macs"))
    return Proposals(MENU, DivergenceEstimate(SENSITIVITY), pricer, 2, limits or {}, BOXES, SEEDS, seed)


def truth(choices: tuple[int, ...]) -> float:
    return 1.5 * SENSITIVITY.estimate(choices)


def test_prices_of_choices_are_those_of_their_plans() -> None:
    rng = np.random.default_rng(0)
    choices = np.stack([rng.integers(len(knob.options), size=50) for knob in MENU.knobs], axis=1)
    table = SKELETON.price([MENU.plan(row) for row in choices])
    found = PRICER(choices)
    assert (found[:, 0] == table.latency_ms).all()
    assert (found[:, 1] == table.size_bytes).all()
    assert PRICER(choices[:0]).shape == (0, 2)


def test_axes_are_those_of_a_box() -> None:
    costs = PRICER(np.array([DENSE, MENU.uniform(0.5, "int8", 8)]))
    for axes, row in zip(cost_axes(costs, COSTS, REFERENCE), costs, strict=True):
        assert [0.3, *axes] == pytest.approx(box(0.003, dict(zip(COSTS, row, strict=True)), REFERENCE, 1.0))


def test_proposals_are_new_and_within_every_budget() -> None:
    dense = NamedPrices(MENU, SKELETON, (*COSTS, "macs"))([DENSE])[0]
    limits = {"size_bytes": 0.4 * dense[1], "macs": 0.5 * dense[2]}
    proposals = make(limits)
    seen: dict[tuple[int, ...], float] = {}
    tried = {tuple(MENU.uniform(0.5, "int8", 4)): None}
    for _ in range(4):
        batch = proposals.batch(seen, [*seen, *tried])
        assert len(batch) == len(set(batch)) == 8
        assert not set(batch) & (seen.keys() | tried.keys())
        prices = NamedPrices(MENU, SKELETON, (*COSTS, "macs"))(batch)
        assert (prices[:, 1] <= limits["size_bytes"]).all()
        assert (prices[:, 2] <= limits["macs"]).all()
        seen |= {choices: truth(choices) for choices in batch}


def test_a_budget_that_nothing_keeps_gives_no_proposals() -> None:
    assert make({"size_bytes": 1.0}).batch({}, []) == []


def test_the_same_seed_and_trials_give_the_same_proposals() -> None:
    seen = {tuple(choices): truth(choices) for choices in list(uniform_seeds(MENU))[:10]}
    first = make().batch(seen, seen)
    assert make().batch(seen, seen) == first
    proposals = make()
    proposals.batch({}, [])
    # What an earlier batch learned is forgotten: a resumed run proposes what the first would have.
    assert proposals.batch(seen, seen) == first
    assert make(seed=1).batch(seen, seen) != first


def test_proposals_reach_more_than_choices_at_random() -> None:
    def reached(found: list[tuple[int, ...]]) -> float:
        drops = BOXES.drop(np.array([truth(c) for c in found]))
        return hypervolume(np.column_stack([drops, BOXES.costs(PRICER(found))]), [1.0] * 3)

    proposals, seen = make(), {}
    for _ in range(3):
        seen |= {choices: truth(choices) for choices in proposals.batch(seen, seen)}
    rng = np.random.default_rng(0)
    at_random = [tuple(int(rng.integers(len(k.options))) for k in MENU.knobs) for _ in range(200)]
    assert len(seen) == 24
    assert reached(list(seen)) > 1.1 * reached(at_random)
    assert reached(list(seen)) > reached(list(uniform_seeds(MENU)))
