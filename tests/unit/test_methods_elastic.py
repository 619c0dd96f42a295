"""Shared weights: what is cut from them is the network that was trained, and training changes only what was drawn."""

from __future__ import annotations

import pytest
import torch

from autocompress.graph.blocks import find_blocks
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.graph.rewrite import rewrite
from autocompress.methods.distillation import TeacherData, teach
from autocompress.methods.elastic import ElasticWeights, train_elastic
from autocompress.plan import CompressionPlan, Original, Recipe, Student
from autocompress.progress import SilentProgress
from autocompress.tasks.base import cross_entropy
from autocompress.tasks.models import resnet20
from autocompress.tasks.splits import TensorSplit

torch.manual_seed(0)
GRAPH, WEIGHTS = read_model(resnet20(classes=10, channels=1, width=0.5).eval(), (torch.randn(2, 1, 12, 12),))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *GRAPH.tensors[GRAPH.inputs[0]].shape, generator=torch.Generator().manual_seed(seed))


def make() -> ElasticWeights:
    orders = {
        group.id: torch.randperm(group.size, generator=torch.Generator().manual_seed(3)) for group in GRAPH.groups
    }
    return ElasticWeights(GRAPH, WEIGHTS, orders, [(images(64),)])


def plan(share: float, dropped: tuple[str, ...] = ()) -> CompressionPlan:
    base = Student(width=1.0, depth=0.5, dropped=dropped) if dropped else Original()
    return CompressionPlan(base=base, groups={g.id: max(1, int(g.size * share)) for g in GRAPH.groups})


@pytest.fixture(scope="module")
def data() -> TeacherData:
    split = TensorSplit(images(128, 1), torch.randint(10, (128,), generator=torch.Generator().manual_seed(2)))
    return teach(build_module(GRAPH, WEIGHTS), split, mirror=False, progress=SilentProgress())


def train(elastic: ElasticWeights, data: TeacherData, drawn: CompressionPlan, steps: int = 20) -> int:
    return train_elastic(
        elastic, data, lambda _: drawn, drawn, Recipe(alpha=1.0), steps=steps, learning_rate=5e-3,
        task_loss=cross_entropy, generator=torch.Generator().manual_seed(0), drawn=1, batch_size=32,
        mixed_precision=False,
    )  # fmt: skip


def test_the_whole_is_the_original_as_long_as_nothing_was_trained() -> None:
    graph, weights = make().cut(CompressionPlan())
    assert graph == GRAPH
    with torch.no_grad():
        found, wanted = (build_module(GRAPH, w)(images(64)) for w in (weights, WEIGHTS))
    # Deviations are estimated again, on the samples they were first taken from.
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_a_part_has_the_shapes_of_its_plan_and_the_leading_channels() -> None:
    elastic = make()
    half = plan(0.5)
    graph, weights = elastic.cut(half)
    assert graph == rewrite(GRAPH, half.groups)
    assert {name: tuple(weights[name].shape) for name in weights} == {
        name: graph.tensors[name].shape for name in graph.weight_names()
    }
    block = find_blocks(GRAPH)[0].name
    shallow, _ = elastic.cut(plan(1.0, (block,)))
    assert all(not layer.name.startswith(f"{block}.") for layer in shallow.layers)


def test_training_brings_a_part_nearer_to_the_teacher_and_leaves_other_channels(data: TeacherData) -> None:
    elastic, drawn = make(), plan(0.5)
    before = {name: value.detach().clone() for name, value in elastic.module.named_parameters()}

    def distance() -> float:
        graph, weights = elastic.cut(drawn)
        with torch.no_grad():
            return float((build_module(graph, weights)(data.split.inputs) - data.logits[0]).square().mean())

    first = distance()
    assert train(elastic, data, drawn) == 20
    assert distance() < 0.8 * first
    group = next(g for g in GRAPH.groups if any(m.tensor == "layer1.0.conv1.weight" for m in g.members))
    gone = elastic.orders[group.id][group.size // 2 :]
    after = dict(elastic.module.named_parameters())["layer1.0.conv1.weight"]
    kept = elastic.orders[group.id][: group.size // 2]
    # Weight decay reaches every weight, gradients only those that were used.
    torch.testing.assert_close(after[gone], before["layer1.0.conv1.weight"][gone], rtol=1e-3, atol=1e-5)
    assert (after[kept] - before["layer1.0.conv1.weight"][kept]).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_weights(data: TeacherData) -> None:
    first, second = make(), make()
    for elastic in (first, second):
        train(elastic, data, plan(0.5), steps=3)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_is_an_error(data: TeacherData) -> None:
    broken = TeacherData(data.split, torch.full_like(data.logits, float("nan")), None)
    with pytest.raises(FloatingPointError, match="shared weights"):
        train(make(), broken, plan(0.5))
