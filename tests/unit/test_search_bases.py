"""Which students a search builds, and in which order it tries them."""

from __future__ import annotations

from autocompress.plan import CompressionPlan, Recipe, Student
from autocompress.search.bases import fresh_specs, shallow_specs


def test_the_least_harmful_blocks_leave_first_and_the_shallowest_comes_first() -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)][:7]
    specs = shallow_specs(blocks, [0.67, 0.34, 0.0, 0.35])
    assert [len(spec.dropped) for spec in specs] == [7, 5, 2]
    assert specs[1] == Student(
        width=1.0, depth=1 - 5 / 7, dropped=("layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1")
    )


def test_no_blocks_no_shallow_students() -> None:
    assert shallow_specs([], [0.0, 0.5]) == []
    assert shallow_specs(["layer1.0"], []) == []
    assert shallow_specs(["layer1.0"], [1.0]) == []


def test_fresh_students_come_widest_first() -> None:
    assert [spec.width for spec in fresh_specs([0.25, 0.5])] == [0.5, 0.25]
    assert all(spec.init == "fresh" for spec in fresh_specs([0.25, 0.5]))


def test_a_changed_copy_of_a_plan_has_a_digest_of_its_own() -> None:
    plan = CompressionPlan()
    before = (plan.digest, plan.structure_digest)
    changed = plan.model_copy(update={"recipe": Recipe(steps=7)})
    assert changed.digest != before[0]
    assert changed.structure_digest == before[1]
    assert changed == CompressionPlan(recipe=Recipe(steps=7))
