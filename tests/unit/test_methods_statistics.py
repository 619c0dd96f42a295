"""What calibration data say of a model, against the same numbers computed plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.graph.executor import build_module
from autocompress.methods import statistics
from autocompress.methods.statistics import choose_range, collect, from_matrix, input_rows, weight_matrix
from autocompress.plan import Layer
from tests.graphs import GraphMaker

GENERATOR = torch.Generator().manual_seed(0)


def conv_layer(**attributes: Any) -> Layer:
    return Layer(name="c", op="Conv", inputs=("x", "w", "b"), outputs=("y",), weights=("w", "b"), attributes=attributes)


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ({}, (1, 1)),
        ({"pads": (1, 1, 1, 1)}, (3, 3)),
        ({"pads": (0, 1, 2, 1), "strides": (2, 2)}, (3, 3)),
        ({"dilations": (2, 1), "strides": (1, 2)}, (3, 2)),
    ],
)
def test_rows_are_what_output_positions_multiply(attributes: dict[str, Any], kernel: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 9, 8, generator=GENERATOR)
    weight = torch.randn(4, 3, *kernel, generator=GENERATOR)
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    padded = F.pad(x, (left, right, top, bottom))
    strides, dilations = attributes.get("strides", 1), attributes.get("dilations", 1)
    expected = F.conv2d(padded, weight, None, strides, 0, dilations)
    layer = conv_layer(**attributes)
    rows = input_rows(layer, x, kernel, GENERATOR)
    given = (rows @ weight_matrix(layer, weight).t()).reshape(2, *expected.shape[2:], 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_drawn_from_all_samples_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLED_ROWS", 50)
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 10, 10)
    rows = input_rows(conv_layer(), x, (1, 1), GENERATOR)
    assert rows.shape == (50, 1)
    assert len(rows.unique()) >= 6
    tokens = Layer(name="m", op="MatMul", inputs=("x", "w"), outputs=("y",), weights=("w",))
    assert input_rows(tokens, torch.randn(4, 30, 3), (), GENERATOR).shape == (50, 3)
    monkeypatch.setattr(statistics, "SAMPLED_INPUTS", 30)
    assert input_rows(tokens, torch.randn(4, 30, 3), (), GENERATOR).shape == (10, 3)


def test_moments_means_and_deviations() -> None:
    maker = GraphMaker()
    hidden = maker.conv(maker.input("image", (2, 5, 5)), 3, "conv")
    maker.head(maker.relu(hidden), 2, "logits")
    module = build_module(maker.build(("image",), ("logits",)), maker.weights)
    seen: list[int] = []
    tap = lambda value: seen.append(1) or value  # type: ignore[func-returns-value]  # noqa: E731
    module.taps["image"] = tap
    data = torch.randn(6, 2, 5, 5, generator=GENERATOR)
    found = collect(module, [(data[:3],), (data[3:],)], seed=0)
    assert module.taps == {"image": tap}
    assert len(seen) == 2
    columns = F.unfold(data, 3, padding=1).transpose(1, 2).reshape(-1, 18)
    whole = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)
    torch.testing.assert_close(found.hessians["conv"], whole.t() @ whole / len(whole), rtol=1e-4, atol=1e-5)
    out = F.conv2d(data, maker.weights["conv.weight"], maker.weights["conv.bias"], padding=1)
    torch.testing.assert_close(found.means["conv"], out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    deviation = out.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(found.deviations["conv"], deviation, rtol=1e-3, atol=1e-5)
    assert float(found.samples["conv_out"].max()) == pytest.approx(float(out.max()), rel=1e-5)
    assert float(found.samples["conv_out"].min()) == pytest.approx(float(out.min()), rel=1e-5)
    plain = collect(module, [(data,)], seed=0, hessians=False)
    assert not plain.hessians
    torch.testing.assert_close(plain.means["conv"], found.means["conv"], rtol=1e-4, atol=1e-5)


def test_samples_keep_the_extremes_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLED_VALUES", 64)
    maker = GraphMaker()
    maker.relu(maker.input("image", (1, 4, 4)))
    module = build_module(maker.build(("image",), ("image_relu",)), {})
    batches = [(torch.full((2, 1, 4, 4), float(value)),) for value in (9, *range(8), -3)]
    sample = collect(module, batches, seed=0).samples["image"]
    assert sample.numel() <= 64
    assert (float(sample.min()), float(sample.max())) == (-3.0, 9.0)


def test_wide_layers_keep_means_and_squares_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "WIDEST", 4)
    maker = GraphMaker()
    maker.gemm(maker.input("x", (6,)), 2, "fc", "logits")
    module = build_module(maker.build(("x",), ("logits",)), maker.weights)
    data = torch.randn(10, 6, generator=GENERATOR)
    found = collect(module, [(data[:4],), (data[4:],)], seed=0)
    assert not found.hessians
    mean, square = found.moments["fc"]
    torch.testing.assert_close(mean, data.mean(0))
    torch.testing.assert_close(square, data.square().mean(0))


def test_grouped_layers_have_no_moments() -> None:
    maker = GraphMaker()
    maker.conv(maker.input("image", (4, 5, 5)), 4, "depthwise", group=4)
    module = build_module(maker.build(("image",), ("depthwise_out",)), maker.weights)
    found = collect(module, [(torch.randn(2, 4, 5, 5),)], seed=0)
    assert not found.hessians
    assert set(found.means) == {"depthwise"}


def test_matrices_and_back() -> None:
    product = Layer(name="m", op="MatMul", inputs=("x", "w"), outputs=("y",), weights=("w",))
    turned = Layer(name="g", op="Gemm", inputs=("x", "w"), outputs=("y",), weights=("w",), attributes={"transB": 1})
    for layer, shape, rows in ((product, (5, 3), 3), (turned, (3, 5), 3), (conv_layer(), (3, 2, 2, 2), 3)):
        weight = torch.randn(shape, generator=GENERATOR)
        assert weight_matrix(layer, weight).shape[0] == rows
        assert torch.equal(from_matrix(layer, weight_matrix(layer, weight), shape), weight)


def test_a_range_leaves_rare_outliers_out() -> None:
    sample = torch.cat([torch.randn(20000, generator=GENERATOR), torch.tensor([12.0])])
    low, high = choose_range(sample)
    assert high < 12.0
    assert low < 0.0
    plain = torch.linspace(0, 6, 1000)
    assert choose_range(plain) == (0.0, 6.0)
    assert choose_range(torch.zeros(10)) == (0.0, 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_a_range_holds_zero_and_no_more_than_the_sample(values: list[float]) -> None:
    low, high = choose_range(torch.tensor(values))
    assert low <= 0.0 <= high
    assert low >= min(*values, 0.0) - 1e-6
    assert high <= max(*values, 0.0) + 1e-6
    assert low < high
