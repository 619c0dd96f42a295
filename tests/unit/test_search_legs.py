"""How much more a run may take: what is left after an interruption, and what a finished run is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from autocompress.config import RunConfig, load_config
from autocompress.errors import UsageError
from autocompress.rundir import open_run_directory
from autocompress.search.files import Clock
from autocompress.search.legs import Leg, mark_done, next_leg, read_leg
from tests.fixtures.runs import build_run, make_front


def begun(run: Path, *, status: Literal["running", "complete"], spent: float, **flags: object) -> Path:
    """A run that a search with these flags left in this state."""
    config = load_config(flags={"out": run, **flags})
    leg = next_leg(run, config)
    assert leg is not None
    open_run_directory(leg.configured(config))
    given = (run / "config.yaml").read_text()
    build_run(run, make_front(3, status=status), extras=False)
    (run / "config.yaml").write_text(given)
    leg.write(run)
    (run / ".work" / "models").mkdir(parents=True, exist_ok=True)
    (run / ".work" / "spent.json").write_text(json.dumps(spent))
    if status == "complete":
        mark_done(run)
    return run


def resumed(run: Path, **flags: object) -> RunConfig:
    return load_config(flags={"out": run, "resume": True, **flags})


def test_a_run_begins_with_its_whole_budget(tmp_path: Path) -> None:
    config = load_config(flags={"out": tmp_path / "new", "resume": True, "time_budget": "1m"})
    assert next_leg(tmp_path / "new", config) == Leg(1, 0.0, 60.0)
    assert next_leg(None, load_config(flags={"trials": 8})) == Leg(1, 0.0, None)


@pytest.mark.parametrize(
    ("flags", "budget"),
    [({}, 60.0), ({"time_budget": "1m"}, 60.0), ({"time_budget": "2m"}, 120.0), ({"trials": 9}, 60)],
)
def test_an_interrupted_run_uses_what_is_left(tmp_path: Path, flags: dict[str, object], budget: float) -> None:
    run = begun(tmp_path / "run", status="running", spent=40.0, time_budget="1m")
    leg = next_leg(run, resumed(run, **flags))
    assert leg == Leg(1, 0.0, budget)
    clock = Clock(run / ".work" / "spent.json", leg.budget_s, leg.began_s, leg.number)
    assert clock.left == pytest.approx(budget - 40.0, abs=0.5)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = begun(tmp_path / "timed", status="complete", spent=61.0, time_budget="1m")
    assert next_leg(run, resumed(run)) is None
    assert next_leg(run, load_config(run / "config.yaml", {"out": run, "resume": True})) is None
    counted = begun(tmp_path / "counted", status="complete", spent=61.0, trials=40)
    assert next_leg(counted, resumed(counted, trials=40)) is None


def test_a_finished_run_gets_as_much_more_as_is_said(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", status="complete", spent=61.0, time_budget="1m")
    config = resumed(run, time_budget="1m")
    leg = next_leg(run, config)
    assert leg == Leg(2, 61.0, 60.0)
    clock = Clock(run / ".work" / "spent.json", leg.budget_s, leg.began_s, leg.number)
    assert (clock.left, clock.leg) == (pytest.approx(60.0, abs=0.5), 2)
    # The configuration repeats the whole of it.
    assert leg.configured(config).time_budget == 121.0


def test_an_interrupted_leg_goes_on_however_it_is_resumed(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", status="complete", spent=61.0, time_budget="1m")
    config = resumed(run, time_budget="30s")
    leg = next_leg(run, config)
    assert leg is not None
    open_run_directory(leg.configured(config))
    leg.write(run)
    # Stopped before it published anything: the front still says that the first leg was complete.
    (run / ".work" / "spent.json").write_text("70.0")
    for flags in ({}, {"time_budget": "30s"}):
        again = next_leg(run, resumed(run, **flags))
        assert again == Leg(2, 61.0, 30.0)
        assert again.configured(resumed(run, **flags)).time_budget == 91.0
    mark_done(run)
    assert read_leg(run) == Leg(2, 61.0, 30.0, done=True)
    assert next_leg(run, resumed(run)) is None


def test_more_time_lifts_the_number_of_trials_and_more_trials_the_time(tmp_path: Path) -> None:
    run = begun(tmp_path / "a", status="complete", spent=20.0, trials=40)
    config = resumed(run, time_budget="1m")
    leg = next_leg(run, config)
    assert leg == Leg(2, 20.0, 60.0)
    assert (leg.configured(config).trials, leg.configured(config).time_budget) == (None, 80.0)
    both = resumed(run, time_budget="1m", trials=50)
    assert leg.configured(both).trials == 50
    more = resumed(run, trials=60)
    leg = next_leg(run, more)
    assert leg == Leg(2, 20.0, None)
    assert (leg.configured(more).trials, leg.configured(more).time_budget) == (60, None)
    assert next_leg(run, resumed(run, trials=30)) is None


def test_python_and_files_mean_the_same(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", status="complete", spent=61.0, time_budget="1m")
    assert next_leg(run, RunConfig.create(out=run, resume=True, time_budget="10s")) == Leg(2, 61.0, 10.0)
    assert next_leg(run, RunConfig.create(out=run, resume=True)) is None


def test_nothing_goes_on_from_a_run_whose_work_is_gone(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", status="complete", spent=61.0, time_budget="1m")
    (run / ".work" / "models").rmdir()
    assert next_leg(run, resumed(run)) is None
    with pytest.raises(UsageError, match=r"--out: the run .* finished and its \.work folder was deleted"):
        next_leg(run, resumed(run, time_budget="1m"))
