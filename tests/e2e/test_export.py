"""An export on its own: the real command line on digits, what it writes, and what it leaves where it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import autocompress
from autocompress.tasks.base import DataRequest
from autocompress.tasks.builtin import digits
from tests.e2e.tools import CommandLine, Result, files_of
from tests.fixtures.exports import Scorer, tokens

MINE = "tests.fixtures.exports"


@dataclass(frozen=True)
class Export:
    """An int8 export of the digits model, and what was printed."""

    path: Path
    result: Result

    @property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "metrics.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def exported(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Export:
    path = tmp_path_factory.mktemp("exports") / "resnet8"
    result = cli("export", "resnet8", "--compute", "int8", "--archive", "--out", path)
    assert result.code == 0, result.err
    return Export(path, result)


def test_int8_keeps_the_accuracy_and_every_layer_runs_in_int8(exported: Export) -> None:
    metrics = exported.metrics
    assert metrics["quality"]["test"]["drop"] <= 0.01
    assert metrics["quality"]["validation"]["drop"] <= 0.01
    assert metrics["layers"] == {"int8": 10}
    assert (metrics["kernels"]["fp32"], metrics["float_layers"]) == (0, {})
    assert metrics["simulation"]["top1_agreement"] >= 0.99
    assert metrics["size_bytes"]["original"] / metrics["size_bytes"]["export"] > 3
    assert metrics["size_bytes"]["archive"] < metrics["size_bytes"]["export"]
    assert files_of(exported.path) == {
        *("model.onnx", "original.onnx", "model.acz", "model.safetensors", "plan.json", "metrics.json")
    }
    for shown in ("test accuracy", "smaller", "10 int8", f"exported: {exported.path / 'model.onnx'}"):
        assert shown in exported.result.out


def test_a_plain_session_does_what_the_metrics_say(exported: Export, tmp_path: Path) -> None:
    session = ort.InferenceSession(str(exported.path / "model.onnx"))
    original = ort.InferenceSession(str(exported.path / "original.onnx"))
    names = [([i.name for i in s.get_inputs()], [o.name for o in s.get_outputs()]) for s in (session, original)]
    assert names[0] == names[1]
    assert names[0][0] == ["x"]  # the argument of the module's forward
    test = digits(DataRequest(None, tmp_path)).splits["test"]
    images, answers = test.inputs.numpy(), test.targets.numpy()
    for batch in (1, 7):
        parts = [session.run(None, {"x": images[i : i + batch]})[0] for i in range(0, len(images), batch)]
        accuracy = float((np.concatenate(parts).argmax(1) == answers).mean())
        assert accuracy == pytest.approx(exported.metrics["quality"]["test"]["export"], abs=1e-9)


def test_verify_measures_the_export_again(exported: Export, cli: CommandLine) -> None:
    checks = json.loads(cli("verify", exported.path, "--json").out)
    # Latencies of microseconds are not the same twice on a busy machine; all else must be.
    assert [check for check in checks if not check["ok"] and check["name"] != "latency"] == []
    names = [check["name"] for check in checks]
    assert names == ["files", "size", "archive", "metadata", "kernels", "checkpoint", "validation", "test", "latency"]


def test_verify_finds_one_changed_byte(exported: Export, cli: CommandLine, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported.path, tmp_path / "copy"))
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(bytes(content))
    result = cli("verify", copy / "model.onnx", "--quiet")
    assert result.code == 1
    assert "FAILED  files" in result.out
    assert "model.onnx" in result.out


def test_verify_of_a_file_from_elsewhere(exported: Export, tmp_path: Path) -> None:
    theirs, broken = tmp_path / "theirs.onnx", tmp_path / "broken.onnx"
    shutil.copy(exported.path / "model.onnx", theirs)
    checks = {check.name: check for check in autocompress.verify(theirs)}
    assert all(check.ok for check in checks.values())
    assert "10 layers with weights in integers, 0 in float" in checks["kernels"].detail
    assert f"test {exported.metrics['quality']['test']['export']:.4g}" in checks["metadata"].detail
    broken.write_bytes(theirs.read_bytes()[:5000])
    assert [check.ok for check in autocompress.verify(broken)] == [False]


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": (("resnet9",), ("'resnet9'", "nearest: 'resnet8'", "module:function")),
    "compute": (("resnet8", "--compute", "int7"), ("--compute", "'int7'", "nearest: 'int8'")),
    "bits": (("resnet8", "--weight-bits", "9"), ("--weight-bits", "9 bits under int8", "8")),
    "rule": (("resnet8", "--layer", "fc"), ("--layer 'fc'", "PATTERN=COMPUTE")),
    "data": ((f"{MINE}:without_data",), ("no calibration data", "'calibration'")),
    "control flow": ((f"{MINE}:choosing",), ("cannot read Choosing", "y.sum() > 0", "control flow")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_leaves_nothing_behind(cli: CommandLine, name: str, tmp_path: Path) -> None:
    words, says = CASES[name]
    result = cli("export", *words, "--out", tmp_path / "new" / "out")
    assert result.code == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in says:
        assert text in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_left_alone(exported: Export, cli: CommandLine) -> None:
    before = {name: (exported.path / name).stat().st_mtime_ns for name in files_of(exported.path)}
    result = cli("export", "resnet8", "--out", exported.path)
    assert result.code == 2
    assert "not empty" in result.err
    assert {name: (exported.path / name).stat().st_mtime_ns for name in files_of(exported.path)} == before


def test_an_interrupted_export_leaves_nothing_behind(cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli.interrupt(lambda: any(tmp_path.glob(".out.*")), "export", f"{MINE}:scorer", "--out", out)
    assert (result.code, list(tmp_path.iterdir())) == (130, [])


def test_a_module_from_python(tmp_path: Path) -> None:
    model = Scorer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = autocompress.export(model, calibration=tokens(), out=tmp_path / "scorer")
    assert made.metrics.layers == {"int8_dynamic": 2}  # what they read comes in float
    assert made.metrics.quality == {}  # there are no labels
    assert made.metrics.outputs.data == "calibration"
    signal = made.metrics.outputs.signal_to_noise_db
    assert signal is not None
    assert signal > 25
    inputs = tokens(5)
    feed = {name: value.numpy() for name, value in inputs.items()}
    assert {i.name for i in made.session().get_inputs()} == {"ids", "weight"}
    assert [o.name for o in made.session().get_outputs()] == ["scores"]
    given = made.session().run(None, feed)[0]
    torch.testing.assert_close(torch.from_numpy(given), model(**inputs)["scores"].detach(), atol=0.05, rtol=0.1)
    with torch.no_grad():
        rebuilt = made.load()(inputs["ids"], inputs["weight"])
    torch.testing.assert_close(rebuilt, torch.from_numpy(given), atol=0.02, rtol=0.02)
    assert type(model) is Scorer
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = autocompress.load_export(tmp_path / "scorer")
    assert again.metrics == made.metrics
    assert all(check.ok for check in autocompress.verify(made.path) if check.name != "latency")
    with pytest.raises(autocompress.errors.UsageError, match="load_export"):
        autocompress.load_point(made.path)
