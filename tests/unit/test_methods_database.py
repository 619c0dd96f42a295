"""Saliency of channels, and candidates stitched from a database of layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autocompress.graph.executor import build_module
from autocompress.graph.groups import find_groups
from autocompress.methods import linear, saliency, statistics
from autocompress.methods.database import LayerDatabase
from autocompress.methods.linear import damped, damped_inverse, refit
from autocompress.methods.saliency import _SecondOrder
from autocompress.methods.simulation import build_compressed
from autocompress.methods.statistics import collect
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, CompressionPlan, LayerPlan, ModelGraph
from tests.graphs import GraphMaker, resnet

Weights = dict[str, torch.Tensor]


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def grouped(maker: GraphMaker, output: str) -> ModelGraph:
    graph = maker.build(("image",), (output,))
    example = (torch.zeros(2, *graph.tensors["image"].shape),)
    return graph.model_copy(update={"groups": find_groups(graph, maker.weights, example)[0]})


def database(graph: ModelGraph, weights: Weights, count: int = 64) -> LayerDatabase:
    data = images(count, graph.tensors["image"].shape)
    return LayerDatabase(graph, weights, collect(build_module(graph, weights), [(data,)], seed=0))


@pytest.fixture(scope="module")
def small() -> tuple[ModelGraph, Weights, LayerDatabase]:
    graph, weights = resnet((8, 12, 16), blocks=1, size=8)
    groups, _ = find_groups(graph, weights, (torch.zeros(2, 1, 8, 8),))
    graph = graph.model_copy(update={"groups": groups})
    return graph, weights, database(graph, weights)


def brute_force(full: torch.Tensor, hessian: torch.Tensor, gone: list[int]) -> float:
    """The rise of the (damped) squared error when columns go and the others are fitted anew."""
    matrix = damped(hessian)
    kept = torch.tensor([c for c in range(full.shape[1]) if c not in gone])
    fitted = torch.zeros_like(full, dtype=matrix.dtype)
    fitted[:, kept] = refit(full, hessian, kept)
    difference = full.to(matrix.dtype) - fitted
    return float(((difference @ matrix) * difference).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_costs_are_what_the_best_refit_loses(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    whole = torch.cat([inputs, torch.ones(200, 1)], dim=1)
    hessian, full = whole.t() @ whole / 200, torch.randn(4, 13, generator=generator)
    state = _SecondOrder(full[:, :12].double(), damped_inverse(hessian)[:12, :12].clone(), width, 1.0)
    channels = [list(range(c * width, (c + 1) * width)) for c in range(12 // width)]
    expected = [brute_force(full, hessian, columns) for columns in channels]
    torch.testing.assert_close(state.costs(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    # Once two have left, what each of the others would cost on top.
    gone = torch.tensor([1, 3])
    keep = torch.tensor([c not in (1, 3) for c in range(12 // width)])
    state.remove(gone, keep)
    left = channels[1] + channels[3]
    base = brute_force(full, hessian, left)
    expected = [brute_force(full, hessian, left + c) - base for i, c in enumerate(channels) if i not in (1, 3)]
    torch.testing.assert_close(state.costs(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-5)


def test_dead_and_doubled_channels_leave_first() -> None:
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", (2, 6, 6)), 6, "first"))
    maker.head(maker.conv(hidden, 4, "second"), 3, "logits")
    for part in ("weight", "bias"):
        maker.weights[f"first.{part}"][4] = maker.weights[f"first.{part}"][1]
        maker.weights[f"first.{part}"][2] = 0.0
    order = database(grouped(maker, "logits"), maker.weights).orders["first"].tolist()
    assert order[-1] == 2
    assert order[-2] in (1, 4)
    assert sorted(order) == list(range(6))


def test_many_channels_leave_in_steps_in_nearly_the_same_order(
    small: tuple[ModelGraph, Weights, LayerDatabase], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, weights, exact = small
    monkeypatch.setattr(saliency, "EXACT_WORK", 16 * 144 // 4)
    orders = saliency.channel_orders(graph, weights, exact.statistics)
    assert any(not torch.equal(orders[name], exact.orders[name]) for name in orders)
    for name, order in orders.items():
        half = len(order) // 2
        assert sorted(order.tolist()) == list(range(len(order)))
        shared = set(order[:half].tolist()) & set(exact.orders[name][:half].tolist())
        assert len(shared) >= 0.7 * half


def test_a_copy_can_leave_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "DAMPING", 1e-8)
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", (2, 6, 6)), 5, "first"))
    maker.head(maker.conv(hidden, 4, "second"), 3, "logits")
    for part in ("weight", "bias"):
        maker.weights[f"first.{part}"][3] = 2.0 * maker.weights[f"first.{part}"][1]
    graph = grouped(maker, "logits")
    found = database(graph, maker.weights)
    compressed = found.stitch(CompressionPlan(groups={"first": 4}))
    image = images(4, (2, 6, 6), seed=9)
    expected = build_module(graph, maker.weights)(image)
    torch.testing.assert_close(build_compressed(compressed)(image), expected, rtol=1e-3, atol=1e-3)
    plain = {**compressed.weights, "second.weight": maker.weights["second.weight"][:, found.kept("first", 4)]}
    worse = build_module(compressed.graph, plain)(image)
    assert (worse - expected).abs().max() > 0.05


def test_an_empty_plan_gives_the_original_to_the_bit(small: tuple[ModelGraph, Weights, LayerDatabase]) -> None:
    graph, weights, found = small
    for groups in ({}, {group.id: group.size for group in graph.groups}):
        compressed = found.stitch(CompressionPlan(groups=groups))
        assert compressed.graph == graph
        assert all(torch.equal(compressed.weights[name], weights[name]) for name in graph.weight_names())
        assert not compressed.weight_scales
        assert not compressed.ranges


@pytest.mark.parametrize("storage", [INT8_WEIGHT, INT4_WEIGHT])
def test_stitched_models_keep_to_their_plan(small: tuple[ModelGraph, Weights, LayerDatabase], storage) -> None:  # type: ignore[no-untyped-def]
    graph, _, found = small
    layers = {layer.name: LayerPlan(compute="int8", storage=storage) for layer in graph.compressible}
    plan = CompressionPlan(groups={g.id: g.size // 2 for g in graph.groups}, layers=layers)
    compressed = found.stitch(plan)
    for name in graph.weight_names():
        assert tuple(compressed.weights[name].shape) == compressed.graph.tensors[name].shape
    top = 127 if storage.bits == 8 else 8
    for layer in compressed.graph.compressible:
        scale = compressed.weight_scales[layer.name]
        integers = compressed.weights[layer.inputs[1]].flatten(1) / scale[:, None]
        assert scale.shape == (compressed.graph.tensors[layer.inputs[1]].shape[0],)
        assert float((integers - integers.round()).abs().max()) < 1e-3
        assert float(integers.abs().max()) <= top + 1e-3
    assert set(compressed.ranges) == set(compressed.plan.activations) != set()
    rows = found.kept_outputs(plan)
    assert {name: len(kept) for name, kept in rows.items()} == {
        layer.name: compressed.graph.tensors[layer.inputs[1]].shape[0] for layer in compressed.graph.compressible
    }
    again = found.stitch(plan)
    assert all(torch.equal(again.weights[name], value) for name, value in compressed.weights.items())


def test_wider_is_nearer(small: tuple[ModelGraph, Weights, LayerDatabase]) -> None:
    graph, weights, found = small
    image = images(64, (1, 8, 8), seed=5)
    wanted = build_module(graph, weights)(image)
    errors = []
    for share in (0.25, 0.5, 0.75):
        compressed = found.stitch(CompressionPlan(groups={g.id: int(g.size * share) for g in graph.groups}))
        errors.append(float((build_compressed(compressed)(image) - wanted).square().mean().detach()))
    assert errors[0] > errors[1] > errors[2]


def test_depthwise_grouped_and_flattened_layers() -> None:
    maker = GraphMaker()
    wide = maker.relu(maker.conv(maker.input("image", (2, 6, 6)), 8, "expand", kernel=1))
    deep = maker.relu(maker.conv(wide, 8, "depthwise", group=8))
    cut = maker.relu(maker.conv(deep, 6, "reduce", kernel=1))
    some = maker.relu(maker.conv(cut, 6, "grouped", group=3))
    flat = maker.op("Flatten", (maker.conv(some, 4, "last", stride=2),), "flat", (36,))
    maker.gemm(flat, 3, "fc", "logits")
    graph = grouped(maker, "logits")
    assert {g.id: g.size for g in graph.groups} == {"expand": 8, "reduce": 3, "last": 4}
    found = database(graph, maker.weights)
    layers = {layer.name: LayerPlan(compute="int8", storage=INT4_WEIGHT) for layer in graph.compressible}
    compressed = found.stitch(CompressionPlan(groups={"expand": 5, "reduce": 2, "last": 3}, layers=layers))
    assert compressed.graph.by_name["depthwise"].attributes["group"] == 5
    assert compressed.graph.by_name["grouped"].attributes["group"] == 2
    assert compressed.graph.tensors["fc.weight"].shape == (3, 27)
    assert build_compressed(compressed)(images(2, (2, 6, 6))).shape == (2, 3)


def test_layers_that_read_several_groups() -> None:
    maker = GraphMaker()
    image = maker.input("image", (2, 6, 6))
    parts = (maker.conv(image, 4, "left"), maker.conv(image, 6, "right"))
    both = maker.relu(maker.op("Concat", parts, "both", (10, 6, 6), axis=1))
    maker.head(maker.conv(both, 4, "after"), 3, "logits")
    found = database(grouped(maker, "logits"), maker.weights)
    compressed = found.stitch(CompressionPlan(groups={"left": 2, "right": 5}))
    assert compressed.graph.tensors["after.weight"].shape == (4, 7, 3, 3)
    assert build_compressed(compressed)(images(2, (2, 6, 6))).shape == (2, 3)


def test_very_wide_layers_are_made_up_for_by_their_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "WIDEST", 10)
    maker = GraphMaker()
    features = maker.relu(maker.conv(maker.input("image", (2, 6, 6)), 4, "conv"))
    maker.gemm(maker.op("Flatten", (features,), "flat", (144,)), 3, "fc", "logits")
    maker.weights["conv.weight"][2] = 0.0
    maker.weights["conv.bias"][2] = 3.0  # a constant: its part in the output can stand in the bias
    graph = grouped(maker, "logits")
    found = database(graph, maker.weights)
    assert set(found.statistics.moments) == {"conv", "fc"}
    assert found.orders["conv"].tolist()[-1] == 2
    image = images(3, (2, 6, 6), seed=4)
    given = build_compressed(found.stitch(CompressionPlan(groups={"conv": 3})))(image)
    torch.testing.assert_close(given, build_module(graph, maker.weights)(image), rtol=1e-3, atol=1e-3)
    rounded = found.stitch(CompressionPlan(layers={"fc": LayerPlan(compute="int8", storage=INT4_WEIGHT)}))
    assert set(rounded.weight_scales) == {"fc"}


def test_products_of_tokens_have_no_bias_of_their_own() -> None:
    maker = GraphMaker()
    tokens = maker.input("image", (5, 8))
    rng = np.random.default_rng(0)
    up = maker.weight("up.weight", rng.standard_normal((8, 6)).astype(np.float32))
    shift = maker.weight("up.bias", rng.standard_normal(6).astype(np.float32))
    hidden = maker.relu(
        maker.op("Add", (maker.op("MatMul", (tokens, up), "up_out", (5, 6), name="up"), shift), "b", (5, 6))
    )
    down = maker.weight("down.weight", rng.standard_normal((6, 3)).astype(np.float32))
    maker.op("MatMul", (hidden, down), "logits", (5, 3), name="down")
    graph = grouped(maker, "logits")
    found = database(graph, maker.weights)
    compressed = found.stitch(
        CompressionPlan(groups={"up": 4}, layers={"down": LayerPlan(compute="int8", storage=INT8_WEIGHT)})
    )
    assert compressed.weights["up.bias"].shape == (4,)
    assert compressed.weights["down.weight"].shape == (4, 3)
    assert compressed.weight_scales["down"].shape == (3,)
    assert build_compressed(compressed)(images(2, (5, 8))).shape == (2, 5, 3)
