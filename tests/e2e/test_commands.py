"""The other commands on a real run: what they print and what they exit with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest

from autocompress.version import __version__
from benchmarks.kill_resume import trials_of
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine, files_of


def test_the_search_shows_its_front_and_where_the_report_is(run: Run) -> None:
    for point in run.front.points:
        assert point.id in run.result.out
    assert f"report: {run.path / 'report.html'}" in run.result.out
    assert "recover" in run.result.err  # progress goes to stderr
    assert "Traceback" not in run.result.err
    assert "Warning" not in run.result.err


def test_version(cli: CommandLine) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"autocompress {__version__}\n")


def test_show(run: Run, cli: CommandLine) -> None:
    result = cli("show", run.path)
    assert result.code == 0
    assert all(point.id in result.out for point in (run.front.reference, *run.front.points))
    shown = json.loads(cli("show", run.path, "--json").out)
    assert shown == json.loads((run.path / "front.json").read_text(encoding="utf-8"))


def test_pick_gives_a_model_that_runs(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    smallest = min(run.front.points, key=lambda point: point.size_bytes)
    limit = smallest.size_bytes * 1.01 / 1e6
    result = cli("pick", run.path, "--max-size-mb", limit, "--copy-to", tmp_path / "mine")
    assert result.code == 0
    path = Path(result.out.splitlines()[-1])
    assert path == tmp_path / "mine" / "model.onnx"
    assert path.stat().st_size <= limit * 1e6
    assert ort.InferenceSession(str(path)).get_inputs()[0].name == "image"
    picked = json.loads(cli("pick", run.path, "--max-size-mb", limit, "--json").out)
    assert picked["size_bytes"] <= limit * 1e6


def test_pick_of_what_nobody_meets_shows_the_nearest(run: Run, cli: CommandLine) -> None:
    result = cli("pick", run.path, "--max-latency-ms", "0.000001")
    assert result.code == 3
    assert re.search(r"no point meets latency .*; the nearest is \w+ with latency", result.err)


def test_verify_measures_everything_again(run: Run, cli: CommandLine) -> None:
    checks = json.loads(cli("verify", run.path, "--json").out)
    # Latencies of microseconds are not the same twice on a busy machine; all else must be.
    assert [check for check in checks if not check["ok"] and not check["name"].endswith(": latency")] == []
    names = {check["name"] for check in checks}
    for point in (run.front.reference, *run.front.baselines, *run.front.points):
        wanted = ("size", "validation", "test", "kernels", "checkpoint", "latency")
        assert {f"{point.id}: {what}" for what in wanted} <= names


def test_verify_finds_a_model_that_was_swapped(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns(".work")))
    point = run.front.points[-1]
    shutil.copy(copy / "models" / "original" / "model.onnx", copy / "models" / point.id / "model.onnx")
    result = cli("verify", copy / "models" / point.id / "model.onnx")
    assert result.code == 1
    assert re.search(rf"FAILED +{point.id}: size", result.out)


def test_report_is_one_page_that_needs_nothing_else(run: Run, cli: CommandLine) -> None:
    result = cli("report", run.path)
    assert (result.code, result.out.strip()) == (0, str(run.path / "report.html"))
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", page)
    assert all(point.id in page for point in run.front.points)


@pytest.mark.parametrize("kind", ["tasks", "models", "methods", "hardware", "spaces"])
def test_list(cli: CommandLine, kind: str) -> None:
    result = cli("list", kind, "--json")
    assert result.code == 0
    assert json.loads(result.out)


def test_a_finished_run_resumed_does_nothing(run: Run, cli: CommandLine) -> None:
    before = {name: (run.path / name).stat().st_mtime_ns for name in files_of(run.path)}
    trials = trials_of(run.path)
    result = cli("search", *run.options, "--out", run.path, "--resume", "--json")
    assert result.code == 0
    assert json.loads(result.out) == json.loads((run.path / "front.json").read_text(encoding="utf-8"))
    after = {name: (run.path / name).stat().st_mtime_ns for name in files_of(run.path)}
    assert {name for name in before if before[name] != after.get(name)} <= {"config.yaml"}
    assert before.keys() == after.keys()
    assert trials_of(run.path) == trials


def test_a_used_directory_is_not_written_to(run: Run, cli: CommandLine) -> None:
    before = {name: (run.path / name).stat().st_mtime_ns for name in files_of(run.path)}
    result = cli("search", *run.options, "--out", run.path)
    assert result.code == 2
    assert "--resume" in result.err
    assert {name: (run.path / name).stat().st_mtime_ns for name in files_of(run.path)} == before


def test_another_search_does_not_go_on_with_a_run(run: Run, cli: CommandLine) -> None:
    result = cli("search", *cli.own_task, "--trials", "48", "--seed", "1", "--out", run.path, "--resume")
    assert result.code == 2
    assert "--seed: 1 differs from 0" in result.err


def test_a_dry_run_prices_and_writes_nothing(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    result = cli("search", *cli.own_task, "--dry-run", "--json", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["channel_groups"] == {"features.0": 16, "features.3": 32, "features.6": 32}
    assert facts["macs"] == run.front.reference.info.macs
    assert facts["predicted"]["uniform int8"]["size_bytes"] < facts["predicted"]["dense fp32"]["size_bytes"]
    assert not (tmp_path / "run").exists()
