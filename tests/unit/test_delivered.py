"""Models that a run delivered and its own budgets kept off the front: other budgets may want them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.delivered import delivered_points, why_not_on_the_front
from autocompress.front import load_front
from autocompress.plan import CompressionPlan
from tests.fixtures.runs import build_run, make_front, make_point


def deliver(run: Path, name: str, **facts: Any) -> None:
    """Puts a model under ``.work`` as a search leaves it."""
    point = make_point(name, CompressionPlan(), **facts)
    folder = run / ".work" / "models" / name
    folder.mkdir(parents=True)
    for file in ("model.onnx", "model.safetensors", "plan.json", "validation.npy"):
        (folder / file).write_text(f"{file} of {name}")
    stored = {"point": point.model_dump(mode="json"), "latency_upper_ms": 1.0, "bounds": {}}
    (folder / "metrics.json").write_text(json.dumps(stored))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run held to 2 points of drop; beside its front, models over that and one that was never measured."""
    front = make_front(5).model_copy(update={"constraints": {"drop": 2.0}})
    front = front.model_copy(update={"points": front.points[:3]})
    run = build_run(tmp_path / "run", front)
    deliver(run, "tiny", validation=0.90, latency_ms=0.01, size_bytes=5_000)
    deliver(run, "narrow", validation=0.92, latency_ms=0.05, size_bytes=20_000, peak_memory_bytes=10_000)
    deliver(run, "unmeasured", validation=0.93, latency_ms=None, size_bytes=1_000)
    deliver(run, "reference", validation=0.9332, latency_ms=0.6, size_bytes=1_160_000)
    (run / "rejected.csv").write_text("id,reason\ntiny,breaks a budget: drop by 66.0%\nnarrow,dominated by p02\n")
    return run


def pick(run: Path, *words: object) -> Any:
    return CliRunner().invoke(app, ["pick", str(run), *map(str, words)])


def test_the_front_comes_first_and_what_was_not_measured_does_not_come(run: Path) -> None:
    found = [point.id for point in delivered_points(load_front(run))]
    assert found == ["p00", "p01", "p02", "narrow", "tiny"]


def test_a_run_without_its_work_offers_its_front(run: Path) -> None:
    (run / ".work" / "models").rename(run / "elsewhere")
    front = load_front(run)
    assert delivered_points(front) == front.points


def test_the_front_alone_is_what_a_front_chooses_from(run: Path) -> None:
    front = load_front(run)
    assert front.best(prefer="latency").id == "p02"
    assert front.best(prefer="latency", among=delivered_points(front)).id == "narrow"
    assert why_not_on_the_front(front, front["p02"]) is None


def test_pick_answers_new_budgets_from_what_was_turned_down(run: Path, tmp_path: Path) -> None:
    # The run's own budget on the drop holds until another one is given.
    assert pick(run, "--max-latency-ms", "0.02").exit_code == 3
    result = pick(run, "--max-latency-ms", "0.02", "--max-drop", "5", "--copy-to", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith("tiny: ")
    assert result.stdout.splitlines()[1] == "delivered, but not on the run's front: breaks a budget: drop by 66.0%"
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {
        "model.onnx",
        "model.safetensors",
        "plan.json",
        "metrics.json",
    }
    assert json.loads((tmp_path / "mine" / "metrics.json").read_text())["id"] == "tiny"


def test_pick_says_as_json_where_a_model_comes_from(run: Path) -> None:
    off = json.loads(pick(run, "--max-memory-mb", "0.02", "--json").stdout)
    assert (off["id"], off["on_front"], off["not_on_front_because"]) == ("narrow", False, "dominated by p02")
    assert off["path"] == str(run / ".work" / "models" / "narrow")
    # Without a budget the front is the answer, whatever is preferred.
    assert json.loads(pick(run, "--prefer", "latency", "--json").stdout)["id"] == "p02"
    on = json.loads(pick(run, "--json").stdout)
    assert (on["id"], on["on_front"], on["not_on_front_because"]) == ("p00", True, None)


def test_damaged_leftovers_are_no_models(run: Path) -> None:
    (run / ".work" / "models" / "tiny" / "metrics.json").write_text("{")
    (run / ".work" / "models" / "narrow" / "model.onnx").unlink()
    assert [point.id for point in delivered_points(load_front(run))] == ["p00", "p01", "p02"]
