"""A search for a device that is not here: models are made and run, and nothing of them is called measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from autocompress.front import load_front
from autocompress.units import format_ms
from autocompress.verification import predictions
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine
from tests.fixtures.search import make_device

LIMIT_MS = 0.1
"""Half the channels in int8 keep it with the whole band, three quarters only without."""


@pytest.fixture(scope="module")
def elsewhere(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("elsewhere")
    device = make_device().save(folder / "far-away.yaml")
    options = (
        *cli.own_task, "--hardware", str(device), "--trials", "16", "--seed", "0",
        "--objectives", "error,latency_ms,energy_mj", "--max-latency-ms", str(LIMIT_MS),
    )  # fmt: skip
    result = cli("search", *options, "--out", folder / "run")
    assert result.code == 0, result.err
    return Run(folder / "run", options, result)


def test_the_front_is_predicted_and_says_so(elsewhere: Run) -> None:
    front = elsewhere.front
    assert not front.front.verified
    assert front.front.status == "complete"
    assert len(front.points) >= 1
    for point in (front.reference, *front.baselines, *front.points):
        latency = point.info.latency_ms
        assert (latency.measured, latency.measured_p95) == (None, None)
        assert latency.predicted is not None
        assert latency.error_band == (pytest.approx(latency.predicted / 1.4), pytest.approx(latency.predicted * 1.4))
        assert point.info.energy_mj is not None
        assert point.info.energy_mj > 0
        assert point.info.runtime_agreement is not None
        assert point.info.runtime_agreement > 0.98
        assert point.onnx_path.stat().st_size == point.size_bytes
    assert not (elsewhere.path / ".work" / "anchors.json").exists()


def test_budgets_hold_on_the_upper_end_of_the_band(elsewhere: Run) -> None:
    front = elsewhere.front
    assert front.front.constraints == {
        "latency_ms": LIMIT_MS,
        "peak_memory_bytes": 512_000,
        "size_bytes": 2_000_000,
    }
    for point in front.points:
        band = point.info.latency_ms.error_band
        assert band is not None
        assert band[1] <= LIMIT_MS
    # Only a prediction that keeps the budget with its band was worth an evaluation.
    trials = pd.read_csv(elsewhere.path / "trials.csv")
    assert trials.loc[trials["state"] == "COMPLETE", "latency_ms"].max() <= LIMIT_MS / 1.4 + 1e-9
    # Plans over a budget are moved to others that keep it, or end without evaluation.
    assert (trials["state"] == "PRUNED").any() or trials["repaired"].notna().any()


def test_people_are_told_that_it_is_predicted(elsewhere: Run) -> None:
    point = elsewhere.front.points[0]
    assert point.latency_ms is not None
    assert "latencies are predicted: the target is not here" in elsewhere.result.out
    assert "as predicted" in elsewhere.result.out
    page = (elsewhere.path / "report.html").read_text()
    assert "predicted: the target was not present" in page
    assert "measured on the target" not in page
    assert "Nothing was measured on this target" in page
    low, high = point.info.latency_ms.error_band or (0.0, 0.0)
    assert f"{format_ms(point.latency_ms)} ({low:.3g}-{high:.3g} predicted)" in page


def test_verify_checks_what_can_be_checked(elsewhere: Run, cli: CommandLine) -> None:
    result = cli("verify", elsewhere.path)
    assert result.code == 0, result.out
    assert "not measured" in result.out
    assert "as predicted, of 0.1 ms" in result.out


def test_a_profile_that_says_otherwise_is_found_out(elsewhere: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(elsewhere.path, run)
    front = load_front(run)
    assert all(check.ok for check in predictions(front, list(front.points)))
    make_device(peak_gmacs={"fp32": 2.0, "int8": 3.0}).save(run / "profile.yaml")
    checks = {check.name: check.ok for check in predictions(front, list(front.points))}
    assert not any(ok for name, ok in checks.items() if name.endswith("latency"))


def test_a_shipped_device_is_asked_for_by_name(cli: CommandLine, tmp_path: Path) -> None:
    options = [*cli.own_task, "--hardware", "raspberry-pi-5", "--threads", "4"]
    result = cli("search", *options, "--dry-run", "--json", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["measured_here"] is False
    assert facts["predicted"]["uniform int8"]["size_bytes"] < facts["predicted"]["dense fp32"]["size_bytes"]
