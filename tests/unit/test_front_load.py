"""Reading a run back: points, choices among them, and clear errors for what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autocompress.errors import InfeasibleError, UsageError
from autocompress.front import LoadedFront, drop_between, load_front, load_point
from autocompress.plan import CompressionPlan
from tests.fixtures.runs import build_run, make_front, make_plan, make_point


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def front(run: Path) -> LoadedFront:
    return load_front(run)


def test_points_come_most_accurate_first(front: LoadedFront) -> None:
    validations = [point.validation for point in front.points]
    assert len(front) == 12
    assert validations == sorted(validations, reverse=True)


def test_gains_are_relative_to_the_original(front: LoadedFront) -> None:
    point = front["p06"]
    assert point.speedup == pytest.approx(0.6 / point.info.latency_ms.measured)
    assert point.shrink == pytest.approx(1_160_000 / point.size_bytes)
    assert point.drop == pytest.approx((0.9332 - point.validation) * 100)


def test_a_loss_of_exactly_two_points_is_two_points(front: LoadedFront) -> None:
    original, other = (
        make_point(name, CompressionPlan(), validation=right / 350, latency_ms=0.1, size_bytes=100)
        for name, right in (("original", 347), ("other", 340))
    )
    assert (347 / 350 - 340 / 350) * 100 > 2.0
    assert drop_between(front.front.metric, original, other, "validation") == 2.0


def test_best_under_a_latency_budget_is_the_most_accurate(front: LoadedFront) -> None:
    fitting = [point for point in front.points if point.latency_ms <= 0.2]
    assert front.best(max_latency_ms=0.2).id == max(fitting, key=lambda point: point.validation).id


def test_best_under_a_drop_gains_most(front: LoadedFront) -> None:
    fitting = [point for point in front.points if point.drop <= 1.0]
    assert front.best(max_drop=1.0).id == max(fitting, key=front.gain).id == "p06"


def test_gain_is_a_share_of_the_best_on_each_axis(front: LoadedFront) -> None:
    assert front.gain(front["p11"]) == pytest.approx(2.0)
    assert front.gain(front.reference) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("prefer", "attribute"), [("latency", "latency_ms"), ("size", "size_bytes"), ("quality", "drop")]
)
def test_preference(front: LoadedFront, prefer: str, attribute: str) -> None:
    wanted = min(front.points, key=lambda point: getattr(point, attribute))
    assert front.best(prefer=prefer).id == wanted.id


def test_no_point_fits_names_the_nearest(front: LoadedFront) -> None:
    with pytest.raises(InfeasibleError, match=r"nearest is p11 with latency 0\.05\d+ ms") as caught:
        front.best(max_latency_ms=0.01)
    assert caught.value.nearest.id == "p11"
    assert caught.value.exit_code == 3


def test_an_unknown_cost_breaks_its_budget(front: LoadedFront) -> None:
    with pytest.raises(InfeasibleError, match="energy unknown"):
        front.best(max_energy_mj=1000.0)


def test_predicted_latency_is_held_at_the_end_of_its_band(tmp_path: Path) -> None:
    predicted = load_front(build_run(tmp_path / "run", make_front(measured=False)))
    best = predicted.best(max_latency_ms=0.2)
    assert best.info.latency_ms.error_band[1] <= 0.2


def test_knee_lies_between_the_ends(front: LoadedFront) -> None:
    assert front.knee().id not in (front.points[0].id, front.points[-1].id)


def test_frame_has_a_row_a_point(front: LoadedFront) -> None:
    frame = front.to_frame()
    assert list(frame.index) == [point.id for point in front.points]
    assert frame.loc["p03", "size_bytes"] == front["p03"].size_bytes
    assert {"validation", "test", "latency_ms", "speedup", "shrink"} <= set(frame.columns)


def test_frame_of_an_empty_front(tmp_path: Path) -> None:
    empty = load_front(build_run(tmp_path / "run", make_front(0, status="running")))
    assert empty.to_frame().empty
    with pytest.raises(InfeasibleError, match="no points yet"):
        empty.best()


def test_point_paths(front: LoadedFront, run: Path) -> None:
    assert front["p02"].path == run / "models" / "p02"
    assert front["p02"].onnx_path == run / "models" / "p02" / "model.onnx"


def test_unknown_point_lists_known_ones(front: LoadedFront) -> None:
    with pytest.raises(UsageError, match=r"unknown point 'p99'; nearest"):
        front["p99"]


def test_the_original_without_a_checkpoint_says_so(front: LoadedFront) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        front.reference.load()


def test_load_point_in_a_run_knows_the_original(run: Path) -> None:
    assert load_point(run / "models" / "p04").speedup == load_front(run)["p04"].speedup


def test_load_point_from_a_copy(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run / "models" / "p04", tmp_path / "mine")
    point = load_point(copied)
    assert (point.id, point.onnx_path, point.speedup) == ("p04", tmp_path / "mine" / "model.onnx", None)


def test_load_point_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metrics\.json"):
        load_point(tmp_path)


def test_missing_run_names_a_near_one(run: Path) -> None:
    with pytest.raises(UsageError, match=r"no such run directory.*nearest.*demo"):
        load_front(run.parent / "dem")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        load_front(tmp_path)


def test_a_run_that_ended_early_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: digits\n")
    with pytest.raises(UsageError, match="--resume"):
        load_front(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(schema=2), "schema 2"),
        (lambda stored: stored.pop("task"), "task: field required"),
        (lambda stored: stored["points"][0].update(size_bytes="much"), r"points\.0\.size_bytes"),
        (lambda stored: stored["points"][0].update(artifact="../../etc/passwd"), "leads out of the run"),
    ],
)
def test_a_front_that_does_not_fit_the_schema(run: Path, tmp_path: Path, change, message: str) -> None:
    stored = json.loads((run / "front.json").read_text())
    change(stored)
    (tmp_path / "front.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=message):
        load_front(tmp_path)


def test_a_front_cut_off_in_the_middle(run: Path, tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text((run / "front.json").read_text()[:1000])
    with pytest.raises(UsageError, match="not readable as JSON"):
        load_front(tmp_path)


def test_metric_where_less_is_better(tmp_path: Path) -> None:
    import random

    from autocompress.plan import Metric

    front = make_front(3)
    worse = make_point("p90", make_plan(0.5, random.Random(0)), validation=0.5, latency_ms=0.1, size_bytes=1000)
    front = front.model_copy(
        update={"metric": Metric(name="perplexity", unit="", higher_is_better=False), "points": (*front.points, worse)}
    )
    loaded = load_front(build_run(tmp_path / "run", front))
    assert loaded.points[0].id == "p90"
    assert loaded["p90"].drop == pytest.approx(0.5 - 0.9332)
