"""What of the measured models becomes the front, why the rest does not, and what stands on the disk meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pandas as pd
import pytest

from autocompress.errors import InfeasibleError
from autocompress.export.metadata import describe, read_metadata
from autocompress.front import load_front
from autocompress.plan import CompressionPlan, FrontPoint, Metric, Target
from autocompress.search.deliver import LATENCY_MARGIN, ORIGINAL, UNIFORM_INT8, Delivery
from autocompress.search.publishing import publish, require_feasible
from autocompress.tasks.base import Task
from tests.fixtures.runs import make_point

TARGET = Target(hardware="local", runtime="onnxruntime", version="1.0")


def point(name: str, validation: float, latency_ms: float | None, size_bytes: int, **more: Any) -> FrontPoint:
    return make_point(
        name, CompressionPlan(), validation=validation, latency_ms=latency_ms, size_bytes=size_bytes, **more
    )


def delivery(
    run: Path,
    *points: FrontPoint,
    limits: Mapping[str, float] | None = None,
    objectives: tuple[str, ...] = ("error", "latency_ms", "size_bytes"),
    metric: Metric | None = None,
) -> Delivery:
    """A delivery as it stands once these points and the original (95%, 1 ms, 1 MB) are measured."""
    task = cast(Task, SimpleNamespace(name="t", model_name="m", metric=metric or Metric()))
    made = Delivery(run, task, TARGET, objectives, limits or {}, seed=0)
    for given in (point(ORIGINAL, 0.95, 1.0, 1_000_000), *points):
        made.points[given.id] = given
        if given.latency_ms.measured is not None:
            made.uppers[given.id] = given.latency_ms.measured * LATENCY_MARGIN
        right = round(given.quality.validation * 1000)
        made.scores[given.id, "validation"] = np.array([1.0] * right + [0.0] * (1000 - right))
        folder = run / ".work" / "models" / given.id
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("model.onnx", "model.safetensors", "plan.json"):
            (folder / file).write_text(f"{file} of {given.id}")
        empty = onnx.helper.make_model(onnx.GraphProto(name=given.id))
        onnx.helper.set_model_props(empty, describe(given.plan))
        (folder / "model.onnx").write_bytes(empty.SerializeToString())
    return made


def names(made: Delivery) -> list[str]:
    return [p.id for p in made.select()[0]]


# ---------------------------------------------------------------------------------------------------------- the front


def test_the_front_is_what_nothing_measured_dominates(tmp_path: Path) -> None:
    made = delivery(
        tmp_path,
        point("small", 0.90, 0.5, 100_000),
        point("fast", 0.93, 0.3, 300_000),
        point("worse", 0.92, 0.4, 400_000),
        point("good", 0.94, 0.6, 250_000),
    )
    kept, rejected = made.select()
    assert [p.id for p in kept] == ["good", "fast", "small"]
    assert rejected == {"worse": "dominated as measured by fast"}


def test_predictions_do_not_decide(tmp_path: Path) -> None:
    made = delivery(
        tmp_path,
        point("a", 0.90, 0.5, 100_000, predicted=0.1),
        point("b", 0.90, 0.4, 100_000, predicted=0.9),
        point("unmeasured", 0.95, None, 1_000, predicted=0.01),
    )
    assert names(made) == ["b"]


def test_test_quality_does_not_decide(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.93, 0.5, 100_000, test=0.10), point("b", 0.92, 0.5, 100_000, test=0.99))
    assert names(made) == ["a"]


def test_permuted_test_scores_change_no_choice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chosen = []
    for order in (range(8), rng.permutation(8)):
        points = [
            point(f"p{i}", 0.90 + 0.005 * i, 0.3 + 0.05 * (i % 3), 100_000 + 10_000 * i, test=0.80 + 0.02 * order[i])
            for i in range(8)
        ]
        made = delivery(tmp_path / str(len(chosen)), *points, limits={"drop": 4.0})
        for p in points:
            made.scores[p.id, "test"] = rng.random(1000).round()
        kept, rejected = made.select()
        chosen.append(([p.id for p in kept], [p.tied_with for p in kept], rejected))
    assert chosen[0] == chosen[1]


def test_the_original_and_the_baseline_are_not_candidates(tmp_path: Path) -> None:
    made = delivery(tmp_path, point(UNIFORM_INT8, 0.95, 0.1, 1_000), point("a", 0.90, 0.5, 100_000))
    assert names(made) == ["a"]


def test_of_points_alike_within_2_percent_on_every_axis_the_better_stays(tmp_path: Path) -> None:
    made = delivery(
        tmp_path,
        point("a", 0.900, 0.500, 100_000),
        point("alike", 0.8985, 0.495, 99_000),
        point("apart", 0.8985, 0.496, 95_000),
    )
    kept, rejected = made.select()
    assert [p.id for p in kept] == ["a", "apart"]
    assert rejected == {"alike": "within 2% of another point on every axis"}


def test_a_point_that_saves_next_to_nothing_for_its_errors_leaves(tmp_path: Path) -> None:
    made = delivery(
        tmp_path,
        point("good", 0.920, 0.500, 100_000),
        point("chance", 0.919, 0.495, 97_000),  # One image of a thousand proves nothing.
        point("poor", 0.880, 0.492, 99_000),
        point("poorer", 0.840, 0.484, 99_000),  # Within 2% of what left, not of what stayed.
    )
    kept, rejected = made.select()
    assert [p.id for p in kept] == ["good", "chance", "poorer"]
    assert rejected == {"poor": "less accurate than good, and no cost is 2% lower"}
    assert {p.id: p.tied_with for p in kept} == {"good": ("chance",), "chance": ("good",), "poorer": ()}


def test_equal_points_leave_one(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.9, 0.5, 100_000), point("b", 0.9, 0.5, 100_000))
    kept, rejected = made.select()
    assert len(kept) == len(rejected) == 1


def test_ties_label_points_and_remove_none(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.901, 0.5, 100_000), point("b", 0.900, 0.3, 100_000), point("c", 0.7, 0.1, 1))
    assert {p.id: p.tied_with for p in made.select()[0]} == {"a": ("b",), "b": ("a",), "c": ()}


def test_dominance_is_over_the_objectives_asked_for(tmp_path: Path) -> None:
    points = point("a", 0.93, 0.5, 100_000), point("b", 0.92, 0.6, 50_000)
    assert names(delivery(tmp_path, *points)) == ["a", "b"]
    assert names(delivery(tmp_path, *points, objectives=("error", "latency_ms"))) == ["a"]


@pytest.mark.parametrize(
    ("objectives", "limits", "kept"),
    [
        (("error",), {"size_bytes": 300_000}, ["b"]),
        (("latency_ms",), {"drop": 4.0}, ["b", "c"]),
        (("latency_ms",), {"drop": 1.0}, ["a"]),
        (("latency_ms", "size_bytes"), {"drop": 4.0}, ["c"]),
        (("size_bytes", "latency_ms", "macs", "peak_memory_bytes"), {"drop": 4.0}, ["a", "c"]),
        (("error", "latency_ms", "size_bytes", "macs"), {}, ["a", "b", "c", "d"]),
    ],
)
def test_a_front_of_one_to_four_objectives(
    tmp_path: Path, objectives: tuple[str, ...], limits: dict[str, float], kept: list[str]
) -> None:
    made = delivery(
        tmp_path,
        point("a", 0.94, 0.60, 400_000, macs=10, peak_memory_bytes=10),
        point("b", 0.93, 0.302, 250_000, macs=20, peak_memory_bytes=20),
        point("c", 0.92, 0.300, 100_000, macs=20, peak_memory_bytes=20),
        point("d", 0.80, 0.100, 50_000, macs=20, peak_memory_bytes=20),
        limits=limits,
        objectives=objectives,
    )
    assert names(made) == kept
    front = publish(made, "complete", 4, 1.0, {})
    loaded = load_front(tmp_path)
    assert [p.id for p in loaded.points] == kept
    assert 0.0 < front.search.hypervolume <= 1.0
    assert loaded.knee().id in kept
    assert loaded.best(prefer="latency").id in kept
    rejected = pd.read_csv(tmp_path / "rejected.csv").set_index("id")["reason"]
    assert set(rejected.index) == {"a", "b", "c", "d"} - set(kept)


def test_a_published_point_gives_way_to_what_dominates_it_alone(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("old", 0.900, 0.500, 100_000))
    before = publish(made, "complete", 1, 1.0, {}).search.hypervolume
    # More accurate, and within 2% on every axis, though not as fast and small: on its own it would take the place.
    for given in delivery(tmp_path / "other", point("new", 0.901, 0.505, 101_000)).points.values():
        if given.id == "new":
            made.points["new"] = given
            made.uppers["new"] = 0.52
            made.scores["new", "validation"] = np.array([1.0] * 901 + [0.0] * 99)
    assert names(made) == ["old"]
    assert publish(made, "complete", 2, 2.0, {}).search.hypervolume == before
    again = Delivery(tmp_path, made.task, TARGET, made.objectives, {}, seed=0)
    assert again.standing == {"old"}
    # Where neither stands yet, the more accurate one does.
    made.standing = frozenset()
    assert names(made) == ["new"]


def test_a_point_of_unknown_cost_is_left_out_with_a_reason(tmp_path: Path) -> None:
    made = delivery(
        tmp_path,
        point("known", 0.90, 0.5, 100_000),
        point("unknown", 0.94, 0.4, 90_000, peak_memory_bytes=None),
        objectives=("error", "peak_memory_bytes"),
    )
    kept, rejected = made.select()
    assert [p.id for p in kept] == ["known"]
    assert "peak_memory_bytes" in rejected["unknown"]


def test_a_metric_where_less_is_better(tmp_path: Path) -> None:
    metric = Metric(name="error", unit="m", higher_is_better=False)
    made = delivery(tmp_path, point("a", 0.20, 0.5, 100_000), point("b", 0.10, 0.5, 100_000), metric=metric)
    assert names(made) == ["b"]


# ---------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("limits", "kept", "broken"),
    [
        ({"latency_ms": 0.45}, ["fast"], {"slow": "latency_ms by 20.2%"}),
        ({"size_bytes": 100_000}, ["slow"], {"fast": "size_bytes by 100.0%"}),
        ({"drop": 2.0}, ["slow"], {"fast": "drop by 50.0%"}),
        ({"macs": 1}, [], {"slow": "macs", "fast": "macs"}),
        ({"peak_memory_bytes": 1}, [], {"slow": "peak_memory_bytes", "fast": "peak_memory_bytes"}),
        ({"energy_mj": 1.0}, [], {"slow": "energy_mj by inf%", "fast": "energy_mj"}),
    ],
)
def test_a_budget_holds_as_measured(
    tmp_path: Path, limits: dict[str, float], kept: list[str], broken: dict[str, str]
) -> None:
    made = delivery(tmp_path, point("slow", 0.94, 0.525, 100_000), point("fast", 0.92, 0.4, 200_000), limits=limits)
    found, rejected = made.select()
    assert [p.id for p in found] == kept
    assert rejected.keys() == broken.keys()
    for name, text in broken.items():
        assert rejected[name].startswith("breaks a budget: ")
        assert text in rejected[name]


def test_a_latency_budget_holds_with_a_margin(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.94, 0.50, 100_000), limits={"latency_ms": 0.505})
    assert names(made) == []
    made.uppers["a"] = 0.505
    assert names(made) == ["a"]


def test_a_point_over_budget_dominates_nothing(tmp_path: Path) -> None:
    made = delivery(
        tmp_path, point("big", 0.94, 0.2, 120_000), point("small", 0.93, 0.3, 90_000), limits={"size_bytes": 100_000}
    )
    assert names(made) == ["small"]


def test_infeasible_names_the_nearest(tmp_path: Path) -> None:
    made = delivery(
        tmp_path, point("near", 0.90, 0.5, 110_000), point("far", 0.94, 0.5, 400_000), limits={"size_bytes": 100_000}
    )
    front = publish(made, "complete", 2, 1.0, {})
    with pytest.raises(
        InfeasibleError, match=r"size_bytes <= 100000\); nearest: near .* breaks size_bytes by 10.0%"
    ) as e:
        require_feasible(made, front)
    assert e.value.nearest is not None
    assert e.value.nearest.id == "near"


# ---------------------------------------------------------------------------------------------------------- on the disk


def test_publishing_keeps_the_run_whole_and_removes_what_left_the_front(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.90, 0.5, 100_000), point(UNIFORM_INT8, 0.94, 0.5, 250_000))
    publish(made, "running", 1, 1.0, {"read": 1.0})
    assert {f.name for f in (tmp_path / "models").iterdir()} == {ORIGINAL, UNIFORM_INT8, "a"}
    (tmp_path / "models" / "c.part").mkdir()  # what a kill leaves
    made.points["b"] = point("b", 0.92, 0.4, 90_000)
    made.uppers["b"] = 0.41
    made.scores["b", "validation"] = made.scores["a", "validation"]
    made.failures["odd"] = "node conv1 is not executed in int8"
    for file in ("model.onnx", "model.safetensors", "plan.json"):
        path = tmp_path / ".work" / "models" / "b" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("b")
    publish(made, "complete", 2, 2.0, {"read": 1.0})
    front = load_front(tmp_path)
    assert (front.front.status, [p.id for p in front.points]) == ("complete", ["b"])
    assert {f.name for f in (tmp_path / "models").iterdir()} == {ORIGINAL, UNIFORM_INT8, "b"}
    for shown in (front.reference, *front.baselines, *front.points):
        assert sorted(f.name for f in shown.path.iterdir()) == [
            "metrics.json",
            "model.onnx",
            "model.safetensors",
            "plan.json",
        ]
        assert json.loads((shown.path / "metrics.json").read_text())["id"] == shown.id
    rejected = pd.read_csv(tmp_path / "rejected.csv").set_index("id")["reason"]
    assert dict(rejected) == {"a": "dominated as measured by b", "odd": "node conv1 is not executed in int8"}
    assert list(pd.read_csv(tmp_path / "front.csv")["id"]) == ["b"]


def test_metrics_follow_a_new_measurement(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.90, 0.5, 100_000))
    publish(made, "running", 1, 1.0, {})
    made.points["a"] = point("a", 0.90, 0.45, 100_000)
    made._save("a")
    publish(made, "complete", 1, 1.0, {})
    said = read_metadata(tmp_path / "models" / "a" / "model.onnx").metrics
    assert said is not None
    assert said.latency_ms == 0.45
    metrics = json.loads((tmp_path / "models" / "a" / "metrics.json").read_text())
    assert metrics["latency_ms"]["measured"] == 0.45


# ------------------------------------------------------------------------------------------- a target not here


def absent(run: Path, *points: FrontPoint, **more: Any) -> Delivery:
    """A delivery for a device that is not here: nothing is measured, latencies are off by a fifth either way."""
    made = delivery(run, **more)
    made.present = False
    banded = [point(ORIGINAL, 0.95, None, 1_000_000, predicted=1.0), *points]
    for given in banded:
        ms = given.latency_ms.predicted or 0.0
        latency = given.latency_ms.model_copy(update={"error_band": (0.8 * ms, 1.2 * ms)})
        made.points[given.id] = given.model_copy(update={"latency_ms": latency})
        right = round(given.quality.validation * 1000)
        made.scores[given.id, "validation"] = np.array([1.0] * right + [0.0] * (1000 - right))
        folder = run / ".work" / "models" / given.id
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("model.onnx", "model.safetensors", "plan.json"):
            (folder / file).write_text(f"{file} of {given.id}")
        empty = onnx.helper.make_model(onnx.GraphProto(name=given.id))
        onnx.helper.set_model_props(empty, describe(given.plan))
        (folder / "model.onnx").write_bytes(empty.SerializeToString())
    made.measure([given.id for given in banded], 0.1)
    return made


def test_where_the_target_is_not_here_predictions_decide_and_nothing_is_called_measured(tmp_path: Path) -> None:
    made = absent(
        tmp_path,
        point("fast", 0.93, None, 300_000, predicted=0.3),
        point("worse", 0.92, None, 400_000, predicted=0.4),
    )
    front = publish(made, "complete", 2, 1.0, {})
    assert not front.verified
    assert [p.id for p in front.points] == ["fast"]
    assert made.select()[1] == {"worse": "dominated as predicted by fast"}
    stored = load_front(tmp_path)
    for shown in (stored.reference, *stored.points):
        assert (shown.info.latency_ms.measured, shown.info.latency_ms.measured_p95) == (None, None)
    assert stored["fast"].speedup == pytest.approx(1 / 0.3)


def test_budgets_hold_on_the_upper_end_of_a_prediction(tmp_path: Path) -> None:
    points = point("near", 0.94, None, 100_000, predicted=0.5), point("far", 0.90, None, 90_000, predicted=0.4)
    made = absent(tmp_path, *points, limits={"latency_ms": 0.55})
    assert names(made) == ["far"]
    assert made.select()[1] == {"near": "breaks a budget: latency_ms by 9.1%"}
    energy = absent(
        tmp_path / "energy", point("a", 0.9, None, 1, predicted=0.1, energy_mj=1.0), limits={"energy_mj": 1.2}
    )
    assert names(energy) == ["a"]
    energy.bounds["a"] = {"energy_mj": 1.3}
    assert energy.select()[1] == {"a": "breaks a budget: energy_mj by 8.3%"}


def test_predictions_are_taken_up_again(tmp_path: Path) -> None:
    made = absent(tmp_path, point("a", 0.93, None, 300_000, predicted=0.3))
    made.bounds["a"] = {"energy_mj": 1.3}
    made._save("a")
    for name in (ORIGINAL, "a"):
        for split in ("validation", "test"):
            np.save(tmp_path / ".work" / "models" / name / f"{split}.npy", np.ones(4, dtype=np.float32))
    again = Delivery(tmp_path, made.task, TARGET, made.objectives, {}, seed=0, present=False)
    assert names(again) == ["a"]
    assert (again.uppers["a"], again.bounds["a"]) == (pytest.approx(0.36), {"energy_mj": 1.3})


def test_a_stop_between_a_file_and_its_metrics_leaves_the_size_true(tmp_path: Path) -> None:
    made = delivery(tmp_path, point("a", 0.93, 0.5, 100_000))
    for name in (ORIGINAL, "a"):
        made._save(name)
        for split in ("validation", "test"):
            np.save(tmp_path / ".work" / "models" / name / f"{split}.npy", np.ones(4, dtype=np.float32))
    artifact = tmp_path / ".work" / "models" / "a" / "model.onnx"
    artifact.write_bytes(artifact.read_bytes() + b" " * 12)
    again = Delivery(tmp_path, made.task, TARGET, made.objectives, {}, seed=0)
    assert again.points["a"].size_bytes == made.points["a"].size_bytes + 12
    assert again.points[ORIGINAL].size_bytes == made.points[ORIGINAL].size_bytes


def test_infeasible_predictions_say_that_they_are(tmp_path: Path) -> None:
    made = absent(tmp_path, point("a", 0.9, None, 100_000, predicted=0.5), limits={"latency_ms": 0.2})
    with pytest.raises(InfeasibleError, match=r"nearest: a with 0\.5 ms predicted, .* breaks latency_ms by 200\.0%"):
        require_feasible(made, publish(made, "complete", 1, 1.0, {}))
