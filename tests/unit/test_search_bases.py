"""Which students a search builds, and in which order it tries them."""

from __future__ import annotations

import torch

from autocompress.graph.read import read_model
from autocompress.plan import CompressionPlan, Recipe, Student
from autocompress.search.bases import student_specs
from autocompress.tasks.models import resnet20


def test_the_least_harmful_blocks_leave_first_and_the_shallowest_comes_first() -> None:
    graph, _ = read_model(resnet20(channels=1).eval(), (torch.rand(2, 1, 16, 16),))
    harms = {f"layer{stage}.{block}": 10.0 * stage + block for stage in (1, 2, 3) for block in (0, 1, 2)}
    specs = student_specs(graph, harms.__getitem__, [0.5], [0.34, 0.67], ["inherit", "fresh"])
    assert specs[0] == Student(
        width=1.0, depth=0.34, dropped=("layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2")
    )
    assert Student(width=1.0, depth=0.67, dropped=("layer1.0", "layer1.1")) in specs
    assert Student(width=0.5, init="fresh") in specs
    assert len(specs) == len(set(specs)) == 5


def test_no_depths_no_shallow_students() -> None:
    graph, _ = read_model(resnet20(channels=1).eval(), (torch.rand(2, 1, 16, 16),))
    assert student_specs(graph, lambda name: 0.0, [0.5], [], ["inherit"]) == []


def test_a_changed_copy_of_a_plan_has_a_digest_of_its_own() -> None:
    plan = CompressionPlan()
    before = (plan.digest, plan.structure_digest)
    changed = plan.model_copy(update={"recipe": Recipe(steps=7)})
    assert changed.digest != before[0]
    assert changed.structure_digest == before[1]
    assert changed == CompressionPlan(recipe=Recipe(steps=7))
