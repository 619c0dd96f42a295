"""``profile``, ``predict`` and ``list hardware`` as a user runs them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import onnx
import pytest
import yaml
from typer.testing import CliRunner

from autocompress.cli import app
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine
from tests.unit.test_hardware_cost import make_profile
from tests.unit.test_hardware_predict import conv_net, odd, token_net

MEASURING_S = 5.0
"""After so long a profile is being measured: starting takes less, measuring several times more."""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The file of a profile that was not measured here."""
    return make_profile().save(tmp_path / "made.yaml")


@pytest.fixture(scope="session")
def local(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's profile, measured by the command and written to a file too."""
    out = tmp_path_factory.mktemp("profiles") / "here.yaml"
    result = cli("profile", "--out", out)
    assert result.code == 0, result.err
    assert f"stored: {out}" in result.out
    for said in ("conv_fp32", "held out of the fit", "Kendall tau"):
        assert said in result.out
    return out


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


# ------------------------------------------------------------------------------------------------------- predict


def test_predict_shows_costs_and_the_slowest_kernels(made: Path, tmp_path: Path) -> None:
    path = conv_net(tmp_path / "c.onnx")
    code, out, _ = call("predict", path, "--hardware", made, "--top", "2")
    assert code == 0
    for said in ("predicted, not measured", "latency", "size on disk", "peak activations", "slowest of", "the rest"):
        assert said in out
    assert "overhead" in out


def test_predict_json(made: Path, tmp_path: Path) -> None:
    path = conv_net(tmp_path / "c.onnx")
    code, out, _ = call("predict", path, "--hardware", made, "--json")
    found = json.loads(out)
    assert (code, found["costs"]["size_bytes"]["value"]) == (0, path.stat().st_size)
    latency = found["costs"]["latency_ms"]
    assert latency["low"] < latency["value"] < latency["high"]
    assert sum(found["per_kernel"].values()) == pytest.approx(latency["value"])


def test_predict_names_what_it_does_not_know(made: Path, tmp_path: Path) -> None:
    code, out, _ = call("predict", odd(tmp_path / "o.onnx"), "--hardware", made)
    assert code == 0
    assert "never measured, priced by what is nearest: Det" in out


def test_predict_takes_a_delivered_point(run: Run, cli: CommandLine) -> None:
    """From its plan it costs what was written when it was measured, and what its own file is predicted to cost."""
    for point in (run.front.reference, run.front.points[-1]):
        folder = run.path / point.info.artifact
        from_plan = json.loads(cli("predict", folder.parent, "--json").out)["costs"]
        from_file = json.loads(cli("predict", folder, "--json").out)["costs"]
        assert from_file["size_bytes"]["value"] == point.size_bytes
        assert from_plan["size_bytes"]["value"] == pytest.approx(point.size_bytes, rel=0.02, abs=1000)
        assert from_plan["macs"]["value"] == from_file["macs"]["value"] == point.info.macs
        assert from_plan["latency_ms"]["value"] == pytest.approx(from_file["latency_ms"]["value"], rel=0.1)


# ------------------------------------------------------------------------------------------------------- profile


def test_a_profile_is_measured_once(local: Path, cli: CommandLine, tmp_path: Path) -> None:
    before = local.read_text(encoding="utf-8")
    again = cli("profile", "--json")
    assert again.code == 0
    assert json.loads(again.out)["provenance"] == yaml.safe_load(before)["provenance"]
    listed = json.loads(cli("list", "hardware", "--json").out)
    assert "1 thread, batch 1" in listed["local"]
    path = conv_net(tmp_path / "c.onnx")
    here, there = cli("predict", path, "--json"), cli("predict", path, "--hardware", local, "--json")
    assert json.loads(here.out)["costs"] == json.loads(there.out)["costs"]


def test_an_interrupted_profile_leaves_the_old_one(local: Path, cli: CommandLine) -> None:
    cached = sorted((cli.folder / "cache" / "hardware").iterdir())
    before = [path.read_bytes() for path in cached]
    begun = time.monotonic()
    result = cli.interrupt(lambda: time.monotonic() - begun > MEASURING_S, "profile", "--refresh")
    assert result.code == 130
    assert "Traceback" not in result.err
    assert sorted((cli.folder / "cache" / "hardware").iterdir()) == cached
    assert [path.read_bytes() for path in cached] == before


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("predict", "none.onnx"), "no such file or directory: 'none.onnx'"),
        (("predict", "text.onnx"), "is not an ONNX model"),
        (("predict", "."), "plan.json"),
        (("predict", "good.onnx", "--hardware", "nowhere"), "unknown hardware 'nowhere'"),
        (("predict", "good.onnx", "--hardware", "empty.yaml"), "expected a mapping"),
        (("predict", "good.onnx", "--hardware", "list.yaml"), "expected a mapping"),
        (("predict", "good.onnx", "--hardware", "old.yaml"), "version 1"),
        (("predict", "good.onnx", "--hardware", "made.yaml", "--threads", "3"), "threads=1, not 3"),
        (("predict", "good.onnx", "--threads", "4096"), "4096 threads"),
        (("predict", "open.onnx", "--hardware", "made.yaml"), "--dim tokens=128"),
        (("predict", "open.onnx", "--hardware", "made.yaml", "--dim", "tokens"), "write the axis and its size"),
        (("profile", "--threads", "4096"), "4096 threads"),
        (("profile", "--runtime", "tensorrt"), "unknown runtime 'tensorrt'"),
        (("profile", "--out", "nowhere/here.yaml"), "no folder 'nowhere'"),
        (("profile", "--out", "."), "is a folder"),
        (("profile", "--check", "empty.yaml"), "expected a mapping"),
        (("profile", "--check", "made.yaml", "--schema"), "give one of them"),
        (("profile", "--calibrate", "made.yaml"), "--calibrate needs --hardware"),
    ],
)
def test_bad_input_exits_2_and_says_why(
    words: tuple[str, ...], says: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    conv_net(tmp_path / "good.onnx")
    token_net(tmp_path / "open.onnx", tokens="tokens")
    (tmp_path / "text.onnx").write_text("a model?", encoding="utf-8")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n", encoding="utf-8")
    (tmp_path / "old.yaml").write_text("version: 1\nname: old\n", encoding="utf-8")
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert not (tmp_path / "cache" / "hardware").exists(), "refused before anything is measured"


def test_an_operator_the_runtime_lacks(made: Path, tmp_path: Path) -> None:
    path = conv_net(tmp_path / "c.onnx")
    model = onnx.load(path)
    model.graph.node[1].op_type = "Frobnicate"
    onnx.save(model, path)
    code, _, err = call("predict", path, "--hardware", made)
    assert code == 2
    assert "Frobnicate" in err
