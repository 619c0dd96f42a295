"""How recovery sets its training up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from autocompress.graph.executor import GraphModule
from autocompress.methods.distillation import teach
from autocompress.plan import Metric, Recipe
from autocompress.progress import SilentProgress
from autocompress.search import recover
from autocompress.search.recover import BATCH, LEAST_BATCH, Trainer, batch_for
from autocompress.tasks.base import Task, correctness, quality
from autocompress.tasks.splits import TensorSplit
from tests.graphs import resnet


def test_small_inputs_train_in_full_batches() -> None:
    graph, _ = resnet()
    assert batch_for(graph, BATCH) == BATCH
    assert batch_for(graph, 32) == 32


@pytest.mark.parametrize(("fitting", "expected"), [(200, BATCH), (20, 20), (1, LEAST_BATCH)])
def test_a_step_keeps_to_the_memory_it_may_take(fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = resnet()
    values = sum(graph.tensors[name].elements for layer in graph.layers for name in layer.outputs)
    monkeypatch.setattr(recover, "STEP_BYTES", fitting * values * 4 * recover.HELD)
    assert batch_for(graph, BATCH) == expected


def test_a_longer_training_does_not_begin_with_the_samples_of_the_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = TensorSplit(images, torch.arange(8) % 10)
    task = SimpleNamespace(split=lambda name: split, metric=Metric(), score=correctness, loss=F.cross_entropy)
    teacher = teach(GraphModule(graph, weights).eval(), split, mirror=False, progress=SilentProgress())
    trainer = Trainer(cast(Task, task), teacher, seed=5, repeatable=True)
    seeds: list[int] = []

    def noted(*_: object, generator: torch.Generator, **__: object) -> int:
        seeds.append(generator.initial_seed())
        return 30

    monkeypatch.setattr(recover, "distill", noted)
    rung = {"fresh": False, "steps": 30, "seconds": None, "progress": SilentProgress()}
    first = trainer.float_recovery(graph, weights, Recipe(), **rung)  # type: ignore[arg-type]
    second = trainer.float_recovery(graph, weights, Recipe(), before=first, **rung)  # type: ignore[arg-type]
    assert second.steps == 60
    assert seeds == [5, 35]


def test_of_a_metric_that_falls_as_models_improve_the_lower_score_is_the_lower_error() -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    split = TensorSplit(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 10))
    metric = Metric(name="mae", unit="", higher_is_better=False)
    task = SimpleNamespace(
        split=lambda name: split, metric=metric, score=lambda outputs, targets: (outputs - targets).abs().mean(1)
    )
    teacher = teach(GraphModule(graph, weights).eval(), split, mirror=False, progress=SilentProgress())
    trainer = Trainer(cast(Task, task), teacher, seed=0)
    rung = {"fresh": False, "steps": 0, "seconds": None, "progress": SilentProgress()}
    small = {name: value * (0.1 if name.startswith("fc") else 1.0) for name, value in weights.items()}
    far, near = (trainer.float_recovery(graph, w, Recipe(), **rung) for w in (weights, small))  # type: ignore[arg-type]
    assert near.error < far.error
    mae = quality(cast(Task, task), GraphModule(graph, weights).eval())
    assert far.error == pytest.approx(mae / 100.0, rel=1e-3)
