"""Plans over budget: what they become, at what harm, and when there is nothing to be done."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.plan import CompressionPlan
from autocompress.search import repair as module
from autocompress.search.context import prices
from autocompress.search.pricing import ChoicePricer, Choices, Floats, Ints, neighbours
from autocompress.search.repair import Repair, structural_harm
from autocompress.search.seeds import Sensitivity, uniform_seeds
from tests.fixtures.search import make_menu, make_skeleton

MENU = make_menu()
SKELETON = make_skeleton()
PRICER = ChoicePricer(MENU, SKELETON)
SIZES = [len(knob.options) for knob in MENU.knobs]
DENSE = prices(SKELETON, CompressionPlan())
WHOLE = MENU.uniform(1.0, "fp32", 32)
UNIFORM = list(dict.fromkeys(uniform_seeds(MENU)))

any_choices = st.tuples(*(st.integers(0, size - 1) for size in SIZES))


def even(harm: float = 1.0) -> Sensitivity:
    """Every option but that of the dense plan harms as much."""
    rows = tuple(np.full(size, harm) for size in SIZES)
    for row, choice in zip(rows, WHOLE, strict=True):
        row[choice] = 0.0
    return Sensitivity(rows)


def share(share: float, *names: str) -> dict[str, float]:
    return {name: share * DENSE[name] for name in names}


@given(st.lists(any_choices, min_size=1, max_size=5))
def test_choices_are_priced_as_their_plans_are(rows: list[Choices]) -> None:
    table = SKELETON.price([MENU.plan(choices) for choices in rows])
    found = PRICER(np.array(rows))
    assert set(found) == {"latency_ms", "size_bytes", "peak_memory_bytes", "macs"}
    for name, costs in found.items():
        np.testing.assert_allclose(costs, getattr(table, name), rtol=1e-12)


def test_neighbours_differ_in_one_knob_and_are_complete() -> None:
    found = neighbours(WHOLE, SIZES)
    assert len(found) == sum(size - 1 for size in SIZES) == len({tuple(row) for row in found.tolist()})
    assert ((found != WHOLE).sum(axis=1) == 1).all()
    assert neighbours((0, 0), (1, 1)).shape == (0, 2)


@settings(max_examples=25, deadline=None)
@given(any_choices, st.floats(0.75, 1.0), st.floats(0.05, 1.0))
def test_what_is_repaired_keeps_every_budget(choices: Choices, latency: float, size: float) -> None:
    limits = {**share(latency, "latency_ms"), **share(size, "size_bytes")}

    def kept(choices: Choices) -> bool:
        found = prices(SKELETON, MENU.plan(choices))
        return all(found[name] <= limit for name, limit in limits.items())

    repaired = Repair(MENU, PRICER, limits)(choices)
    if repaired is None:
        assert not any(kept(uniform) for uniform in UNIFORM)
    else:
        assert kept(repaired)
        assert (repaired == choices) == kept(choices)


@pytest.mark.parametrize(
    ("name", "part"), [("latency_ms", 0.95), ("size_bytes", 0.1), ("peak_memory_bytes", 0.5), ("macs", 0.2)]
)
def test_every_budget_on_a_prediction_can_be_met(name: str, part: float) -> None:
    limits = share(part, name)
    repaired = Repair(MENU, PRICER, limits)(WHOLE)
    assert repaired is not None
    assert prices(SKELETON, MENU.plan(repaired))[name] <= limits[name]


def test_what_cannot_be_met_is_said() -> None:
    for choices in (WHOLE, MENU.uniform(0.0, "int8", 4)):
        assert Repair(MENU, PRICER, share(0.5, "latency_ms"))(choices) is None


def test_nothing_is_changed_that_need_not_be() -> None:
    limits = share(0.3, "size_bytes")
    repaired = Repair(MENU, PRICER, limits)(WHOLE)
    assert repaired is not None
    for knob, (now, old) in enumerate(zip(repaired, WHOLE, strict=True)):
        if now != old:
            restored = (*repaired[:knob], old, *repaired[knob + 1 :])
            assert prices(SKELETON, MENU.plan(restored))["size_bytes"] > limits["size_bytes"]


def test_the_harmless_knob_goes_first() -> None:
    limits = share(0.95, "size_bytes")
    for harmless in range(len(SIZES)):
        row = np.zeros(SIZES[harmless])
        rows = list(even().divergence)
        rows[harmless] = row
        alone = [c for c in neighbours(WHOLE, SIZES).tolist() if c[harmless] != WHOLE[harmless]]
        if PRICER(np.array(alone))["size_bytes"].min() > limits["size_bytes"]:
            continue
        repaired = Repair(MENU, PRICER, limits, Sensitivity(tuple(rows)))(WHOLE)
        assert repaired is not None
        assert [k for k, (a, b) in enumerate(zip(repaired, WHOLE, strict=True)) if a != b] == [harmless]


def test_of_two_ways_the_one_that_harms_less_for_what_it_saves() -> None:
    limits = share(0.6, "size_bytes")
    gentle, rough = even(0.1), even(1.0)
    rows = [*rough.divergence]
    found = Repair(MENU, PRICER, limits, Sensitivity(tuple(rows)))(WHOLE)
    assert found is not None
    hit = next(k for k, (a, b) in enumerate(zip(found, WHOLE, strict=True)) if a != b)
    # The knob that was taken becomes a hundred times as sensitive, the others gentler: now it is spared.
    rows = [row * (100.0 if k == hit else 1.0) for k, row in enumerate(gentle.divergence)]
    spared = Repair(MENU, PRICER, limits, Sensitivity(tuple(rows)))(WHOLE)
    assert spared is not None
    assert spared[hit] == WHOLE[hit]


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = share(0.1, "size_bytes")
    counts = []

    class Counted(ChoicePricer):
        def __call__(self, choices: Ints) -> Mapping[str, Floats]:
            counts.append(len(choices))
            return super().__call__(choices)

    repair = Repair(MENU, Counted(MENU, SKELETON), limits)
    assert repair(WHOLE) is not None
    assert max(counts) == sum(SIZES) - len(SIZES)
    # Without the means to look around, the nearest it knows is a uniform plan.
    counts.clear()
    monkeypatch.setattr(module, "MOST_PRICED", 1)
    found = repair(WHOLE)
    assert found is not None
    assert prices(SKELETON, MENU.plan(found))["size_bytes"] <= limits["size_bytes"]
    assert sum(counts) <= 1 + len(UNIFORM) + len(SIZES) ** 2


def test_excess_is_relative_and_adds_up() -> None:
    repair = Repair(MENU, PRICER, share(0.5, "size_bytes", "macs"))
    assert repair.excess(np.array([WHOLE])) == pytest.approx([2.0])
    assert repair.excess(np.array([MENU.uniform(0.0, "int8", 4)])).tolist() == [0.0]
    assert Repair(MENU, PRICER, {}).excess(np.array([WHOLE, WHOLE])).tolist() == [0.0, 0.0]


def test_without_a_sensitivity_channels_and_bits_stand_in() -> None:
    for knob, row in zip(MENU.knobs, structural_harm(MENU), strict=True):
        harm = {(o.keep, o.format.compute, o.format.storage.bits): h for o, h in zip(knob.options, row, strict=True)}
        widest = max(keep or 0 for keep, _, _ in harm) or None
        assert min(harm.values()) == harm[widest, "fp32", 32]
        for (keep, compute, bits), value in harm.items():
            if bits == 8:
                assert harm[keep, compute, 4] > value
            if keep is not None and keep != widest:
                assert value > harm[widest, compute, bits]
