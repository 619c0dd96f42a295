"""The same trials and seed give the same plans, and Ctrl-C keeps what there is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from autocompress.front import load_front
from benchmarks.kill_resume import Trial, inspect_front, trials_of
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine, Result

MEASURED = ["number", "state", "divergence", "error", "latency_ms", "size_bytes", "same_as"]


def plans(run: Path) -> list[Trial]:
    (study,) = (found for name, found in trials_of(run).items() if name.startswith("plans-"))
    return study


@pytest.fixture(scope="module")
def interrupted(run: Run, cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Result]]:
    """The search of ``run`` again with its seed and with another, stopped by Ctrl-C once its trials are over."""
    folder = tmp_path_factory.mktemp("repeat")

    def again(seed: int) -> tuple[Path, Result]:
        path = folder / str(seed)
        options = (*cli.own_task, "--trials", "48", "--seed", seed, "--out", path)
        return path, cli.interrupt(lambda: (path / "trials.csv").is_file(), "search", *options)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((0, 1), pool.map(again, (0, 1)), strict=True))


def test_the_same_seed_repeats_the_plans(run: Run, interrupted: dict[int, tuple[Path, Result]]) -> None:
    path, _ = interrupted[0]
    ours, theirs = ([(t.number, t.state, t.digest, t.same_as) for t in plans(folder)] for folder in (run.path, path))
    assert len(ours) == 48
    assert ours == theirs
    tables = [pd.read_csv(folder / "trials.csv") for folder in (path, run.path)]
    columns = [name for name in tables[0].columns if name != "seconds"]
    assert set(MEASURED) <= set(columns)
    pd.testing.assert_frame_equal(tables[0][columns], tables[1][columns], rtol=2e-3)


def test_another_seed_gives_other_plans(run: Run, interrupted: dict[int, tuple[Path, Result]]) -> None:
    path, _ = interrupted[1]
    ours, theirs = ([trial.digest for trial in plans(folder)] for folder in (run.path, path))
    assert len(ours) == len(theirs) == 48
    # It begins with the same seeds: uniform plans, whole and halved.
    assert ours[:10] == theirs[:10]
    assert ours != theirs


@pytest.mark.parametrize("seed", [0, 1])
def test_ctrl_c_keeps_the_front(interrupted: dict[int, tuple[Path, Result]], seed: int) -> None:
    path, result = interrupted[seed]
    assert result.code == 130, result.err
    assert f"the front so far is kept in {path}" in result.err
    assert f"autocompress search --out {path} --resume" in result.err
    assert "Traceback" not in result.err
    front, problems = inspect_front(path)
    assert front is not None
    assert problems == []
    assert front.front.status == "running"


def test_what_was_interrupted_can_be_shown(interrupted: dict[int, tuple[Path, Result]], cli: CommandLine) -> None:
    path, _ = interrupted[0]
    result = cli("show", path)
    assert result.code == 0
    assert "still running" in result.out


def test_ctrl_c_before_the_first_model_leaves_nothing_that_looks_finished(
    run: Run, cli: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    result = cli.interrupt(
        lambda: (path / "log.jsonl").is_file(), "search", *cli.own_task, "--trials", "48", "--out", path
    )
    assert result.code == 130, result.err
    assert "Traceback" not in result.err
    if (path / "front.json").is_file():
        assert load_front(path).front.status == "running"
    else:
        assert "interrupted before the first model" in result.err


def test_an_impossible_latency_ends_with_the_nearest(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "run"
    result = cli("search", *cli.own_task, "--trials", "48", "--max-latency-ms", "0.0001", "--out", path, "--json")
    assert result.code == 3
    error = json.loads(result.out)
    assert "latency_ms <= 0.0001" in error["error"]
    assert "nearest" in error["error"]
    assert "nearest" in result.err
    assert "Traceback" not in result.err
    front, problems = inspect_front(path)
    assert problems == []
    assert front is None or not front.points
