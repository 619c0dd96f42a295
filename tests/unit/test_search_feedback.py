"""Measurements of delivered models correct the prices, at defined moments and repeatably."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.hardware.anchors import anchor_plans
from autocompress.hardware.calibration import Observation
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, FrontPoint, LayerPlan, Student
from autocompress.search.anchoring import unmeasured_plans
from autocompress.search.feedback import Feedback
from autocompress.search.menu import format_of
from tests.fixtures.runs import make_point
from tests.fixtures.search import make_graph, make_menu, make_profile, make_skeleton

INT8 = {layer.name: format_of("int8", 8) for layer in make_graph().compressible}
PLANS = [CompressionPlan(groups={"wide": 32, "block.conv1": keep}, layers=INT8) for keep in (8, 12, 16, 20)]


def anchored() -> tuple[Skeleton, list[Observation]]:
    """A skeleton calibrated on anchors that are exactly as predicted."""
    skeleton = make_skeleton()
    plans = anchor_plans(skeleton.graph)
    table = skeleton.price(plans)
    anchors = [
        Observation(p, float(ms), float(size))
        for p, ms, size in zip(plans, table.latency_ms, table.size_bytes, strict=True)
    ]
    skeleton.calibrate(anchors)
    return skeleton, anchors


def points(skeleton: Skeleton, factor: float) -> list[FrontPoint]:
    """The plans measured at ``factor`` times what is predicted."""
    table = skeleton.price(PLANS)
    rows = zip(PLANS, table.latency_ms, table.size_bytes, strict=True)
    return [
        make_point(f"p{i}", plan, validation=0.9, latency_ms=factor * float(ms), size_bytes=int(size))
        for i, (plan, ms, size) in enumerate(rows)
    ]


def original(ms: float) -> FrontPoint:
    return make_point("original", CompressionPlan(), validation=0.95, latency_ms=ms, size_bytes=1000)


def test_prices_move_towards_what_was_measured_once_applied(tmp_path: Path) -> None:
    skeleton, anchors = anchored()
    feedback = Feedback(skeleton, anchors, tmp_path / "own.json", tmp_path / "shared.json")
    dense_ms, before = anchors[0][1], skeleton.price(PLANS).latency_ms
    measured = points(skeleton, 1.2)
    assert feedback.take(measured, original(dense_ms)) == len(PLANS)
    assert (skeleton.price(PLANS).latency_ms == before).all()
    feedback.apply()
    after = skeleton.price(PLANS).latency_ms
    # Four new measurements stand against a dozen anchors that were exactly as predicted.
    assert (after > 1.05 * before).all()
    assert skeleton.price([CompressionPlan()]).latency_ms[0] == pytest.approx(dense_ms, rel=0.05)
    assert feedback.take(measured, original(dense_ms)) == 0


def test_a_machine_that_is_slower_today_says_nothing_of_a_model(tmp_path: Path) -> None:
    skeleton, anchors = anchored()
    feedback = Feedback(skeleton, anchors, tmp_path / "own.json", tmp_path / "shared.json")
    before = skeleton.price(PLANS).latency_ms
    feedback.take(points(skeleton, 1.4), original(1.4 * anchors[0][1]))
    feedback.apply()
    assert skeleton.price(PLANS).latency_ms == pytest.approx(before, rel=1e-3)


def test_a_resumed_run_and_one_with_the_same_seed_price_alike(tmp_path: Path) -> None:
    skeleton, anchors = anchored()
    first = Feedback(skeleton, anchors, tmp_path / "own.json", tmp_path / "shared.json")
    first.take(points(skeleton, 1.2), original(anchors[0][1]))
    first.apply()
    expected = skeleton.price(PLANS).latency_ms

    resumed, _ = anchored()
    Feedback(resumed, anchors, tmp_path / "own.json", tmp_path / "shared.json").apply()
    assert (resumed.price(PLANS).latency_ms == expected).all()

    # Another run measures the same structures at other times, and takes those of the first.
    again, _ = anchored()
    second = Feedback(again, anchors, tmp_path / "other.json", tmp_path / "shared.json")
    second.take(points(again, 1.1), original(anchors[0][1]))
    second.apply()
    assert (again.price(PLANS).latency_ms == expected).all()


def test_students_and_what_was_not_measured_are_not_taken(tmp_path: Path) -> None:
    skeleton, anchors = anchored()
    feedback = Feedback(skeleton, anchors, tmp_path / "own.json", tmp_path / "shared.json")
    student = CompressionPlan(base=Student(width=0.5, init="fresh"))
    given = [
        make_point("student", student, validation=0.9, latency_ms=0.1, size_bytes=1000),
        make_point("waiting", PLANS[0], validation=0.9, latency_ms=None, size_bytes=1000),
    ]
    assert feedback.take(given, original(anchors[0][1])) == 0
    assert not (tmp_path / "own.json").exists()


def test_kernels_never_measured_are_among_the_anchors() -> None:
    from autocompress.hardware.cost import FittedCostModel

    graph, menu = make_graph(), make_menu()
    known = make_profile()
    assert unmeasured_plans(menu, make_skeleton(), anchor_plans(graph)) == []
    kernels = {kind: cost for kind, cost in known.kernels.items() if kind != "conv_int8"}
    blind = FittedCostModel(known.model_copy(update={"kernels": kernels})).lower(graph)
    floats = [plan for plan in anchor_plans(graph) if LayerPlan(compute="int8") not in plan.layers.values()]
    floats = [plan for plan in floats if all(form.compute == "fp32" for form in plan.layers.values())]
    found = unmeasured_plans(menu, blind, floats)
    assert len(found) == 1
    assert any("conv_int8" in text for text in blind.estimate(found[0]).unmodelled)
