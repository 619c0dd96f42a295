"""Which channels are found to leave together, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import torch

from autocompress.graph.executor import build_module
from autocompress.graph.groups import find_groups
from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.plan import Group, Member, ModelGraph
from tests.graphs import GraphMaker

IMAGE = (2, 8, 8)


def found(maker: GraphMaker, source: str, output: str) -> tuple[ModelGraph, dict[str, str]]:
    graph = maker.build((source,), (output,))
    groups, skipped = find_groups(graph, maker.weights, (torch.zeros(2, *graph.tensors[source].shape),))
    return graph.model_copy(update={"groups": groups, "skipped": skipped}), skipped


def group(graph: ModelGraph, name: str) -> Group:
    return next(g for g in graph.groups if g.id == name)


def member(graph: ModelGraph, name: str, tensor: str, axis: int = 0) -> Member:
    return next(m for m in group(graph, name).members if m.tensor == tensor and m.axis == axis)


def assert_prunable(graph: ModelGraph, weights: dict[str, torch.Tensor]) -> None:
    """Every group runs with few of its channels, has the shapes that were foretold, and forgets only those channels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *graph.tensors[graph.inputs[0]].shape, generator=generator)
    assert graph.groups
    for target in graph.groups:
        keep = torch.randperm(target.size, generator=generator)[: max(1, target.size // 2)].sort().values
        smaller = rewrite(graph, {target.id: len(keep)})
        module = build_module(smaller, slice_weights(graph, weights, {target.id: keep}))
        shapes: dict[str, tuple[int, ...]] = {}

        def record(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> object:
            return lambda value: shapes.__setitem__(name, tuple(value.shape[1:])) or value

        names = [out for layer in smaller.layers for out in layer.outputs]
        module.taps = {name: record(name) for name in names}  # type: ignore[misc]
        with torch.no_grad():
            given = module(image)
            expected = build_module(graph, blinded(target, keep, weights))(image)
        assert shapes == {name: smaller.tensors[name].shape for name in names}
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def blinded(target: Group, keep: torch.Tensor, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model's weights, whose readers of the group see nothing of the channels that leave."""
    result = dict(weights)
    gone = torch.tensor([c for c in range(target.size) if c not in keep.tolist()])
    for place in target.members:
        if place.role == "in":
            columns = place.offset + gone[:, None] * place.repeat + torch.arange(place.repeat)
            result[place.tensor] = result[place.tensor].index_fill(place.axis, columns.flatten(), 0.0)
    return result


def test_chain_of_two_convolutions() -> None:
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", IMAGE), 6, "first"))
    maker.head(maker.conv(hidden, 4, "second"), 3, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert [(g.id, g.size) for g in graph.groups] == [("first", 6), ("second", 4)]
    assert member(graph, "first", "first.weight").role == "out"
    assert member(graph, "first", "second.weight", 1).role == "in"
    assert member(graph, "first", "first_out").role == "activation"
    assert skipped == {"fc": "channels cannot be pruned: they are the model's output"}
    assert_prunable(graph, maker.weights)


def test_residual_stream_is_one_group() -> None:
    maker = GraphMaker()
    stem = maker.relu(maker.conv(maker.input("image", IMAGE), 6, "stem"))
    inner = maker.relu(maker.conv(stem, 5, "inner"))
    joined = maker.relu(maker.add(maker.conv(inner, 6, "outer"), stem, "sum"))
    maker.head(joined, 3, "logits")
    graph, _ = found(maker, "image", "logits")
    assert [(g.id, g.size) for g in graph.groups] == [("stem", 6), ("inner", 5)]
    out = {m.tensor for m in group(graph, "stem").members if m.role == "out"}
    assert out == {"stem.weight", "stem.bias", "outer.weight", "outer.bias"}
    read = {m.tensor for m in group(graph, "stem").members if m.role == "in"}
    assert read == {"inner.weight", "fc.weight"}
    assert_prunable(graph, maker.weights)


def test_concat_gives_each_part_its_offset() -> None:
    maker = GraphMaker()
    image = maker.input("image", IMAGE)
    left, right = maker.conv(image, 4, "left"), maker.conv(image, 6, "right")
    both = maker.op("Concat", (left, right), "both", (10, 8, 8), axis=1)
    maker.head(maker.conv(maker.relu(both), 3, "after"), 2, "logits")
    graph, _ = found(maker, "image", "logits")
    assert member(graph, "left", "after.weight", 1).offset == 0
    assert member(graph, "right", "after.weight", 1).offset == 4
    assert member(graph, "right", "both").offset == 4
    assert_prunable(graph, maker.weights)


def test_standalone_norm_behind_a_concat_is_shared_by_both_parts() -> None:
    maker = GraphMaker()
    image = maker.input("image", IMAGE)
    both = maker.op("Concat", (maker.conv(image, 4, "left"), maker.conv(image, 6, "right")), "both", (10, 8, 8), axis=1)
    values = {"scale": 0.5, "shift": 0.1, "mean": 0.2, "var": 1.5}
    norm = [maker.weight(f"norm.{k}", (v + np.arange(10) / 10).astype(np.float32)) for k, v in values.items()]
    normed = maker.op("BatchNormalization", (both, *norm), "normed", (10, 8, 8), epsilon=1e-5)
    maker.head(maker.conv(normed, 3, "after"), 2, "logits")
    graph, _ = found(maker, "image", "logits")
    for name in norm:
        assert member(graph, "left", name).offset == 0
        assert (member(graph, "right", name).offset, member(graph, "right", name).role) == (4, "through")
    assert_prunable(graph, maker.weights)


def test_flatten_repeats_channels() -> None:
    maker = GraphMaker()
    features = maker.conv(maker.input("image", IMAGE), 4, "conv", stride=2)
    flat = maker.op("Flatten", (features,), "flat", (64,))
    maker.gemm(flat, 3, "fc", "logits")
    graph, _ = found(maker, "image", "logits")
    assert member(graph, "conv", "fc.weight", 1).repeat == 16
    assert member(graph, "conv", "flat").repeat == 16
    assert_prunable(graph, maker.weights)


def test_depthwise_convolution_is_passed_through() -> None:
    maker = GraphMaker()
    wide = maker.relu(maker.conv(maker.input("image", IMAGE), 8, "expand", kernel=1))
    deep = maker.relu(maker.conv(wide, 8, "depthwise", group=8))
    maker.head(maker.conv(deep, 4, "project", kernel=1), 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert [g.id for g in graph.groups] == ["expand", "project"]
    assert member(graph, "expand", "depthwise.weight").role == "through"
    assert rewrite(graph, {"expand": 3}).by_name["depthwise"].attributes["group"] == 3
    assert set(skipped) == {"fc"}
    assert_prunable(graph, maker.weights)


def test_grouped_convolution_loses_whole_groups() -> None:
    maker = GraphMaker()
    wide = maker.relu(maker.conv(maker.input("image", IMAGE), 12, "expand", kernel=1))
    grouped = maker.relu(maker.conv(wide, 12, "grouped", group=4))
    maker.head(maker.conv(grouped, 4, "project", kernel=1), 2, "logits")
    graph, _ = found(maker, "image", "logits")
    assert group(graph, "expand").size == 4
    assert member(graph, "expand", "project.weight", 1).repeat == 3
    assert rewrite(graph, {"expand": 2}).by_name["grouped"].attributes["group"] == 2
    assert_prunable(graph, maker.weights)


def test_scale_a_channel_and_squeeze_excitation() -> None:
    maker = GraphMaker()
    features = maker.conv(maker.input("image", IMAGE), 6, "conv")
    scale = maker.weight("scale", np.linspace(0.5, 2, 6, dtype=np.float32).reshape(6, 1, 1))
    scaled = maker.op("Mul", (scale, features), "scaled", (6, 8, 8))
    pooled = maker.op("GlobalAveragePool", (scaled,), "squeezed", (6, 1, 1))
    gate = maker.conv(maker.relu(maker.conv(pooled, 3, "se.down", kernel=1)), 6, "se.up", kernel=1)
    gated = maker.op("Mul", (maker.op("Sigmoid", (gate,), "gate", (6, 1, 1)), scaled), "gated", (6, 8, 8))
    maker.head(gated, 2, "logits")
    graph, _ = found(maker, "image", "logits")
    assert [(g.id, g.size) for g in graph.groups] == [("conv", 6), ("se.down", 3)]
    assert member(graph, "conv", "scale").role == "through"
    assert {m.tensor for m in group(graph, "conv").members if m.role == "out"} >= {"conv.weight", "se.up.weight"}
    assert_prunable(graph, maker.weights)


def test_what_is_broadcast_over_channels_does_not_tie_them() -> None:
    maker = GraphMaker()
    features = maker.relu(maker.conv(maker.input("image", IMAGE), 6, "conv"))
    where = maker.op("Sigmoid", (maker.conv(features, 1, "attention"),), "where", (1, 8, 8))
    half = maker.weight("half", np.array(0.5, dtype=np.float32))
    seen = maker.op("Mul", (maker.op("Mul", (features, where), "seen", (6, 8, 8)), half), "halved", (6, 8, 8))
    maker.head(seen, 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert [(g.id, g.size) for g in graph.groups] == [("conv", 6)]
    assert "fewer than two" in skipped["attention"]
    assert_prunable(graph, maker.weights)


def test_a_split_that_picks_channels_by_number_keeps_them() -> None:
    maker = GraphMaker()
    features = maker.conv(maker.input("image", IMAGE), 6, "conv")
    sizes = maker.weight("sizes", np.array([3, 3], dtype=np.int64))
    first = maker.op("Split", (features, sizes), "first", (3, 8, 8), axis=1)
    layers, tensors = maker.layers, maker.tensors
    layers[-1] = layers[-1].model_copy(update={"outputs": ("first", "second")})
    tensors["second"] = tensors["first"].model_copy(update={"id": "second"})
    maker.head(maker.add(first, "second", "sum"), 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert not graph.groups
    assert "Split" in skipped["conv"]


def test_interleaved_channels_are_refused_with_the_reason() -> None:
    maker = GraphMaker()
    features = maker.conv(maker.input("image", IMAGE), 4, "conv")
    shape = maker.weight("shape", np.array([-1, 2, 2, 8, 8], dtype=np.int64))
    back = maker.weight("back", np.array([-1, 4, 8, 8], dtype=np.int64))
    split = maker.op("Reshape", (features, shape), "split", (2, 2, 8, 8))
    shuffled = maker.op("Transpose", (split,), "shuffled", (2, 2, 8, 8), perm=(0, 2, 1, 3, 4))
    joined = maker.op("Reshape", (shuffled, back), "joined", (4, 8, 8))
    maker.head(maker.conv(joined, 3, "after"), 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert [g.id for g in graph.groups] == ["after"]
    assert "channels cannot be pruned" in skipped["conv"]


def test_channels_tied_to_two_producers_in_part_are_refused() -> None:
    maker = GraphMaker()
    image = maker.input("image", IMAGE)
    both = maker.op("Concat", (maker.conv(image, 4, "left"), maker.conv(image, 4, "right")), "both", (8, 8, 8), axis=1)
    total = maker.add(both, maker.conv(image, 8, "wide"), "total")
    maker.head(total, 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert not graph.groups
    assert "only some of them" in skipped["left"]


def test_weights_used_twice_keep_their_channels() -> None:
    maker = GraphMaker()
    once = maker.relu(maker.conv(maker.input("image", (4, 8, 8)), 4, "conv"))
    layer = maker.layers[0]
    maker.tensors["again"] = maker.tensors["conv_out"].model_copy(update={"id": "again"})
    again = layer.model_copy(
        update={"name": "conv/2", "inputs": (once, *layer.inputs[1:]), "outputs": ("again",), "shared_with": ("conv",)}
    )
    maker.layers.append(again)
    maker.head("again", 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert not graph.groups
    assert "used more than once" in skipped["conv"]


def test_layer_norm_and_tokens() -> None:
    maker = GraphMaker()
    tokens = maker.input("tokens", (5, 8))
    up = maker.weight("up.weight", np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
    bias = maker.weight("up.bias", np.ones(6, dtype=np.float32))
    hidden = maker.op("MatMul", (tokens, up), "hidden", (5, 6), name="up")
    hidden = maker.op("Add", (hidden, bias), "biased", (5, 6))
    scale = [maker.weight(f"norm.{k}", np.ones(6, dtype=np.float32)) for k in ("weight", "bias")]
    normed = maker.op("LayerNormalization", (hidden, *scale), "normed", (5, 6), epsilon=1e-5)
    down = maker.weight("down.weight", np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32))
    maker.op("MatMul", (normed, down), "logits", (5, 3), name="down")
    graph, _ = found(maker, "tokens", "logits")
    places = {(m.tensor, m.axis, m.role) for m in group(graph, "up").members}
    assert {("up.weight", 1, "out"), ("up.bias", 0, "through"), ("norm.weight", 0, "through")} <= places
    assert ("down.weight", 0, "in") in places
    assert ("normed", 1, "activation") in places


def test_a_group_that_does_not_run_smaller_is_refused() -> None:
    maker = GraphMaker()
    features = maker.conv(maker.input("image", IMAGE), 4, "conv")
    shape = maker.weight("shape", np.array([-1, 4, 64], dtype=np.int64))
    rows = maker.op("Reshape", (features, shape), "rows", (4, 64))
    back = maker.weight("back", np.array([-1, 4, 8, 8], dtype=np.int64))
    maker.head(maker.op("Reshape", (rows, back), "image_again", (4, 8, 8)), 2, "logits")
    graph, skipped = found(maker, "image", "logits")
    assert not graph.groups
    assert "does not run" in skipped["conv"]
