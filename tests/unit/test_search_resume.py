"""What the API does around a search: a run that ended is left alone, a start that failed leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from autocompress import api
from autocompress.config import RunConfig, load_config
from autocompress.errors import InfeasibleError, UsageError
from autocompress.hardware.profile import HardwareProfile
from autocompress.search import engine, prepared
from autocompress.search.legs import Leg, mark_done, read_leg
from tests.fixtures.runs import build_run, make_front
from tests.fixtures.search import make_profile


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded: what is prepared is never looked at."""
    profile: HardwareProfile = make_profile()
    identity = SimpleNamespace(write=lambda run: None)
    stand_in = SimpleNamespace(space=None, task=None, teacher=None, profile=profile, identity=identity)
    monkeypatch.setattr(prepared, "prepare", lambda config, progress: stand_in)


class Engine:
    """Stands in for the search."""

    raises: Exception | None = None
    calls = 0

    def __init__(self, *arguments: object) -> None:
        (self.run,) = (value for value in arguments if isinstance(value, Path))

    def execute(self) -> None:
        type(self).calls += 1
        (self.run / ".work").mkdir(exist_ok=True)
        (self.run / ".work" / "spent.json").write_text("1.0")
        if self.raises:
            raise self.raises
        given = (self.run / "config.yaml").read_text()
        build_run(self.run)
        (self.run / "config.yaml").write_text(given)
        (self.run / ".work" / "models").mkdir(exist_ok=True)
        mark_done(self.run)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    class Fresh(Engine):
        pass

    monkeypatch.setattr(engine, "Engine", Fresh)
    return Fresh


def config(out: Path, **more: object) -> RunConfig:
    return RunConfig.create(task="digits", trials=3, out=out, **more)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, stand_in: type[Engine]) -> None:
    api.search(config(tmp_path / "run"))
    front = api.search(config(tmp_path / "run", resume=True))
    assert (stand_in.calls, len(front)) == (1, 12)


def test_more_time_goes_on_with_a_finished_run(tmp_path: Path, stand_in: type[Engine]) -> None:
    api.search(RunConfig.create(task="digits", time_budget="20s", out=tmp_path / "run"))
    api.search(RunConfig.create(task="digits", out=tmp_path / "run", resume=True))
    assert stand_in.calls == 1
    api.search(RunConfig.create(task="digits", time_budget="20s", out=tmp_path / "run", resume=True))
    assert stand_in.calls == 2
    # One second was spent before the second leg began.
    assert read_leg(tmp_path / "run") == Leg(2, 1.0, 20.0, done=True)
    assert load_config(tmp_path / "run" / "config.yaml").time_budget == 21.0


def test_nothing_is_loaded_for_a_run_that_is_finished(
    tmp_path: Path, stand_in: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.search(config(tmp_path / "run"))
    monkeypatch.setattr(prepared, "prepare", None)
    assert len(api.search(config(tmp_path / "run", resume=True))) == 12


def test_an_interrupted_leg_stays_open(tmp_path: Path, stand_in: type[Engine]) -> None:
    api.search(RunConfig.create(task="digits", time_budget="20s", out=tmp_path / "run"))
    stand_in.raises = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        api.search(RunConfig.create(task="digits", time_budget="9s", out=tmp_path / "run", resume=True))
    stand_in.raises = None
    api.search(RunConfig.create(task="digits", out=tmp_path / "run", resume=True))
    assert stand_in.calls == 3
    assert read_leg(tmp_path / "run") == Leg(2, 1.0, 9.0, done=True)


def test_a_run_that_ended_without_a_model_says_so_again(tmp_path: Path, stand_in: type[Engine]) -> None:
    run = tmp_path / "run"
    api.search(config(run))
    build_run(run, make_front(0))
    mark_done(run)
    with pytest.raises(InfeasibleError, match=r"ended without a model that keeps its budgets \(drop <= 8\)") as error:
        api.search(config(run, resume=True))
    assert error.value.exit_code == 3
    assert stand_in.calls == 1


def test_what_is_found_wrong_late_leaves_no_run(tmp_path: Path, stand_in: type[Engine]) -> None:
    stand_in.raises = UsageError("--freeze: pattern 'x' matches no layer")
    with pytest.raises(UsageError, match="pattern 'x'"):
        api.search(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_stood_there_stays_whatever_is_wrong(tmp_path: Path, stand_in: type[Engine]) -> None:
    run = tmp_path / "run"
    stand_in.raises = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        api.search(config(run))
    assert (run / "config.yaml").is_file()
    stand_in.raises = UsageError("the data are gone")
    with pytest.raises(UsageError):
        api.search(config(run, resume=True))
    assert (run / "config.yaml").is_file()


def test_a_bug_leaves_the_run_for_whoever_looks(tmp_path: Path, stand_in: type[Engine]) -> None:
    stand_in.raises = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        api.search(config(tmp_path / "run"))
    assert (tmp_path / "run" / "log.jsonl").is_file()


def test_a_finished_run_has_its_manifest_and_report(tmp_path: Path, stand_in: type[Engine]) -> None:
    api.search(config(tmp_path / "run"))
    assert (tmp_path / "run" / "manifest.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert HardwareProfile.load(tmp_path / "run" / "profile.yaml") == make_profile()
