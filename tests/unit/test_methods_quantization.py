"""Which activations are held in 8 bits, over which ranges, and the arithmetic of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.methods.quantization import (
    activation_formats,
    affine_parameters,
    assign_ranges,
    fused_output,
    weight_axis,
)
from autocompress.methods.simulation import activation_tap
from autocompress.plan import INT8_WEIGHT, UINT8_ACTIVATION, Layer, LayerPlan, ModelGraph
from tests.graphs import GraphMaker

INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
STORED = LayerPlan(compute="fp32", storage=INT8_WEIGHT)


@pytest.fixture
def graph() -> ModelGraph:
    maker = GraphMaker()
    stem = maker.relu(maker.conv(maker.input("image", (1, 8, 8)), 4, "stem"))
    inner = maker.conv(maker.relu(maker.conv(stem, 4, "a")), 4, "b")
    joined = maker.relu(maker.add(inner, stem, "sum"))
    maker.head(maker.max_pool(joined, "pool"), 3, "logits")
    return maker.build(("image",), ("logits",))


def test_an_activation_behind_a_layer_belongs_to_it(graph: ModelGraph) -> None:
    assert fused_output(graph, graph.by_name["stem"]) == "stem_out_relu"
    assert fused_output(graph, graph.by_name["b"]) == "b_out"
    assert fused_output(graph, graph.by_name["fc"]) == "logits"


def test_formats_follow_the_layers(graph: ModelGraph) -> None:
    assert activation_formats(graph, {}) == {}
    assert activation_formats(graph, {"a": STORED}) == {}
    alone = activation_formats(graph, {"a": INT8})
    assert set(alone) == {"stem_out_relu", "a_out_relu"}
    assert set(alone.values()) == {UINT8_ACTIVATION}
    every = activation_formats(graph, {name: INT8 for name in ("stem", "a", "b", "fc")})
    assert set(every) == {
        "image", "stem_out_relu", "a_out_relu", "b_out", "sum_relu", "pool", "pooled", "flat",
    }  # fmt: skip
    # The sum of an int8 and a float tensor is float, and so is what follows.
    mixed = activation_formats(graph, {"a": INT8, "fc": INT8})
    assert not {"sum_relu", "pool", "pooled"} & set(mixed)


def test_a_constant_operand_has_no_integer_kernel() -> None:
    maker = GraphMaker()
    hidden = maker.conv(maker.input("image", (1, 4, 4)), 2, "conv")
    half = maker.weight("half", torch.tensor(0.5).numpy())
    maker.conv(maker.op("Mul", (hidden, half), "halved", (2, 4, 4)), 2, "last")
    graph = maker.build(("image",), ("last_out",))
    assert set(activation_formats(graph, {"conv": INT8})) == {"image", "conv_out"}


def test_ranges_pass_through_what_only_moves_values(graph: ModelGraph) -> None:
    chosen = {"image": (-1.0, 1.0), "b_out": (-2.0, 3.0), "sum_relu": (-0.5, 4.0)}
    formats = activation_formats(graph, {name: INT8 for name in ("stem", "a", "b", "fc")})
    ranges = assign_ranges(graph, formats, lambda name: chosen.get(name, (-9.0, 9.0)))
    assert ranges["image"] == (-1.0, 1.0)
    assert ranges["b_out"] == (-2.0, 3.0)
    assert ranges["sum_relu"] == ranges["pool"] == (0.0, 4.0)  # behind a Relu nothing is negative
    assert ranges["pooled"] == ranges["flat"] == (-9.0, 9.0)  # an average has a range of its own
    assert list(ranges) == sorted(formats)
    never = assign_ranges(graph, ["stem_out_relu"], lambda _: (-5.0, -1.0))
    assert never == {"stem_out_relu": (0.0, 1e-6)}


@settings(max_examples=100, deadline=None)
@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4))
def test_zero_is_held_exactly_and_the_range_covered(low: float, width: float) -> None:
    high = low + width
    scale, zero = affine_parameters(low, high)
    assert 0 <= zero <= 255
    assert scale > 0
    assert (0 - zero) * scale <= min(low, 0.0) + 0.51 * scale
    assert (255 - zero) * scale >= max(high, 0.0) - 0.51 * scale


@settings(max_examples=30, deadline=None)
@given(low=st.floats(-10, 0), high=st.floats(0.1, 10), seed=st.integers(0, 50))
def test_the_tap_of_training_is_the_tap_of_inference(low: float, high: float, seed: int) -> None:
    value = 8 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    tap = activation_tap(low, high)
    trained = value.clone().requires_grad_()
    tap(trained).sum().backward()
    with torch.no_grad():
        plain = tap(value.clone())
        again = tap(plain.clone())
        difference = (tap(trained.detach()) - tap(value)).abs().max()
    scale, zero = affine_parameters(low, high)
    inside = value.clamp(-zero * scale, (255 - zero) * scale)
    assert float((plain - inside).abs().max()) <= 0.5001 * scale + 1e-6
    torch.testing.assert_close(again, plain)
    assert float(difference) == 0.0
    assert trained.grad is not None
    assert bool((trained.grad[(value - inside).abs() < 1e-6] == 1).all())
    assert bool((trained.grad[(value - inside).abs() > scale] == 0).all())


def test_inference_leaves_its_input_alone() -> None:
    value = torch.randn(10)
    before = value.clone()
    with torch.no_grad():
        activation_tap(-1.0, 1.0)(value)
    assert torch.equal(value, before)


def test_axes_of_output_channels() -> None:
    def layer(op: str, **attributes: int) -> Layer:
        return Layer(name="l", op=op, inputs=("x", "w"), outputs=("y",), weights=("w",), attributes=dict(attributes))

    assert [weight_axis(layer(op)) for op in ("Conv", "Gemm", "MatMul")] == [0, 1, 1]
    assert weight_axis(layer("Gemm", transB=1)) == 0
