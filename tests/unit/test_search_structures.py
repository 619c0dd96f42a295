"""Structures over depths and widths: which there are, what they cost, and a narrower one from a recovered one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from autocompress.config import RunConfig
from autocompress.errors import InfeasibleError
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.hardware.models import cost_model
from autocompress.plan import CompressionPlan, Original
from autocompress.search.bases import Base
from autocompress.search.context import Context, prices
from autocompress.search.engine import Engine
from autocompress.search.menu import Menu
from autocompress.search.narrowing import narrowed
from autocompress.search.seeds import FORMATS
from autocompress.search.structures import Bases, Structure, fresh_students, reprice, structures_of, students
from autocompress.spaces import SearchSpace, Students
from autocompress.tasks.models import resnet20
from tests.fixtures.search import make_profile

SPACE = SearchSpace(
    keep=(0.25, 0.5, 1.0), students=Students(widths=(0.5,), depths=(0.0, 0.34), init=("inherit", "fresh"))
)


@pytest.fixture(scope="module")
def context() -> Context:
    """A run as far as structures look at it."""
    torch.manual_seed(0)
    graph, weights = read_model(resnet20(channels=1).eval(), (torch.rand(2, 1, 16, 16),))
    pricer = cost_model(make_profile())
    menu = Menu(graph, SPACE, (), "")
    task = SimpleNamespace(
        factory=lambda width: resnet20(channels=1, width=width).eval(), accepts={"width"},
        example_inputs=(torch.rand(2, 1, 16, 16),),
    )  # fmt: skip
    found = SimpleNamespace(
        task=task, menu=menu, space=SPACE, costs=("latency_ms", "size_bytes"), cost_model=pricer,
        original=Base(Original(), graph, weights, pricer.lower(graph)), config=SimpleNamespace(seed=0),
        evaluator=SimpleNamespace(divergence_of=lambda module: float(len(module.graph.layers)),
                                  database=SimpleNamespace(weights=weights)),
        formats={layer: [o.format for o in k.options] for k in menu.knobs for layer in k.layers},
    )  # fmt: skip
    return cast(Context, found)


@pytest.fixture(scope="module")
def found(context: Context) -> list[Structure]:
    return students(context, Bases(context))


def test_students_are_of_every_depth_and_of_widths_on_the_menu(context: Context, found: list[Structure]) -> None:
    assert {len(s.dropped) for s in found} == {7, 5}
    assert len({s.key for s in found}) == len(found) > 20
    options = {knob.group: {o.keep for o in knob.options} for knob in context.menu.knobs if knob.group}
    for s in found:
        assert all(keep in options[group] for group, keep in s.plan.groups.items())
        assert 0.0 < s.macs < 1.0
        assert 0.0 < s.parameters < 1.0
        assert s.divergence is None
    # The last layers may be wider than the first, relative to the original, and the first than the last.
    stages = [[s.plan.groups[name] / size for name, size in (("conv1", 16), ("layer3.0.conv2", 64))] for s in found]
    assert any(first < last for first, last in stages)
    assert any(first > last for first, last in stages)


def test_a_space_without_students_has_none(context: Context) -> None:
    bare = SimpleNamespace(**{**vars(context), "space": SearchSpace(keep=(0.5, 1.0))})
    assert students(cast(Context, bare), Bases(context)) == []
    assert fresh_students(cast(Context, bare), Bases(context)) == []


def test_fresh_students_are_whole_models_of_their_own(context: Context) -> None:
    (fresh,) = fresh_students(context, Bases(context))
    assert fresh.kind == "fresh"
    assert fresh.macs == pytest.approx(0.25, abs=0.05)
    whole = structures_of(context, context.original, [CompressionPlan()])[0]
    assert whole.macs == pytest.approx(1.0)
    assert not whole.contains(fresh)


def test_a_structure_contains_what_is_cut_from_it_and_nothing_else(context: Context, found: list[Structure]) -> None:
    whole = structures_of(context, context.original, [CompressionPlan()])[0]
    assert all(whole.contains(s) and not s.contains(whole) for s in found)
    deep, shallow = ([s for s in found if len(s.dropped) == count] for count in (5, 7))
    assert not any(s.contains(d) for s in shallow for d in deep)
    pairs = [(a, b) for a in deep for b in shallow if a.contains(b)]
    assert pairs
    assert all(a.macs >= b.macs for a, b in pairs)


def test_prices_follow_the_device(context: Context, found: list[Structure]) -> None:
    some = found[:3]
    before = [dict(s.costs) for s in some]
    for s in some:
        s.costs = {}
    reprice(context, some)
    assert [s.costs for s in some] == before
    # The least of each cost: no format of all layers is cheaper.
    assert all(s.costs["size_bytes"] < s.parameters * 1.2e6 for s in some)


def test_narrowing_by_nothing_changes_nothing_and_else_little(context: Context) -> None:
    graph, weights = context.original.graph, context.original.weights
    assert weights is not None
    inputs = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [(inputs[:32],), (inputs[32:],)]
    same_graph, same = narrowed(graph, weights, {}, frozenset(), batches)
    with torch.no_grad():
        before = build_module(graph, weights)(inputs)
        torch.testing.assert_close(build_module(same_graph, same)(inputs), before, rtol=1e-2, atol=1e-2)
    keep = {group.id: group.size // 2 for group in graph.groups}
    small_graph, small = narrowed(graph, weights, keep, {"layer1.1"}, batches)
    assert {g.id: g.size for g in small_graph.groups} == {
        name: size for name, size in keep.items() if not name.startswith("layer1.1")
    }
    assert build_module(small_graph, small)(inputs).shape == before.shape


def test_no_plans_are_no_structures(context: Context) -> None:
    assert structures_of(context, context.original, []) == []


def test_a_budget_that_shallow_students_alone_keep_is_no_reason_to_end(context: Context) -> None:
    engine = Engine.__new__(Engine)
    engine.space, engine.task, engine.profile = SPACE, context.task, make_profile()
    engine.config = cast(RunConfig, context.config)
    narrowest = [context.menu.plan(context.menu.uniform(0.0, *form)) for form in FORMATS]
    whole = min(prices(context.original.skeleton, plan)["latency_ms"] for plan in narrowest)
    engine.limits = {"latency_ms": whole / 1.25 * 0.95}
    engine._check_reachable(context.menu, context.original)
    deep = SPACE.model_copy(update={"students": Students(init=())})
    engine.space = deep
    with pytest.raises(InfeasibleError, match="no plan of this space can reach latency_ms"):
        engine._check_reachable(context.menu, context.original)
    engine.space, engine.limits = SPACE, {"latency_ms": whole / 1000.0}
    with pytest.raises(InfeasibleError, match="the depth at their least"):
        engine._check_reachable(context.menu, context.original)
