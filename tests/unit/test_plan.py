"""The vocabulary: values that cannot change, and survive JSON."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autocompress.plan import (
    INT4_WEIGHT,
    INT8_WEIGHT,
    UINT8_ACTIVATION,
    CompressionPlan,
    Estimate,
    Group,
    Layer,
    LayerPlan,
    Measurement,
    Member,
    ModelGraph,
    Original,
    Quantity,
    Recipe,
    Student,
    Tensor,
    digest_of,
    is_weight_layer,
    layer_macs,
)
from tests.graphs import resnet

names = st.text("abc.012", min_size=1, max_size=8)
formats = st.sampled_from([INT8_WEIGHT, INT4_WEIGHT, UINT8_ACTIVATION])
plans = st.builds(
    CompressionPlan,
    base=st.one_of(
        st.just(Original()),
        st.builds(Student, width=st.floats(0.1, 1.0), init=st.sampled_from(["inherit", "fresh"])),
    ),
    groups=st.dictionaries(names, st.integers(1, 512), max_size=4),
    layers=st.dictionaries(
        names, st.builds(LayerPlan, compute=st.sampled_from(["fp32", "int8"]), storage=formats), max_size=4
    ),
    activations=st.dictionaries(names, formats, max_size=4),
    recipe=st.builds(Recipe, steps=st.integers(0, 10**6), alpha=st.floats(0, 1)),
)


@given(plans)
def test_plans_survive_json_with_their_digests(plan: CompressionPlan) -> None:
    again = CompressionPlan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert (again.digest, again.structure_digest, again.shape_digest) == (
        plan.digest,
        plan.structure_digest,
        plan.shape_digest,
    )


@given(plans)
def test_digests_tell_apart_what_they_should(plan: CompressionPlan) -> None:
    trained = plan.model_copy(update={"recipe": Recipe(steps=plan.recipe.steps + 1)})
    assert trained.digest != plan.digest
    assert trained.structure_digest == plan.structure_digest
    formatted = plan.model_copy(update={"layers": {**plan.layers, "new": LayerPlan()}})
    assert formatted.structure_digest != plan.structure_digest
    assert formatted.shape_digest == plan.shape_digest
    narrower = plan.model_copy(update={"groups": {**plan.groups, "new": 3}})
    assert narrower.shape_digest != plan.shape_digest


def test_digests_do_not_depend_on_order_or_on_the_process() -> None:
    first = CompressionPlan(groups={"a": 1, "b": 2}, layers={"x": LayerPlan(), "y": LayerPlan(compute="int8")})
    second = CompressionPlan(groups={"b": 2, "a": 1}, layers={"y": LayerPlan(compute="int8"), "x": LayerPlan()})
    assert first.digest == second.digest
    code = "from autocompress.plan import CompressionPlan as P; print(P(groups={'b': 2, 'a': 1}).digest)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == CompressionPlan(groups={"a": 1, "b": 2}).digest
    assert len(found) == 16
    assert digest_of({"b": 1, "a": [1, 2]}) == digest_of({"a": [1, 2], "b": 1})


def test_values_cannot_change_and_have_no_unknown_fields() -> None:
    plan = CompressionPlan()
    with pytest.raises(ValidationError, match="frozen"):
        plan.version = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        CompressionPlan(width=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="int16"):
        LayerPlan(compute="int16")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="teacher"):
        CompressionPlan.model_validate({"base": {"kind": "teacher"}})
    assert CompressionPlan.model_validate({"base": {"kind": "student", "width": 0.5}}).base == Student(width=0.5)


def test_graphs_survive_json() -> None:
    graph, _ = resnet((4, 6, 8), blocks=1, size=8)
    member = Member(tensor="conv1.weight", axis=0, role="out")
    group = Group(id="conv1", kind="channel", size=4, members=(member,))
    graph = graph.model_copy(update={"groups": (group,), "skipped": {"fc": "the output"}})
    again = ModelGraph.model_validate_json(graph.model_dump_json())
    assert again == graph
    assert again.macs() == graph.macs()


def test_a_graph_knows_its_neighbours() -> None:
    graph, _ = resnet((4, 6, 8), blocks=1, size=8)
    block = graph.by_name["layer1.0.conv1"]
    (source,) = block.activations
    assert graph.producers[block.outputs[0]] is block
    assert {layer.name for layer in graph.consumers[source]} == {"layer1.0.conv1", "layer1.0.add"}
    assert [graph.compressible[0].name, graph.compressible[-1].name] == ["conv1", "fc"]
    assert len(set(graph.weight_names())) == len(list(graph.weight_names())) == 20
    assert all(is_weight_layer(layer) for layer in graph.compressible)
    assert not is_weight_layer(graph.by_name["layer1.0.add"])


def test_multiply_accumulates_by_hand() -> None:
    def layer(
        op: str, weight: tuple[int, ...], source: tuple[int, ...], out: tuple[int, ...], stored: bool = True
    ) -> int:
        tensors = {n: Tensor(id=n, shape=s) for n, s in (("w", weight), ("x", source), ("y", out))}
        found = Layer(name="l", op=op, inputs=("x", "w"), outputs=("y",), weights=("w",) if stored else ())
        return layer_macs(ModelGraph(layers=(found,), tensors=tensors, inputs=("x",), outputs=("y",)), found)

    assert layer("Conv", (8, 3, 3, 3), (3, 10, 10), (8, 10, 10)) == 8 * 100 * 27
    assert layer("Conv", (8, 1, 3, 3), (8, 10, 10), (8, 5, 5)) == 8 * 25 * 9
    assert layer("Gemm", (10, 64), (64,), (10,)) == 640
    assert layer("MatMul", (64, 32), (7, 64), (7, 32)) == 7 * 64 * 32
    assert layer("MatMul", (2, 5, 7), (2, 7, 5), (2, 7, 7), stored=False) == 2 * 7 * 7 * 5
    assert layer("Add", (8,), (8,), (8,)) == 0


def test_estimates_and_measurements_survive_json() -> None:
    estimate = Estimate(target="local", costs={"latency_ms": Quantity(value=1, low=0.9, high=1.2, source="fitted")})
    assert Estimate.model_validate_json(estimate.model_dump_json()) == estimate
    measurement = Measurement(quality=0.9, interval=(0.88, 0.92), fidelity="short", seed=1, seconds=2.0)
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement
