"""Users' own tasks: ``module:function`` and folders of images."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autocompress.errors import UsageError
from autocompress.tasks import load_task
from autocompress.tasks.base import DataRequest
from autocompress.tasks.imagefolder import image_folder
from autocompress.tasks.splits import SPLITS

HEAD = """
import torch
from types import SimpleNamespace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, width=1.0):
        super().__init__()
        self.fc = nn.Linear(4, 3)
    def forward(self, features):
        return self.fc(features)

g = torch.Generator().manual_seed(0)
def data(n):
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
def loader(n, **kw):
    return DataLoader(TensorDataset(*data(n)), batch_size=8, **kw)
model = Net().train()
"""

MakeTask = Callable[[str], str]


@pytest.fixture
def make_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTask:
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> str:
        name = f"user_task_{len(sys.modules)}_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(HEAD + body)
        return f"{name}:task"

    return write


GOOD = "dict(model=model, train=loader(200, shuffle=True), validation=loader(40), test=data(50)"


def test_a_mapping_becomes_a_task(make_task: MakeTask) -> None:
    reference = make_task(f"def task(): return {GOOD}, calibration=TensorDataset(*data(16)), factory=Net)\n")
    task = load_task(reference)
    assert {name: len(task.split(name)) for name in SPLITS} == {
        "train": 200,
        "calibration": 16,
        "validation": 40,
        "test": 50,
    }
    assert task.input_names == ("features",)
    assert task.accepts == {"width"}
    assert task.model_name == "Net"
    assert not task.model.training
    assert sys.modules[reference.split(":")[0]].model.training  # the caller's module stays as it is
    batch = next(iter(task.train))
    assert batch.target is not None
    assert task.loss(task.forward(task.model, batch), batch.target) > 0
    assert load_task(reference).split("validation").digest != ""


def test_calibration_is_taken_out_of_train(make_task: MakeTask) -> None:
    task = load_task(make_task(f"def task(): return {GOOD})\n"))
    assert (len(task.split("calibration")), len(task.split("train"))) == (40, 160)
    digests = {name: set(task.split(name).sample_digests()) for name in SPLITS}
    assert all(not digests[a] & digests[b] for a, b in itertools.combinations(SPLITS, 2))
    seen = torch.cat([batch.inputs[0] for batch in task.train])
    calibration = {tuple(row) for row in task.split("calibration").inputs.tolist()}
    assert not calibration & {tuple(row) for row in seen.tolist()}


def test_a_loader_that_shuffles_is_collected_the_same_way_every_time(make_task: MakeTask) -> None:
    body = (
        "def task():\n g.manual_seed(0)\n"
        " return dict(model=model, train=loader(100, shuffle=True), validation=data(20), test=data(20))\n"
    )
    reference = make_task(body)
    assert load_task(reference).fingerprint == load_task(reference).fingerprint


def test_an_object_with_its_own_metric_loss_and_data(make_task: MakeTask, tmp_path: Path) -> None:
    body = """
from autocompress.plan import Metric
def task(data, seed):
    x = torch.randn(90, 4)
    parts = dict(zip(("train", "validation", "test"), ((v, v.sum(1)) for v in x.split(30))))
    return SimpleNamespace(model=nn.Linear(4, 1), **parts, name=f"{data.name}{seed}",
        metric=Metric(name="mae", unit="", higher_is_better=False),
        score=lambda o, t: (o[:, 0] - t).abs(), loss=lambda o, t: (o[:, 0] - t).pow(2).mean())
"""
    (tmp_path / "folder").mkdir()
    task = load_task(make_task(body), data=tmp_path / "folder", seed=5)
    assert task.name == "folder5"
    assert task.metric.name == "mae"
    assert task.score(torch.tensor([[1.0]]), torch.tensor([3.0])).tolist() == [2.0]


def test_a_task_object_is_taken_as_it_is(make_task: MakeTask) -> None:
    body = """
from autocompress.tasks.base import Task
from autocompress.tasks.splits import TensorSource, TensorSplit
def task():
    sources = {n: TensorSource(TensorSplit(*data(20)), 8) for n in ("train", "calibration", "validation", "test")}
    return Task("mine", "net", model, sources)
"""
    assert load_task(make_task(body)).name == "mine"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def task(): return dict(model=model)", "without train, validation, test"),
        (f"def task(): return {GOOD}, lss=1)", "'lss'; nearest: 'loss'"),
        (f"def task(): return {GOOD}[0])", "the task's test"),
        (f"def task(): return {GOOD.replace('loader(40)', 'iter([])')})", "can be read only once"),
        (f"def task(): return {GOOD.replace('loader(40)', '[]')})", "validation split is empty"),
        (f"def task(): return {GOOD.replace('loader(40)', '[1, 2]')})", r"batch of the task's validation is a int"),
        (f"def task(): return {GOOD.replace('model=model', 'model=1')})", "model is a int, not a torch.nn.Module"),
        (f"def task(): return {GOOD.replace('model=model', 'model=nn.Linear(5, 3)')})", "the model fails on inputs"),
        (f"def task(): return {GOOD}, metric='f1')", "metric 'f1' needs a score"),
        (f"def task(): return {GOOD}, score=lambda o, t: o.mean())", r"score gives shape \(\)"),
        (
            "def task(): return dict(model=model, train=(data(9)[1], data(9)[1]), validation=data(4), test=data(4))",
            "int64",
        ),
        ("task = 3", "is a int, not a function"),
    ],
)
def test_mistakes_are_explained(make_task: MakeTask, body: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(make_task(body))


def test_a_users_task_brings_its_own_model(make_task: MakeTask) -> None:
    reference = make_task(f"def task(): return {GOOD})\n")
    with pytest.raises(UsageError, match="brings its own model"):
        load_task(reference, model="resnet8")
    with pytest.raises(UsageError, match="prepares its own inputs"):
        load_task(reference, input_size=32)


# ------------------------------------------------------------------------------------------- folders of images


def write_images(folder: Path, count: int, classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{seed}-{index}.png")


def test_a_folder_of_classes_is_split_by_content(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 50)
    request = DataRequest(None, tmp_path / "cache")
    data = image_folder(str(tmp_path / "images"), request)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 63,
        "calibration": 7,
        "validation": 10,
        "test": 20,
    }
    assert (data.classes, data.channels, data.input_size) == (2, 3, 16)
    for split in data.splits.values():
        assert 0.3 < float(split.targets.float().mean()) < 0.7
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    moved = tmp_path / "moved" / "cat"
    (moved / "0-0.png").rename(moved / "renamed.png")
    assert image_folder(str(tmp_path / "moved"), request).fingerprint == data.fingerprint
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 4  # decoded once


def test_folders_for_the_splits_are_used_and_repeats_left_out(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate((("train", 30), ("val", 5), ("test", 6))):
        write_images(tmp_path / name, count, seed=seed)
    leaked = next((tmp_path / "test" / "cat").iterdir())
    shutil.copy(leaked, tmp_path / "train" / "cat" / "leaked.png")
    data = image_folder(str(tmp_path), DataRequest(None, tmp_path / "cache", input_size=8))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 54,
        "calibration": 6,
        "validation": 10,
        "test": 12,
    }
    assert data.splits["test"].inputs.shape == (12, 3, 8, 8)


def test_a_folder_trains_like_any_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocompress.tasks import training

    monkeypatch.setattr(training, "recipe_for", lambda data: training.Recipe(epochs=1, batch_size=16))
    write_images(tmp_path / "images", 20)
    task = load_task(f"imagefolder:{tmp_path / 'images'}", model="resnet8", cache_dir=tmp_path / "cache")
    assert task.name == "imagefolder:images"
    assert task.model(task.example_inputs[0]).shape == (2, 2)


def test_mistakes_in_folders_are_explained(tmp_path: Path) -> None:
    request = DataRequest(None, tmp_path / "cache")
    with pytest.raises(UsageError, match="is not a directory"):
        image_folder(str(tmp_path / "absent"), request)
    write_images(tmp_path / "one", 3, ("cat",))
    with pytest.raises(UsageError, match="holds 1 class folders"):
        image_folder(str(tmp_path / "one"), request)
    write_images(tmp_path / "few", 1)
    with pytest.raises(UsageError, match="too few images"):
        image_folder(str(tmp_path / "few"), request)
    write_images(tmp_path / "names" / "train", 9)
    write_images(tmp_path / "names" / "val", 9, ("cat", "dogs"), seed=1)
    with pytest.raises(UsageError, match="'dogs'; nearest: 'dog'"):
        image_folder(str(tmp_path / "names"), request)
    write_images(tmp_path / "broken", 30)
    (tmp_path / "broken" / "cat" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"bad\.png' is unreadable"):
        image_folder(str(tmp_path / "broken"), request)
    assert not list((tmp_path / "cache").rglob("*.part"))
