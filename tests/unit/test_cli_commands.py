"""The command line on run directories: what it prints, where, and what it exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from autocompress import api
from autocompress.cli import app
from autocompress.config import RunConfig
from autocompress.errors import InfeasibleError, UsageError
from autocompress.rundir import open_run_directory
from autocompress.version import __version__
from tests.fixtures.runs import build_run, make_front

DESIGN_FLAGS = [
    *("--task", "--model", "--weights", "--data", "--hardware", "--runtime", "--threads", "--batch", "--device"),
    *("--space", "--freeze", "--teacher", "--max-latency-ms", "--max-size-mb", "--max-memory-mb", "--max-energy-mj"),
    *("--max-macs", "--max-drop", "--objectives", "--time-budget", "--trials", "--seed", "--executor", "--storage"),
    *("--out", "--resume", "--reuse", "--dry-run", "--json", "--quiet"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"autocompress {__version__}")


def test_help_has_every_flag_of_the_contract() -> None:
    text = call("search", "--help").stdout
    assert [flag for flag in DESIGN_FLAGS if flag not in text] == []


@pytest.mark.parametrize(
    "words", ["['--version']", "['search', '--help']", "['list', 'models']", "['show', RUN]", "['report', RUN]"]
)
def test_light_commands_load_no_torch(run: Path, words: str) -> None:
    code = (
        "import sys\nfrom autocompress.cli import app\n"
        f"RUN = {str(run)!r}\n"
        f"try:\n    app({words})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'onnxruntime', 'optuna'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_importing_the_package_loads_no_torch_and_its_names_are_callable() -> None:
    code = (
        "import sys, autocompress\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
        "import autocompress.report.html\n"
        "assert callable(autocompress.report) and callable(autocompress.search)\n"
        "assert autocompress.load_front.__name__ == 'load_front'\n"
        "assert 'search' in dir(autocompress)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_show(run: Path) -> None:
    result = call("show", run)
    assert result.exit_code == 0
    assert "within 1 point of the original" in result.stdout
    assert all(f"p{index:02d}" in result.stdout for index in range(12))


def test_show_json_is_the_front(run: Path) -> None:
    assert json.loads(call("show", run, "--json").stdout)["schema"] == 1


def test_an_error_is_one_message_and_no_traceback(tmp_path: Path) -> None:
    result = call("show", tmp_path / "absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no such run directory")
    assert "Traceback" not in result.stderr


def test_pick(run: Path) -> None:
    result = call("pick", run, "--max-latency-ms", "0.1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(run / "models" / "p08" / "model.onnx")


def test_pick_json_and_copy(run: Path, tmp_path: Path) -> None:
    picked = json.loads(call("pick", run, "--max-drop", "1", "--copy-to", tmp_path / "m", "--json").stdout)
    assert picked["path"] == str(tmp_path / "m")
    assert (tmp_path / "m" / "model.onnx").is_file()
    again = call("pick", run, "--copy-to", tmp_path / "m")
    assert again.exit_code == 2
    assert "--copy-to" in again.stderr


def test_pick_the_knee(run: Path) -> None:
    assert call("pick", run, "--prefer", "knee").exit_code == 0
    assert call("pick", run, "--prefer", "knee", "--max-drop", "1").exit_code == 2
    result = call("pick", run, "--prefer", "speed")
    assert result.exit_code == 2
    assert "known: balance, knee, latency, quality, size" in result.stderr


def test_pick_what_nobody_can_meet(run: Path) -> None:
    result = call("pick", run, "--max-size-mb", "0.001", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["nearest"]["id"] == "p11"
    assert "nearest: p11" in result.stderr


def test_report(run: Path) -> None:
    assert call("report", run).stdout.strip() == str(run / "report.html")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tasks", "digits"),
        ("models", "resnet20"),
        ("methods", "pruning"),
        ("samplers", "nsga2"),
        ("samplers", "auto"),
        ("hardware", "local"),
        ("spaces", "default"),
    ],
)
def test_list(kind: str, expected: str) -> None:
    assert expected in call("list", kind).stdout
    assert expected in json.loads(call("list", kind, "--json").stdout)


def test_list_of_something_else() -> None:
    result = call("list", "task")
    assert result.exit_code == 2
    assert "nearest: 'tasks'" in result.stderr


# ---------------------------------------------------------------------------------------------- search, engine aside


def fake_search(config: RunConfig, *, progress) -> None:
    directory, _ = open_run_directory(config)
    progress.stage("search", 10)
    progress.advance(3)
    progress.note(seconds_left=30.0, front=make_front(2))
    build_run(directory)


def test_search_shows_the_front_and_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "search", fake_search)
    result = call("search", "--out", tmp_path / "run", "--trials", "3")
    assert result.exit_code == 0
    assert "p06" in result.stdout
    assert f"report: {tmp_path / 'run' / 'report.html'}" in result.stdout
    assert "search ..." in result.stderr


def test_search_as_json_and_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "search", fake_search)
    assert json.loads(call("search", "--out", tmp_path / "a", "--json").stdout)["schema"] == 1
    quiet = call("search", "--out", tmp_path / "b", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (f"{tmp_path / 'b'}\n", "")


def test_search_that_is_infeasible_exits_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def infeasible(config: RunConfig, *, progress) -> None:
        raise InfeasibleError("no point meets latency 0.01 ms", make_front(1).points[0])

    monkeypatch.setattr(api, "search", infeasible)
    result = call("search", "--out", tmp_path / "run", "--max-latency-ms", "0.01")
    assert result.exit_code == 3
    assert "nearest: p00" in result.stderr


def test_interrupted_search_exits_130_and_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(config: RunConfig, *, progress) -> None:
        fake_search(config, progress=progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "search", interrupted)
    result = call("search", "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert f"the front so far is kept in {tmp_path / 'run'}" in result.stderr
    assert "--resume" in result.stderr


def test_a_stop_from_outside_is_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(config: RunConfig, *, progress) -> None:
        fake_search(config, progress=progress)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(api, "search", stopped)
    result = call("search", "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert f"the front so far is kept in {tmp_path / 'run'}" in result.stderr
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_start_that_fails_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(config: RunConfig, *, progress) -> None:
        open_run_directory(config)
        raise UsageError("no data")

    monkeypatch.setattr(api, "search", fails)
    monkeypatch.chdir(tmp_path)
    result = call("search")
    assert result.exit_code == 2
    assert list((tmp_path / "results").iterdir()) == []


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(config: RunConfig, *, progress) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "search", broken)
    assert isinstance(call("search", "--out", tmp_path / "run").exception, ZeroDivisionError)


def test_verify_exits_1_where_a_check_fails(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    checks = [SimpleNamespace(name="p00", ok=True, detail="same"), SimpleNamespace(name="p01", ok=False, detail="off")]
    monkeypatch.setattr(api, "verify", lambda path, *, progress: checks)
    result = call("verify", run)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    monkeypatch.setattr(api, "verify", lambda path, *, progress: checks[:1])
    assert call("verify", run).exit_code == 0
    assert call("verify", run / "absent").exit_code == 2
