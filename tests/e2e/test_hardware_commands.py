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
from tests.fixtures.onnx_files import conv_net, odd, token_net
from tests.fixtures.search import make_profile

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
    assert "Conv as conv_few_fp32" in out


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


def test_check_tells_what_can_be_relied_on(made: Path, tmp_path: Path) -> None:
    code, out, _ = call("profile", "--check", made)
    assert code == 0
    assert "measured on another processor" in out
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        made.read_text(encoding="utf-8").replace("per_mmac_us: 8.0", "per_mmac_us: -8.0"), encoding="utf-8"
    )
    code, out, _ = call("profile", "--check", broken, "--json")
    assert code == 1
    (fault,) = [check for check in json.loads(out) if check["level"] == "error"]
    assert "per_mmac_us" in fault["detail"]
    assert fault["remedy"]


def test_the_schema_is_that_of_the_shipped_profiles() -> None:
    code, out, _ = call("profile", "--schema")
    assert code == 0
    assert {"FittedProfile", "AnalyticProfile"} <= set(json.loads(out)["$defs"])


def test_two_measurements_rescale_a_device(tmp_path: Path) -> None:
    """The device turns out three times as slow as its figures say: its profile then says so too."""
    paths = [conv_net(tmp_path / "c.onnx"), token_net(tmp_path / "t.onnx", tokens=4000)]

    def latency(path: Path, hardware: object) -> float:
        return float(
            json.loads(call("predict", path, "--hardware", hardware, "--json")[1])["costs"]["latency_ms"]["value"]
        )

    before = [latency(path, "raspberry-pi-5") for path in paths]
    rows = [{"model": path.name, "latency_ms": 3 * ms} for path, ms in zip(paths, before, strict=True)]
    (tmp_path / "measured.yaml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    code, out, _ = call(
        "profile", "--calibrate", tmp_path / "measured.yaml", "--hardware", "raspberry-pi-5", "--out", mine
    )
    assert code == 0
    assert f"stored: {mine}" in out
    assert [latency(path, mine) for path in paths] == pytest.approx([3 * ms for ms in before], rel=0.05)


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
        (("profile", "--check", "none.yaml"), "--check: no such file: 'none.yaml'"),
        (("profile", "--check", "made.yaml", "--schema"), "give one of them"),
        (("profile", "--calibrate", "made.yaml"), "--calibrate needs --hardware"),
        (("profile", "--hardware", "made.yaml"), "--hardware says what --calibrate starts from"),
        (("profile", "--calibrate", "list.yaml", "--hardware", "h100", "--out", "o.yaml"), "expected a list of {model"),
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
