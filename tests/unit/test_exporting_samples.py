"""Inputs of any model from whatever holds them, and folders that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.errors import UsageError
from autocompress.exporting.folder import building
from autocompress.exporting.samples import read_samples
from autocompress.exporting.subject import by_position

IMAGES, CLASSES = torch.arange(12.0).reshape(6, 2), torch.arange(6)


class One(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> dict[str, Tensor]:
        return {"sum": a.sum(1) + b.sum(1), "difference": a.sum(1) - b.sum(1) if c is None else c}


@pytest.mark.parametrize(
    ("given", "labelled"),
    [
        (IMAGES, False),
        ((IMAGES, CLASSES), True),
        ([IMAGES[:4], IMAGES[4:]], False),
        ([(IMAGES[:4], CLASSES[:4]), [IMAGES[4:], CLASSES[4:]]], True),
        (TensorDataset(IMAGES, CLASSES), True),
        (DataLoader(TensorDataset(IMAGES, CLASSES), batch_size=4), True),
        ({"x": IMAGES, "labels": CLASSES}, True),
        ([({"x": IMAGES}, CLASSES)], True),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_way_to_hold_one_input(given: Any, labelled: bool) -> None:
    found = read_samples(One(), given, "calibration")
    assert len(found.inputs) == 1
    assert torch.equal(found.inputs[0], IMAGES)
    assert (found.targets is not None) == labelled
    assert found.targets is None or torch.equal(found.targets, CLASSES)


def test_as_many_tensors_as_forward_requires_are_inputs_and_one_more_the_target() -> None:
    a, b = IMAGES, IMAGES + 1
    assert len(read_samples(Two(), [(a, b)], "calibration").inputs) == 2
    with_target = read_samples(Two(), [(a, b, CLASSES)], "calibration")
    assert (len(with_target.inputs), with_target.targets is None) == (2, False)
    assert len(read_samples(Two(), [((a, b), CLASSES)], "calibration").inputs) == 2


def test_no_more_is_read_than_is_needed() -> None:
    def endless() -> Any:
        while True:
            yield IMAGES

    assert len(read_samples(One(), endless(), "train", limit=9)) == 9


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "has no samples"),
        (3, "is a int; give tensors"),
        ([IMAGES[0, 0]], "first axis of each must be the batch"),
        (["text"], "a batch of calibration is a str"),
        ([(IMAGES, CLASSES, CLASSES)], "has 3 tensors, but the model's forward takes 1"),
        ([IMAGES, IMAGES[:, :1]], "differ in shape.*pad them"),
        ([{"x": IMAGES}, {"y": IMAGES}], "other inputs than the first"),
        ([(IMAGES, CLASSES[:3])], "first axis of each must be the batch"),
    ],
)
def test_what_holds_no_batches_is_refused(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_samples(One(), given, "calibration")


def test_named_inputs_and_outputs_become_positions_without_renaming_a_layer() -> None:
    class Named(Two):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    model = Named()
    samples = read_samples(model, {"c": CLASSES.float(), "a": IMAGES, "b": IMAGES}, "calibration")
    made, names = by_position(model, samples)
    assert names == ("sum", "difference")
    total, difference = made(*samples.inputs)
    assert torch.equal(total, 2 * IMAGES.sum(1))
    assert torch.equal(difference, CLASSES.float())
    assert [name for name, _ in made.named_parameters()] == ["layer.weight", "layer.bias"]
    assert type(model) is Named
    with pytest.raises(UsageError, match=r"argument of Named\.forward: 'd'"):
        by_position(model, read_samples(model, {"a": IMAGES, "b": IMAGES, "d": IMAGES}, "calibration"))


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"

    def fail_half_way() -> None:
        with building(out, "m") as folder:
            (folder.path / "file").write_text("half", encoding="utf-8")
            assert not out.exists()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with building(out, "m") as folder:
        (folder.path / "file").write_text("whole", encoding="utf-8")
        assert folder.finish() == out
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text(encoding="utf-8") == "whole"
    with pytest.raises(UsageError, match="not empty"), building(out, "m"):
        pass


def test_folders_without_a_name_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    for _ in range(2):
        with building(None, "my.module:net-int8") as folder:
            (folder.path / "file").touch()
            made.append(folder.finish())
    assert made == [Path("results/my.module-net-int8-1"), Path("results/my.module-net-int8-2")]
