"""Distillation from cached teacher outputs."""

from __future__ import annotations

import time
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from autocompress.graph.executor import GraphModule, build_module
from autocompress.methods.distillation import (
    Schedule,
    TeacherData,
    distill,
    distillation_loss,
    mixed_precision_pays,
    penultimate,
    similarity_loss,
    teach,
)
from autocompress.plan import Recipe
from autocompress.progress import SilentProgress
from autocompress.tasks.splits import TensorSplit
from tests.graphs import GraphMaker, resnet


def net(seed: int) -> GraphModule:
    return build_module(*resnet((4, 6, 8), blocks=1, size=8, seed=seed))


@pytest.fixture(scope="module")
def split() -> TensorSplit:
    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorSplit(images, torch.arange(96) % 10)


@pytest.fixture(scope="module")
def data(split: TensorSplit) -> TeacherData:
    return teach(net(0), split, mirror=True, progress=SilentProgress())


def train(module: GraphModule, data: TeacherData, recipe: Recipe, steps: int = 60, **options: object) -> int:
    settings: dict[str, object] = {
        "learning_rate": 3e-3,
        "task_loss": F.cross_entropy,
        "generator": torch.Generator().manual_seed(1),
        "batch_size": 32,
        "mixed_precision": False,
    }
    return distill(module, data, recipe, steps=steps, **(settings | options))  # type: ignore[arg-type]


def distance(module: GraphModule, data: TeacherData) -> float:
    with torch.no_grad():
        outputs = module(data.split.inputs).float()
        plain = in_order(data, data.logits)[:96]
        return float(distillation_loss(outputs, data.split.targets, plain, Recipe(alpha=1.0), F.cross_entropy))


def in_order(data: TeacherData, answers: torch.Tensor) -> torch.Tensor:
    """What the teacher said of each sample as it is, then of each mirrored one."""
    return answers[data.order.argsort()]


def test_the_teacher_is_asked_once_for_each_view(split: TensorSplit, data: TeacherData) -> None:
    teacher = net(0)
    assert penultimate(teacher) == "flat"
    with torch.no_grad():
        plain, mirrored = teacher(split.inputs), teacher(split.inputs.flip(-1))
    # bfloat16 may be used where the processor has it
    torch.testing.assert_close(in_order(data, data.logits), torch.cat([plain, mirrored]), rtol=0.05, atol=0.05)
    assert data.features is not None
    assert data.features.shape == (192, 8)
    seen = dict(teacher.taps)
    single = teach(teacher, split, mirror=False, progress=SilentProgress())
    assert len(single.logits) == 96
    assert teacher.taps == seen


def test_batches_pair_samples_with_their_view_and_answer(split: TensorSplit, data: TeacherData) -> None:
    batches = data.batches(40, torch.Generator().manual_seed(0))
    teacher = net(0)
    views = set()
    for _ in range(4):
        inputs, targets, logits, features = next(batches)
        with torch.no_grad():
            torch.testing.assert_close(logits, teacher(inputs), rtol=0.05, atol=0.05)
        assert features.shape == (40, 8)
        for image, target in zip(inputs, targets, strict=True):
            plain = [int(n) for n in range(96) if torch.equal(image, split.inputs[n])]
            mirrored = [int(n) for n in range(96) if torch.equal(image, split.inputs[n].flip(-1))]
            views.add(bool(mirrored))
            (sample,) = plain or mirrored
            assert target == split.targets[sample]
    assert views == {False, True}
    assert len(next(data.batches(1000, torch.Generator()))[1]) == 192  # no more than there are


def test_a_teacher_asked_bit_by_bit_says_the_same(split: TensorSplit, data: TeacherData) -> None:
    teacher = net(0)
    bits = TeacherData(teacher, split, mirror=True, batch_size=50)
    bits.extend(seconds=0.0)
    assert bits.known == len(bits.logits) == 50
    assert not bits.complete
    (batch,) = [next(bits.batches(1000, torch.Generator().manual_seed(0)))]
    assert len(batch[0]) == 50  # only what is known is trained on
    while not bits.complete:
        bits.extend(seconds=0.0)
    bits.extend()
    torch.testing.assert_close(bits.logits, data.logits, rtol=0.05, atol=0.05)
    assert bits.features is not None
    torch.testing.assert_close(bits.features, data.features, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(alpha=0.5, temperature=1.0), Recipe(feature_weight=1.0)])
def test_the_student_comes_nearer_to_the_teacher(data: TeacherData, recipe: Recipe) -> None:
    student = net(5)
    taps = {"image": lambda value: value, "flat": lambda value: value}
    student.taps = dict(taps)
    before = distance(student, data)
    assert train(student, data, recipe) == 60
    assert distance(student, data) < 0.5 * before
    assert student.taps == taps
    assert not student.training


def test_the_same_seed_gives_the_same_student(data: TeacherData) -> None:
    first, second = net(5), net(5)
    for student in (first, second):
        train(student, data, Recipe(), steps=5)
    for name, value in first.weights().items():
        assert torch.equal(value, second.weights()[name])


def test_further_parameters_are_trained_too(data: TeacherData) -> None:
    student, factor = net(5), torch.nn.Parameter(torch.ones(1))
    student.taps["flat"] = lambda value: value * factor
    train(student, data, Recipe(), steps=5, extra_parameters=[factor])
    assert float(factor.detach()) != 1.0


def test_no_steps_and_no_time_change_nothing(data: TeacherData) -> None:
    student = net(5)
    before = student.weights()
    assert train(student, data, Recipe(), steps=0) == 0
    assert train(student, data, Recipe(), steps=10, seconds=0.0) == 0
    assert all(torch.equal(before[name], value) for name, value in student.weights().items())


def test_training_ends_with_its_time(data: TeacherData) -> None:
    started = time.monotonic()
    taken = train(net(5), data, Recipe(), steps=10**6, seconds=0.3)
    assert 0 < taken < 10**6
    assert time.monotonic() - started < 5.0


def test_a_diverging_recovery_says_so(data: TeacherData) -> None:
    student = net(5)
    student.taps["flat"] = lambda value: value * float("nan")
    taps = dict(student.taps)
    with pytest.raises(FloatingPointError, match="became nan at step 0"):
        train(student, data, Recipe(feature_weight=1.0))
    assert student.taps == taps
    assert not student.training


def test_the_loss_is_zero_at_the_teacher_and_weighs_the_labels() -> None:
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    assert float(distillation_loss(teacher, targets, teacher, Recipe(alpha=1.0), F.cross_entropy)) == pytest.approx(0.0)
    labels = distillation_loss(teacher, targets, teacher, Recipe(alpha=0.25), F.cross_entropy)
    assert float(labels) == pytest.approx(0.75 * float(F.cross_entropy(teacher, targets)), rel=1e-5)
    outputs = torch.zeros(6, 4)
    by_hand = 4.0 * F.kl_div(F.log_softmax(outputs / 2, 1), F.softmax(teacher / 2, 1), reduction="none").sum(1).mean()
    given = distillation_loss(outputs, targets, teacher, Recipe(alpha=1.0, temperature=2.0), F.cross_entropy)
    assert float(given) == pytest.approx(float(by_hand), rel=1e-5)


def test_similarity_compares_models_of_any_width() -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert float(similarity_loss(3.0 * features @ rotation, features)) == pytest.approx(0.0, abs=1e-6)
    assert float(similarity_loss(torch.randn(5, 3), features)) > 0.01


def test_a_model_that_ends_in_a_convolution_has_no_features(split: TensorSplit) -> None:
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", (1, 8, 8)), 4, "first"))
    pooled = maker.op("GlobalAveragePool", (maker.conv(hidden, 10, "last"),), "pooled", (10, 1, 1))
    maker.op("Flatten", (pooled,), "logits", (10,))
    module = build_module(maker.build(("image",), ("logits",)), maker.weights)
    assert penultimate(module) is None
    taught = teach(module, split, mirror=False, progress=SilentProgress())
    assert taught.features is None
    assert train(module, taught, Recipe(feature_weight=1.0), steps=2) == 2


def test_timing_both_precisions_leaves_the_module_as_it_was(split: TensorSplit) -> None:
    module = net(0)
    before = module.weights()
    assert mixed_precision_pays(module, split.inputs[:4]) in (True, False)
    assert all(torch.equal(before[name], value) for name, value in module.weights().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.training


def test_what_a_longer_training_goes_on_from_is_there_before_the_learning_rate_falls(data: TeacherData) -> None:
    module = net(3)
    seen: list[dict[str, torch.Tensor]] = []
    steps = train(
        module, data, Recipe(), steps=20,
        schedule=Schedule(rise=0.1, fall=0.3), falling=lambda: seen.append(module.weights()),
    )  # fmt: skip
    assert steps == 20
    (plateau,) = seen
    assert any(not torch.equal(value, module.weights()[name]) for name, value in plateau.items())
    # The same order of samples and the same rates until then.
    shorter, rates = net(3), Schedule(rise=0.1, fall=0.3)
    train(shorter, data, Recipe(), steps=14, schedule=cast(Schedule, _Stretched(rates, 14 / 20)))
    for name, value in shorter.weights().items():
        torch.testing.assert_close(value, plateau[name])


class _Stretched:
    """The beginning of a schedule."""

    plateau_end = 1.0

    def __init__(self, schedule: Schedule, share: float) -> None:
        self.schedule, self.share = schedule, share

    def __call__(self, part: float) -> float:
        return self.schedule(part * self.share)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(rise=0.03, fall=0.3)])
def test_learning_rates_rise_stay_and_fall(schedule: Schedule) -> None:
    rates = [schedule(part / 1000) for part in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0)
    peak = [place / 1000 for place, rate in enumerate(rates) if rate > 0.9999]
    assert min(peak) <= schedule.rise + 0.001
    assert max(peak) >= schedule.plateau_end - 0.001
