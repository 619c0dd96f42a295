"""Pruning a graph and its weights: exact values on nets small enough to compute by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.graph.executor import build_module
from autocompress.graph.groups import find_groups
from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.graph.shapes import trace_shapes
from autocompress.plan import ModelGraph
from tests.graphs import GraphMaker, resnet


def two_layers() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """``y = v . relu(w x + b)`` on one pixel: three hidden channels, weights chosen by hand."""
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", (1, 1, 1)), 3, "first", kernel=1))
    maker.conv(hidden, 1, "second", kernel=1)
    graph = maker.build(("image",), ("second_out",))
    maker.weights |= {
        "first.weight": torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1),
        "first.bias": torch.tensor([0.0, 5.0, 1.0]),
        "second.weight": torch.tensor([10.0, 100.0, 1000.0]).view(1, 3, 1, 1),
        "second.bias": torch.tensor([0.5]),
    }
    groups, _ = find_groups(graph, maker.weights, (torch.zeros(2, 1, 1, 1),))
    return graph.model_copy(update={"groups": groups}), maker.weights


def test_two_layers_by_hand() -> None:
    graph, weights = two_layers()
    image = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1)
    whole = build_module(graph, weights)(image).flatten().tolist()
    # x = 2: 10 * 2 + 100 * 3 + 1000 * 5 + 0.5; x = -2: 0 + 100 * 7 + 0 + 0.5
    assert whole == [5320.5, 700.5]
    smaller = rewrite(graph, {"first": 2})
    kept = slice_weights(graph, weights, {"first": torch.tensor([0, 2])})
    assert smaller.tensors["first.weight"].shape == (2, 1, 1, 1)
    assert smaller.tensors["second.weight"].shape == (1, 2, 1, 1)
    assert smaller.tensors["first_out"].shape == (2, 1, 1)
    assert kept["second.weight"].flatten().tolist() == [10.0, 1000.0]
    assert build_module(smaller, kept)(image).flatten().tolist() == [5020.5, 0.5]
    assert (graph.macs(), smaller.macs()) == (6, 4)
    assert (graph.parameters(), smaller.parameters()) == (10, 7)


def test_whole_groups_change_nothing() -> None:
    graph, weights = two_layers()
    assert rewrite(graph, {}) == graph
    assert rewrite(graph, {"first": 3}) == graph
    same = slice_weights(graph, weights, {"first": torch.arange(3)})
    assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_unknown_groups_and_impossible_counts_are_named() -> None:
    graph, _ = two_layers()
    with pytest.raises(UsageError, match=r"'third', which is no group.*'first'"):
        rewrite(graph, {"third": 1})
    for count in (0, 4):
        with pytest.raises(UsageError, match=f"has 3 channels; cannot keep {count}"):
            rewrite(graph, {"first": count})


@pytest.fixture(scope="module")
def small_resnet() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    graph, weights = resnet((4, 6, 8), blocks=2, size=8)
    groups, _ = find_groups(graph, weights, (torch.zeros(2, 1, 8, 8),))
    return graph.model_copy(update={"groups": groups}), weights


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sliced_weights_have_the_shapes_foretold(
    small_resnet: tuple[ModelGraph, dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    graph, weights = small_resnet
    kept = {}
    for group in graph.groups:
        channels = data.draw(st.sets(st.integers(0, group.size - 1), min_size=1), label=group.id)
        kept[group.id] = torch.tensor(sorted(channels))
    smaller = rewrite(graph, {name: len(channels) for name, channels in kept.items()})
    sliced = slice_weights(graph, weights, kept)
    assert {name: tuple(sliced[name].shape) for name in graph.weight_names()} == {
        name: smaller.tensors[name].shape for name in graph.weight_names()
    }
    traced = trace_shapes(smaller, sliced, (torch.zeros(2, 1, 8, 8),))
    assert {name: tensor.shape for name, tensor in traced.items()} == {
        name: smaller.tensors[name].shape for name in traced
    }
    assert smaller.parameters() <= graph.parameters()
    assert smaller.macs() <= graph.macs()


def test_pruning_twice_is_pruning_once(small_resnet: tuple[ModelGraph, dict[str, torch.Tensor]]) -> None:
    graph, weights = small_resnet
    first = {g.id: torch.arange(0, g.size, 2) for g in graph.groups}
    counts = {name: len(channels) for name, channels in first.items()}
    second = {name: torch.arange(count - 1) if count > 1 else torch.arange(1) for name, count in counts.items()}
    halved, halves = rewrite(graph, counts), slice_weights(graph, weights, first)
    twice = slice_weights(halved, halves, second)
    once = slice_weights(graph, weights, {name: first[name][second[name]] for name in first})
    assert all(torch.equal(twice[name], once[name]) for name in graph.weight_names())
    finals = {name: len(channels) for name, channels in second.items()}
    assert rewrite(halved, finals).tensors == rewrite(graph, finals).tensors


def test_shapes_of_layouts_with_the_batch_inside() -> None:
    maker = GraphMaker()
    tokens = maker.input("tokens", (5, 8))
    shape = maker.weight("shape", np.array([-1, 8], dtype=np.int64))
    flat = maker.op("Reshape", (tokens, shape), "flat", (5, 8))
    weight = maker.weight("fc.weight", np.ones((3, 8), dtype=np.float32))
    bias = maker.weight("fc.bias", np.zeros(3, dtype=np.float32))
    maker.op("Gemm", (flat, weight, bias), "logits", (5, 3), name="fc", transB=1)
    turned = maker.op("Transpose", (tokens,), "turned", (5, 8), perm=(1, 0, 2))
    graph = maker.build(("tokens",), ("logits", turned))
    traced = trace_shapes(graph, maker.weights, (torch.zeros(2, 5, 8),))
    assert traced["flat"].shape == (5, 8)  # 5 * batch rows
    assert traced["logits"].shape == (5, 3)
    assert traced["turned"].shape == (5, 8)
    assert graph.macs() == 5 * 3 * 8
