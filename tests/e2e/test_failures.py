"""What goes wrong in the middle of a search, and odd models and data: the search ends with a front and with reasons.

Run in this process for a device that is not here, so that nothing is timed: what fails is then the candidate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import optuna
import pandas as pd
import pytest

from autocompress import api
from autocompress.errors import InfeasibleError, UsageError
from autocompress.front import LoadedFront
from autocompress.methods.recovery import quantize_aware
from autocompress.search import climb, deliver, recover, turns
from autocompress.search.deliver import Delivery
from autocompress.search.evaluate import StitchedEvaluator
from tests.fixtures.search import make_device

HEAD = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

class Net(nn.Module):
    def __init__(self, width=1.0, classes=3):
        super().__init__()
        self.a = nn.Conv2d(1, int(16 * width), 3, padding=1)
        self.b = nn.Conv2d(int(16 * width), 16, 3, padding=1, stride=2)
        self.fc = nn.Linear(16, classes)
    def forward(self, image):
        return self.fc(self.b(self.a(image).relu()).relu().mean((2, 3)))

class Chain(nn.Sequential):
    def forward(self, image):
        for part in self:
            image = part(image)
        return image

g = torch.Generator().manual_seed(0)
def data(n, classes=3):
    y = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1), y
def without(part, label):
    return part[0][part[1] != label], part[1][part[1] != label]
def trained():
    torch.manual_seed(0)
    net, (x, y) = Net(), data(256)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net
def late(after, what):
    calls = []
    def loss(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets) if len(calls) <= after else what(outputs, targets)
    return loss
def given(**more):
    return dict(model=trained(), train=data(200), validation=data(60), test=data(60)) | more
"""

Search = Callable[..., LoadedFront]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Searches a task whose function returns an expression, with a few trials and steps."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    for name, value in (("STEPS_FIRST", 6), ("STEPS_SECOND", 6), ("STEPS_FORMATS", 3)):
        monkeypatch.setattr(climb, name, value)
    for name, value in (("ENTRANTS", 3), ("PROMOTED", 1)):
        monkeypatch.setattr(turns, name, value)
    device = make_device().save(tmp_path / "far-away.yaml")

    def run(expression: str, head: str = "", **options: Any) -> LoadedFront:
        name = f"failing_{len(sys.modules)}_{abs(hash((expression, head)))}"
        (tmp_path / f"{name}.py").write_text(f"{HEAD}\n{head}\ndef task():\n    return {expression}\n")
        settings = {"hardware": str(device), "trials": 12, "out": tmp_path / "run"}
        return api.search(task=f"{name}:task", **(settings | options))

    return run


def rejected(front: LoadedFront) -> dict[str, str]:
    table = pd.read_csv(front.path / "rejected.csv")
    return dict(zip(table["id"], table["reason"], strict=True))


def check(front: LoadedFront) -> None:
    """A front that is whole: its files run, give numbers, and nothing half-written stands beside them."""
    assert front.front.status == "complete"
    assert front.points
    for point in (front.reference, *front.points):
        session = ort.InferenceSession(str(point.onnx_path))
        (outputs,) = session.run(None, {"image": np.ones((3, 1, 8, 8), np.float32)})
        assert np.isfinite(outputs).all()
        assert point.id not in rejected(front)
    assert not list(front.path.rglob("*.part"))


# -------------------------------------------------------------------------------------------------- odd data and models


@pytest.mark.parametrize(
    "expression",
    [
        pytest.param("given(calibration=data(8))", id="calibration of 8 samples"),
        pytest.param("given(validation=without(data(90), 2))", id="a class is missing in validation"),
        pytest.param("given(train=without(data(250), 2), test=without(data(90), 1))", id="classes are missing"),
        pytest.param("given(train=data(3), calibration=data(8))", id="train is smaller than a batch"),
        pytest.param("given(train=data(2))", id="train has two samples"),
        pytest.param("given(validation=data(1))", id="one validation sample"),
        pytest.param("given(**{n: data(80, classes=1) for n in ('train', 'validation', 'test')})", id="one class"),
        pytest.param("given(model=Net(classes=1), **{n: data(80, classes=1) for n in ('train', 'validation', 'test')})",
                     id="one output"),
        pytest.param("given(model=Chain(nn.Flatten(), nn.Linear(64, 3)))", id="a single linear layer"),
        pytest.param("given(model=Chain(nn.Conv2d(1, 3, 8), nn.Flatten()))", id="a convolution ends the model"),
    ],
)  # fmt: skip
def test_odd_data_and_models_end_with_a_front(search: Search, expression: str) -> None:
    check(search(expression))


def test_a_space_of_one_point_gives_that_point(search: Search, tmp_path: Path) -> None:
    space = tmp_path / "one.yaml"
    space.write_text("keep: [1.0]\ncompute: [int8]\nweight_bits: [8]\n")
    front = search("given()", space=str(space))
    check(front)
    assert all(form.compute == "int8" for point in front.points for form in point.plan.layers.values())


def test_a_space_that_leaves_nothing_to_choose_is_refused(search: Search, tmp_path: Path) -> None:
    space = tmp_path / "none.yaml"
    space.write_text("keep: [1.0]\ncompute: [fp32]\nweight_bits: [32]\n")
    with pytest.raises(UsageError, match=r"there is nothing to choose: .* allow a smaller keep"):
        search("given()", space=str(space))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("given(train=data(1))", "train split has 1 sample.*give calibration too"),
        ("given(train=(data(50)[0] / 0, data(50)[1]))", r"(\d+) of \1 train samples hold values that are not finite"),
        ("given(validation=(data(50)[0], torch.arange(50)))", "validation run from 0 to 49.*the classes 0 to 2"),
        ("given(loss=lambda o, t: o.sum() * float('nan'))", r"loss gives \[nan\] for the model's own outputs"),
        ("given(validation=data(50)[0])", "a batch of the task's validation is a Tensor; expected .inputs, targets."),
        ("given(train=[data(4), data(4)[0]])", "1 of 2 batches of the task's train have no targets"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_made(
    search: Search, tmp_path: Path, expression: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        search(expression)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- failing candidates


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("late(5, lambda o, t: cross_entropy(o, t) * float('nan'))", "FloatingPointError: the distillation loss"),
        ("late(5, lambda o, t: {}['absent'])", "KeyError: 'absent'"),
    ],
)
def test_a_recovery_that_fails_is_recorded_everywhere(search: Search, loss: str, reason: str) -> None:
    front = search(f"given(loss={loss})")
    check(front)
    reasons = {name: said for name, said in rejected(front).items() if name.endswith("-rung1")}
    assert reasons
    assert all(said.startswith(reason) for said in reasons.values())
    ladder = pd.read_csv(front.path / "ladder.csv")
    assert set(ladder["id"] + "-rung1") == set(reasons)
    assert ladder["failure"].str.startswith(reason).all()
    assert ladder["error"].isna().all()
    log = [json.loads(line) for line in (front.path / "log.jsonl").read_text().splitlines()]
    told = [line for line in log if line["level"] == "warning" and reason in line["message"]]
    assert len(told) == len(reasons)
    # Of what no candidate is known to fail with, the log keeps where it happened.
    assert all(("traceback" in line) == reason.startswith("KeyError") for line in told)
    study = optuna.load_study(study_name="recipes", storage=f"sqlite:///{front.path / 'study.db'}")
    failed = [trial.user_attrs["failure"] for trial in study.trials if trial.state.name == "FAIL"]
    assert len(failed) == len(reasons)
    assert all(said.startswith(reason) for said in failed)


def test_weights_that_are_not_finite_are_never_delivered(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float recovery is sound; training with simulated formats breaks a weight without a word."""

    def breaking(*args: Any, **more: Any) -> Any:
        made = quantize_aware(*args, **more)
        made.weights["fc.weight"][0, 0] = float("nan")
        return made

    monkeypatch.setattr(recover, "quantize_aware", breaking)
    front = search("given()")
    check(front)
    broken = [said for said in rejected(front).values() if said.startswith("FloatingPointError: its weights")]
    assert broken
    assert all(point.plan.recipe.steps == 0 for point in front.points)


@pytest.mark.parametrize("stage", ["evaluate", "format", "export", "runtime"])
def test_a_candidate_that_raises_is_left_out_with_its_reason(
    search: Search, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Every candidate in which some channels are gone fails at one stage; those of full width are delivered."""
    full = 16

    def fails_on(graph: Any) -> bool:
        return bool(graph.tensors["b.weight"].shape[0] < full)

    class StrangeError(Exception):
        pass

    if stage == "evaluate":
        build = StitchedEvaluator.build

        def building(self: StitchedEvaluator, plan: Any) -> Any:
            if plan.groups.get("b", full) < full:
                raise StrangeError("no such kernel")
            return build(self, plan)

        monkeypatch.setattr(StitchedEvaluator, "build", building)
    elif stage == "format":

        def forming(graph: Any, *args: Any, **more: Any) -> Any:
            if fails_on(graph):
                raise StrangeError("no such kernel")
            return quantize_aware(graph, *args, **more)

        monkeypatch.setattr(recover, "quantize_aware", forming)
    elif stage == "export":
        write = deliver.write_onnx

        def writing(compressed: Any, path: Path, *args: Any) -> int:
            if fails_on(compressed.graph):
                path.write_bytes(b"half")
                raise StrangeError("no such kernel")
            return write(compressed, path, *args)

        monkeypatch.setattr(deliver, "write_onnx", writing)
    else:
        run = deliver.run_batches

        def running(session: Any, batches: Any) -> Any:
            made = run(session, batches)
            if narrow[-1]:
                raise StrangeError("no such kernel")
            return made

        narrow: list[bool] = []
        export = Delivery._export

        def exporting(self: Delivery, name: str, compressed: Any, *args: Any) -> None:
            narrow.append(fails_on(compressed.graph))
            try:
                export(self, name, compressed, *args)
            finally:
                narrow.append(False)

        monkeypatch.setattr(deliver, "run_batches", running)
        monkeypatch.setattr(Delivery, "_export", exporting)
    front = search("given()", trials=24)
    check(front)
    reason = "StrangeError: no such kernel"
    found = list(rejected(front).values())
    if stage == "evaluate":
        trials = pd.read_csv(front.path / "trials.csv")
        assert (trials.loc[trials["state"] == "FAIL", "failure"] == reason).any()
        assert (trials["state"] == "COMPLETE").any()
    else:
        assert reason in found


def test_where_everything_fails_nothing_looks_finished(
    search: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export = Delivery._export

    def exporting(self: Delivery, name: str, *args: Any) -> None:
        if name != "original":
            raise ValueError("the checker says no")
        export(self, name, *args)

    monkeypatch.setattr(Delivery, "_export", exporting)
    for attempt in range(2):
        with pytest.raises(InfeasibleError, match=r"ValueError: the checker says no|ended without a"):
            search("given()", resume=bool(attempt))
    assert sorted(folder.name for folder in (tmp_path / "run" / "models").iterdir()) == ["original"]
    assert "ValueError: the checker says no" in (tmp_path / "run" / "rejected.csv").read_text()


def test_a_students_factory_that_raises_costs_the_students_alone(search: Search) -> None:
    front = search("given(factory=broken)", "def broken(width=1.0):\n    raise LookupError('no such width')")
    check(front)
    assert {said for name, said in rejected(front).items() if name.startswith("student-fresh")} == {
        "LookupError: no such width"
    }


# ------------------------------------------------------------------------------------------------- without labels


@pytest.mark.parametrize(
    "train",
    [
        "data(200)[0]",
        "torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data(200)[0]), batch_size=16)",
    ],
    ids=["tensor", "loader"],
)
def test_unlabelled_images_follow_the_teacher_alone(search: Search, train: str) -> None:
    front = search(f"given(train={train}, loss=late(1, lambda o, t: {{}}['labels were used']))")
    check(front)
    ladder = pd.read_csv(front.path / "ladder.csv")
    assert (ladder["alpha"] == 1.0).all()
    assert ladder["error"].notna().all()
    assert (ladder["steps"] > 0).all()
    assert "follows the teacher alone (alpha 1), the space's alpha (0.5, 0.9)" in (front.path / "log.jsonl").read_text()


def test_stages_tell_training_from_exporting(search: Search) -> None:
    stages = search("given()").front.search.stages
    assert {"read", "search", "recover", "export", "measure", "publish"} <= set(stages)
    assert all(seconds >= 0 for seconds in stages.values())
    assert stages["recover"] > 0
