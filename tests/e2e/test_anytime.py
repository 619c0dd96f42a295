"""More time for a finished run, other budgets from what a run knows, and other objectives, through the command line."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from autocompress.front import LoadedFront, load_front
from autocompress.search.scoring import front_hypervolume
from benchmarks.kill_resume import Trial, inspect_front, leftovers, trials_of
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine, Result, files_of

POISONED = """
import torch
import own_model
from torch.utils.data import DataLoader, TensorDataset

def task(data=None):
    found = own_model.task(data)
    images, targets = zip(*found["test"].dataset)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    shuffled = TensorDataset(torch.stack(images), torch.stack(targets)[order])
    return {**found, "test": DataLoader(shuffled, batch_size=64)}
"""


def delivered(run: Path) -> set[str]:
    return {path.parent.name for path in (run / ".work" / "models").glob("*/metrics.json")}


def plans(run: Path) -> list[Trial]:
    (study,) = (found for name, found in trials_of(run).items() if name.startswith("plans-"))
    return study


def snapshot(run: Path) -> dict[str, int]:
    return {name: (run / name).stat().st_mtime_ns for name in files_of(run)}


# --------------------------------------------------------------------------------------------------------- more time


@pytest.fixture(scope="module")
def longer(run: Run, cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The finished run with three quarters of a minute more."""
    path = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(run.path, path)
    return path, cli("search", "--out", path, "--resume", "--time-budget", "45s")


def test_more_time_finds_more_and_loses_nothing(run: Run, longer: tuple[Path, Result]) -> None:
    path, result = longer
    assert result.code == 0, result.err
    before, after = run.front, load_front(path)
    assert after.front.status == "complete"
    assert len(plans(path)) > len(plans(run.path))
    assert plans(path)[: len(plans(run.path))] == plans(run.path)
    recovered = {file.name for file in (path / ".work" / "recovered").iterdir()}
    assert recovered > {file.name for file in (run.path / ".work" / "recovered").iterdir()}
    assert delivered(path) > delivered(run.path)
    assert leftovers(path) == []
    # By what was measured last, but for points that new timings have brought within 2% of each other.
    now = {name: point for name, point in measured(path).items() if name in delivered(run.path)}
    old = [now[point.id] for point in before.points]
    volume = front_hypervolume(after.front.metric, after.front.reference, old)
    assert after.front.search.hypervolume >= 0.98 * volume


def measured(run: Path) -> dict[str, object]:
    from autocompress.plan import FrontPoint

    found = {}
    for path in (run / ".work" / "models").glob("*/metrics.json"):
        found[path.parent.name] = FrontPoint.model_validate(json.loads(path.read_text(encoding="utf-8"))["point"])
    return found


def test_the_time_that_was_added_is_kept_and_accounted_for(run: Run, longer: tuple[Path, Result]) -> None:
    path, _ = longer
    before, after = run.front.front.search, load_front(path).front.search
    assert 25.0 < after.seconds - before.seconds < 45.0 * 1.1 + 10.0
    assert 0.8 * after.seconds <= sum(after.stages.values()) <= after.seconds + 1.0


def test_without_a_word_on_time_it_stays_as_it_is(longer: tuple[Path, Result], cli: CommandLine) -> None:
    path, _ = longer
    before = snapshot(path)
    result = cli("search", "--out", path, "--resume", "--quiet")
    assert (result.code, result.out.strip()) == (0, str(path))
    assert snapshot(path) == before


# ------------------------------------------------------------------------------------------------- what a run knows


def test_other_budgets_are_answered_at_once(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    before = snapshot(run.path)
    limit = sorted(point.size_bytes for point in run.front.points)[0] * 1.05 / 1e6
    path = tmp_path / "small"
    result = cli("search", "--reuse", run.path, "--max-size-mb", limit, "--time-budget", "0s", "--out", path)
    assert result.code == 0, result.err
    assert snapshot(run.path) == before
    front, problems = inspect_front(path)
    assert front is not None
    assert problems == []
    assert (front.front.status, front.front.constraints) == ("complete", {"size_bytes": pytest.approx(limit * 1e6)})
    assert {point.id for point in front.points} <= delivered(run.path)
    assert all(point.size_bytes <= limit * 1e6 for point in front.points)
    assert delivered(path) == delivered(run.path)
    # Nothing was searched, trained or measured again.
    assert front.reference.latency_ms == run.front.reference.latency_ms
    assert front.front.search.seconds < 5.0
    assert cli("show", path).code == 0
    checks = json.loads(cli("verify", path, "--json").out)
    assert [check for check in checks if not check["ok"] and not check["name"].endswith(": latency")] == []


def test_what_nobody_keeps_names_the_nearest_of_all(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    result = cli(
        "search",
        "--reuse",
        run.path,
        "--max-size-mb",
        "0.0001",
        "--time-budget",
        "0s",
        "--out",
        tmp_path / "r",
        "--json",
    )
    assert result.code == 3
    nearest = json.loads(result.out)["nearest"]
    assert nearest["id"] in delivered(run.path)


def test_a_search_under_other_objectives_goes_on_from_there(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "fastest"
    options = ("--objectives", "latency_ms", "--max-drop", "2", "--trials", "6")
    result = cli("search", "--reuse", run.path, *options, "--out", path)
    assert result.code == 0, result.err
    front = load_front(path)
    assert front.front.objectives == ("latency_ms",)
    assert front.points
    assert all(point.drop <= 2.0 for point in front.points)
    known = [p for p in measured(path).values() if p.id not in ("original", "uniform-int8")]
    kept = [p for p in known if front_drop(front, p) <= 2.0]
    fastest = min(p.latency_ms.measured for p in kept)
    assert min(point.latency_ms for point in front.points) == fastest
    assert max(point.latency_ms for point in front.points) <= 1.02 * fastest
    assert delivered(path) > delivered(run.path)
    # Only its own six trials were evaluated; the others' plans were known.
    names = {name: found for name, found in trials_of(path).items() if name.startswith("plans-")}
    assert len(names) == 2
    assert sorted(len(found) for found in names.values())[1] >= 48
    page = (path / "report.html").read_text(encoding="utf-8")
    if len(front.points) == 1:
        assert "Fastest, within drop 2.00 points" in page
    assert "front-latency-test" in page
    picked = json.loads(cli("pick", path, "--json").out)
    assert picked["id"] in {point.id for point in front.points}


def front_drop(front: LoadedFront, info) -> float:
    return round(100.0 * (front.reference.validation - info.quality.validation), 9)


def test_a_run_under_other_threads_is_refused(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    result = cli("search", "--reuse", run.path, "--threads", "2", "--out", tmp_path / "run")
    assert result.code == 2
    assert "--threads: 2 differs from 1" in result.err
    assert not (tmp_path / "run").exists()


def test_pick_offers_what_the_runs_own_budgets_turned_down(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "strict"
    options = ("--max-drop", "0.5", "--time-budget", "0s", "--out", path)
    assert cli("search", "--reuse", run.path, *options).code in (0, 3)
    limit = min(point.size_bytes for point in run.front.points) * 1.01 / 1e6
    picked = cli("pick", path, "--max-size-mb", limit, "--max-drop", "100", "--copy-to", tmp_path / "mine")
    assert picked.code == 0, picked.err
    assert "delivered, but not on the run's front: breaks a budget: drop" in picked.out
    assert (tmp_path / "mine" / "model.onnx").stat().st_size <= limit * 1e6


# ------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(("--objectives", "error", "--max-size-mb", "0.02"), id="one"),
        pytest.param(
            ("--objectives", "error,latency_ms,size_bytes,peak_memory_bytes"), id="four", marks=pytest.mark.slow
        ),
        pytest.param(("--objectives", "size_bytes,macs", "--max-drop", "3"), id="costs", marks=pytest.mark.slow),
    ],
)
def test_a_front_of_other_objectives(run: Run, cli: CommandLine, tmp_path: Path, asked: tuple[str, ...]) -> None:
    path = tmp_path / "run"
    result = cli("search", *cli.own_task, *asked, "--trials", "12", "--out", path)
    assert result.code == 0, result.err
    front, problems = inspect_front(path)
    assert front is not None
    assert problems == []
    assert front.front.objectives == tuple(asked[1].split(","))
    assert front.points
    assert 0.0 < front.front.search.hypervolume <= 1.0
    if front.front.objectives == ("error",):
        known = [p for p in measured(path).values() if p.id not in ("original", "uniform-int8")]
        (point,) = front.points
        assert point.validation == max(p.quality.validation for p in known if p.size_bytes <= 20_000)
    shown = cli("show", path)
    assert shown.code == 0
    assert all(point.id in shown.out for point in front.points)
    assert "Validation minus test accuracy" in shown.out
    assert cli("pick", path, "--prefer", "knee").code == 0
    assert "Validation minus test accuracy" in (path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- test data, signals


def test_permuted_test_targets_change_no_choice(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    (cli.cwd / "poisoned.py").write_text(POISONED, encoding="utf-8")
    path = tmp_path / "run"
    try:
        options = ("--task", "poisoned:task", "--data", cli.weights, "--trials", "48", "--seed", "0")
        result = cli("search", *options, "--out", path)
    finally:
        (cli.cwd / "poisoned.py").unlink()
        shutil.rmtree(cli.cwd / "__pycache__", ignore_errors=True)
    assert result.code == 0, result.err
    assert load_front(path).reference.test < 0.3
    assert [t.digest for t in plans(path)] == [t.digest for t in plans(run.path)]
    recovered = [{f.name for f in (p / ".work" / "recovered").iterdir()} for p in (run.path, path)]
    assert recovered[0] == recovered[1]
    assert delivered(path) == delivered(run.path)
    ours, theirs = measured(run.path), measured(path)
    assert {n: p.quality.validation for n, p in ours.items()} == {n: p.quality.validation for n, p in theirs.items()}


def test_a_stop_from_outside_keeps_the_front(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = cli.start("search", *cli.own_task, "--trials", "48", "--seed", "0", "--out", path)
    try:
        while process.poll() is None and not (path / "front.json").is_file():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"the front so far is kept in {path}" in err
    front, problems = inspect_front(path)
    assert front is not None
    assert problems == []
    assert front.front.status == "running"
