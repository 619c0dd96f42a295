"""Scales moved between layers: what may be linked, that the function stays, and what is balanced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.graph.executor import build_module
from autocompress.methods.equalization import channel_maxima, equalize, find_links
from autocompress.plan import ModelGraph
from tests.graphs import GraphMaker, resnet

Model = tuple[ModelGraph, dict[str, torch.Tensor]]


def chain(seed: int = 0) -> Model:
    """Convolutions plain, depthwise and grouped, pools and a LeakyRelu between them."""
    maker = GraphMaker(seed)
    x = maker.relu(maker.conv(maker.input("image", (2, 8, 8)), 8, "first"))
    x = maker.conv(maker.max_pool(x, "smaller"), 8, "depthwise", group=8)
    x = maker.op("LeakyRelu", (x,), "leaky", maker.tensors[x].shape, alpha=0.1)
    x = maker.conv(x, 12, "grouped", group=4)
    maker.head(maker.relu(maker.conv(x, 6, "last")), 3, "logits")
    return maker.build(("image",), ("logits",)), maker.weights


def tokens(seed: int = 0) -> Model:
    """LayerNormalization read by two products, one behind a transpose that keeps channels last."""
    maker = GraphMaker(seed)
    maker.input("x", (5, 6))
    scale = maker.weight("norm.weight", np.linspace(0.1, 9, 6, dtype=np.float32))
    shift = maker.weight("norm.bias", np.linspace(-1, 1, 6, dtype=np.float32))
    normed = maker.op("LayerNormalization", ("x", scale, shift), "normed", (5, 6), axis=-1)
    maker.op("Add", (maker.matmul(normed, 4, "q"), maker.matmul(normed, 4, "k")), "sum", (5, 4))
    return maker.build(("x",), ("sum",)), maker.weights


def perceptron(seed: int = 0) -> Model:
    maker = GraphMaker(seed)
    maker.gemm(maker.relu(maker.gemm(maker.input("x", (6,)), 9, "up")), 4, "down", "y")
    return maker.build(("x",), ("y",)), maker.weights


def residual(seed: int = 0) -> Model:
    return resnet((4, 6), blocks=1, size=8, seed=seed)


MODELS = {
    "chain": chain,
    "tokens": tokens,
    "perceptron": perceptron,
    "residual": residual,
}


def sample(graph: ModelGraph, count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *graph.tensors[graph.inputs[0]].shape, generator=torch.Generator().manual_seed(seed))


def test_links_are_found_where_one_reader_makes_up_for_the_change() -> None:
    found = {link.maker.name: [r.name for r in link.readers] for link in find_links(chain()[0])}
    assert found == {"first": ["depthwise"], "depthwise": ["grouped"], "grouped": ["last"]}
    assert [[r.name for r in link.readers] for link in find_links(tokens()[0])] == [["q", "k"]]
    # Residual streams have a second reader, and the head lies behind a Flatten.
    assert [link.maker.name for link in find_links(residual()[0])] == ["layer1.0.conv1", "layer2.0.conv1"]


def test_no_link_over_what_clips_at_a_fixed_value_or_is_an_output() -> None:
    maker = GraphMaker()
    x = maker.conv(maker.input("image", (2, 8, 8)), 4, "first")
    six = maker.weight("six", np.array(6, np.float32))
    zero = maker.weight("zero", np.array(0, np.float32))
    maker.conv(maker.op("Clip", (x, zero, six), "clipped", (4, 8, 8)), 4, "second")
    assert not find_links(maker.build(("image",), ("second_out",)))
    plain = GraphMaker()
    plain.conv(plain.conv(plain.input("image", (2, 8, 8)), 4, "first"), 4, "second")
    assert len(find_links(plain.build(("image",), ("second_out",)))) == 1
    assert not find_links(plain.build(("image",), ("first_out", "second_out")))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_data", [False, True])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), uneven=st.floats(0.0, 3.0))
def test_the_function_stays(name: str, with_data: bool, seed: int, uneven: float) -> None:
    graph, weights = MODELS[name](seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: value * (uneven * torch.randn(value.shape[:1] + (1,) * (value.dim() - 1), generator=generator)).exp()
        for key, value in weights.items()
    }
    links = find_links(graph)
    x = sample(graph)
    moved = equalize(weights, links, channel_maxima(graph, weights, links, [(x,)]) if with_data else None)
    with torch.no_grad():
        before, after = build_module(graph, weights)(x), build_module(graph, moved)(x)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_weights_are_balanced_across_a_link() -> None:
    graph, weights = perceptron()
    weights["up.weight"] = weights["up.weight"] * torch.logspace(-2, 2, 9)[:, None]
    moved = equalize(weights, find_links(graph))
    rows, columns = moved["up.weight"].abs().amax(1), moved["down.weight"].abs().amax(0)
    ratio = rows / columns
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(9), rtol=1e-3, atol=1e-3)


def test_a_dead_channel_stays_as_it_is() -> None:
    graph, weights = perceptron()
    weights["up.weight"][2] = 0.0
    weights["up.bias"][2] = 0.0
    links = find_links(graph)
    for maxima in (None, channel_maxima(graph, weights, links, [(sample(graph),)])):
        moved = equalize(weights, links, maxima)
        assert torch.equal(moved["down.weight"][:, 2], weights["down.weight"][:, 2])
        assert all(bool(torch.isfinite(value).all()) for value in moved.values())


def test_outlier_channels_of_a_norm_shrink() -> None:
    graph, weights = tokens()
    weights["norm.weight"][3] = 100.0
    links, x = find_links(graph), sample(graph)
    before = channel_maxima(graph, weights, links, [(x,)])["normed"]
    moved = equalize(weights, links, channel_maxima(graph, weights, links, [(x,)]))
    after = channel_maxima(graph, moved, links, [(x,)])["normed"]
    assert float(after.max() / after.median()) < 0.3 * float(before.max() / before.median())
