"""Verification finds whatever was changed after delivery, and nothing where nothing was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from autocompress import verification
from autocompress.errors import UsageError
from autocompress.front import load_front
from autocompress.plan import INT8_WEIGHT, LayerPlan, Target
from autocompress.progress import SilentProgress
from autocompress.runtime.timing import LatencyStats
from autocompress.search.deliver import ORIGINAL, UNIFORM_INT8, Delivery
from autocompress.search.publishing import publish
from autocompress.search.records import write_manifest
from autocompress.tasks.base import Task
from autocompress.tasks.splits import SPLITS, TensorSource, TensorSplit
from autocompress.verification import LATENCY_TOLERANCE, Check, verify_path
from tests.graphs import compress, evaluate, resnet

GRAPH, WEIGHTS = resnet(widths=(8, 16), blocks=1, size=12)


def make_task() -> Task:
    """Random images; their classes are what the network says, save for some."""
    sources = {}
    for index, name in enumerate(SPLITS):
        images = torch.rand((120, 1, 12, 12), generator=torch.Generator().manual_seed(index))
        classes = evaluate(GRAPH, WEIGHTS, images)["logits"].argmax(1)
        classes[:20] = (classes[:20] + 1) % 10
        sources[name] = TensorSource(TensorSplit(images, classes), 64)
    return Task(name="random", model_name="net", model=torch.nn.Identity(), sources=sources)


def half_a_millisecond(models: Mapping[str, Path], **_: object) -> dict[str, LatencyStats]:
    return dict.fromkeys(models, LatencyStats(0.5, 0.5, 0.5, 0.5, 1, 1))


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory, task: Task) -> Path:
    """A run of three models, as the search leaves it."""
    run = tmp_path_factory.mktemp("verification") / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: module:function\ntrials: 1\n", encoding="utf-8")
    delivery = Delivery(
        run,
        task,
        Target(hardware="local", runtime="onnxruntime", version="1"),
        ("error", "latency_ms", "size_bytes"),
        {"latency_ms": 1000.0},
        seed=0,
    )
    names = [layer.name for layer in GRAPH.compressible]
    int8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
    for name, layers in (
        (ORIGINAL, {}),
        (UNIFORM_INT8, dict.fromkeys(names, int8)),
        ("p1", dict.fromkeys(names, LayerPlan(storage=INT8_WEIGHT))),
    ):
        assert delivery.add(name, partial(compress, GRAPH, WEIGHTS, layers), None)
    delivery.measure([UNIFORM_INT8, "p1"], 0.05)
    delivery.score_front()
    publish(delivery, "complete", 1, 1.0, {})
    write_manifest(run)
    return run


@pytest.fixture
def run(delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to tamper with, whose models take no time to time."""
    monkeypatch.setattr(verification, "measure_latency", half_a_millisecond)
    return Path(shutil.copytree(delivered, tmp_path / "run"))


def checks(path: Path, task: Task) -> list[Check]:
    """All checks but those of latency, which a busy machine can fail."""
    found = verify_path(path, lambda config: task, SilentProgress())
    return [check for check in found if not check.name.endswith(": latency")]


def failed(path: Path, task: Task) -> set[str]:
    return {check.name for check in checks(path, task) if not check.ok}


def test_a_run_as_delivered_passes(delivered: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SECONDS_EACH", 0.02)
    found = checks(delivered, task)
    assert [check for check in found if not check.ok] == []
    names = {check.name for check in found}
    for point in (ORIGINAL, UNIFORM_INT8, "p1"):
        assert {f"{point}: {what}" for what in ("size", "validation", "test", "kernels", "checkpoint")} <= names
    assert {"manifest", "p1: budget"} <= names


def test_one_model_can_be_verified_alone(run: Path, task: Task) -> None:
    found = checks(run / "models" / "p1" / "model.onnx", task)
    assert {check.name.partition(":")[0] for check in found} == {ORIGINAL, "p1"}
    assert all(check.ok for check in found)


def swap_artifact(run: Path) -> None:
    shutil.copy(run / "models" / UNIFORM_INT8 / "model.onnx", run / "models" / "p1" / "model.onnx")


def swap_checkpoint(run: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = run / "models" / "p1" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["fc.bias"] = tensors["fc.bias"] + torch.linspace(0, 50, 10)
    save_file(tensors, path, metadata)


def raise_quality(run: Path) -> None:
    front = json.loads((run / "front.json").read_text())
    front["points"][0]["quality"]["test"] += 0.01
    (run / "front.json").write_text(json.dumps(front))


def lower_budget(run: Path) -> None:
    front = json.loads((run / "front.json").read_text())
    front["constraints"]["latency_ms"] = 1e-6
    (run / "front.json").write_text(json.dumps(front))


def spoil_artifact(run: Path) -> None:
    (run / "models" / "p1" / "model.onnx").write_bytes(b"not a model")


def remove_artifact(run: Path) -> None:
    (run / "models" / "p1" / "model.onnx").unlink()


def remove_checkpoint(run: Path) -> None:
    (run / "models" / "p1" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (swap_artifact, {"manifest", "p1: size", "p1: kernels"}),
        (swap_checkpoint, {"manifest", "p1: checkpoint"}),
        (raise_quality, {"manifest", "p1: test"}),
        (lower_budget, {"manifest", "p1: budget"}),
        (spoil_artifact, {"manifest", "p1: artifact"}),
        (remove_artifact, {"manifest", "p1: artifact"}),
        (remove_checkpoint, {"manifest", "p1: checkpoint"}),
    ],
)
def test_what_was_changed_is_found(run: Path, task: Task, tamper: Callable[[Path], None], expected: set[str]) -> None:
    tamper(run)
    assert failed(run, task) >= expected
    assert not any(name.startswith((ORIGINAL, UNIFORM_INT8)) for name in failed(run, task))


def test_another_latency_than_written_is_found(run: Path, task: Task) -> None:
    found = {check.name: check for check in verify_path(run, lambda config: task, SilentProgress())}
    written = load_front(run)["p1"].latency_ms
    assert written is not None
    assert found["p1: latency"].ok == (abs(0.5 - written) <= LATENCY_TOLERANCE * written)
    assert found["p1: latency"].detail.startswith("0.5 ms, written ")


def test_a_run_without_a_manifest_fails(run: Path, task: Task) -> None:
    (run / "manifest.json").unlink()
    assert failed(run, task) == {"manifest"}


def test_the_manifest_names_what_changed(run: Path, task: Task) -> None:
    (run / "models" / "p1" / "plan.json").write_text("{}")
    check = next(check for check in checks(run, task) if check.name == "manifest")
    assert check.detail == "changed or missing: models/p1/plan.json"


@pytest.mark.parametrize("path", ["models/p1/plan.json", "front.csv"])
def test_only_a_run_or_its_models_can_be_verified(delivered: Path, task: Task, path: str) -> None:
    with pytest.raises(UsageError, match="nothing to compare it with"):
        checks(delivered / path, task)
