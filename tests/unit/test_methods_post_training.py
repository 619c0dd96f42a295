"""Post-training quantization in one call: what it chooses, what it refuses, and what it is worth."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch

from autocompress.errors import UsageError
from autocompress.graph.executor import build_module
from autocompress.methods.bias_correction import correct_biases
from autocompress.methods.exact import ExactModule
from autocompress.methods.post_training import (
    CalibrationOptions,
    held_out,
    outputs_of,
    quantize_model,
    signal_to_noise_db,
    uniform_plan,
)
from autocompress.methods.registry import RANGE_METHODS
from autocompress.methods.simulation import build_compressed
from autocompress.plan import CompressionPlan, ModelGraph
from tests.graphs import GraphMaker, resnet

PLAIN = CalibrationOptions(ranges="minmax", equalize="off", bias_correction=False, rounding="nearest")


def images(count: int = 32, size: int = 8, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batches(data: torch.Tensor, size: int = 8) -> list[tuple[torch.Tensor, ...]]:
    return [(data[start : start + size],) for start in range(0, len(data), size)]


def small() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    return resnet((4, 6), blocks=1, size=8)


def snr(graph: ModelGraph, weights: dict[str, torch.Tensor], module: torch.nn.Module, data: torch.Tensor) -> float:
    with torch.no_grad():
        return signal_to_noise_db([build_module(graph, weights)(data)], [module(data)])


def test_the_best_range_method_is_chosen_on_data_held_out() -> None:
    graph, weights = small()
    made = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], batches(images()))
    report = made.calibration
    assert report is not None
    assert (report.samples, report.held_out) == (32, 8)
    assert all(f"{name}, nearest" in report.tried for name in RANGE_METHODS)
    assert report.snr_db == pytest.approx(max(report.tried.values()), abs=0.01)
    assert report.snr_db >= report.uncorrected_snr_db > 20
    assert snr(graph, weights, ExactModule(made), images(seed=5)) > 20


def test_quality_grows_with_the_bits_of_weights() -> None:
    graph, weights = small()
    options = CalibrationOptions(ranges="mse", equalize="off")
    worth = []
    for bits in (2, 3, 4, 6, 8):
        made = quantize_model(graph, weights, uniform_plan(graph, "int8", bits)[0], batches(images()), options)
        worth.append(snr(graph, weights, ExactModule(made), images(seed=5)))
        for layer in graph.compressible:
            assert made.plan.layers[layer.name].storage.bits == bits
            steps = made.weight_scales[layer.name].reshape(-1, *(1,) * (made.weights[layer.inputs[1]].dim() - 1))
            integers = made.weights[layer.inputs[1]] / steps
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
            assert float(integers.abs().max()) <= 2 ** (bits - 1) + 1e-3
    assert all(later > earlier + 1 for earlier, later in pairwise(worth))


def test_plain_options_give_minmax_over_all_data() -> None:
    graph, weights = small()
    data = images()
    data[30] *= 5.0  # among those held out
    made = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], batches(data), PLAIN)
    assert made.ranges["image"] == pytest.approx((float(data.min()), float(data.max())))
    assert made.calibration is not None
    assert (made.calibration.ranges, made.calibration.equalization) == ("minmax", "none")
    assert not made.calibration.bias_correction


def test_an_outlier_in_the_input_is_clipped_where_that_is_better() -> None:
    graph, weights = small()
    data = images(256)
    data[3, 0, 0, 0] = 300.0
    plan = uniform_plan(graph, "int8", 8)[0]
    made = quantize_model(graph, weights, plan, batches(data, 64))
    assert made.calibration is not None
    assert made.calibration.ranges != "minmax"
    assert made.ranges["image"][1] < 100
    plain = quantize_model(graph, weights, plan, batches(data, 64), PLAIN)
    clean = images(seed=5)
    assert snr(graph, weights, ExactModule(made), clean) > snr(graph, weights, ExactModule(plain), clean) + 6


def test_equalization_mends_channels_of_unequal_size() -> None:
    graph, weights = small()
    sizes = torch.tensor([0.01, 1.0, 30.0, 0.1])
    weights["layer1.0.conv1.weight"] *= sizes[:, None, None, None]
    weights["layer1.0.conv1.bias"] *= sizes
    weights["layer1.0.conv2.weight"] /= sizes[None, :, None, None]
    plan = uniform_plan(graph, "int8", 8)[0]
    worth = {}
    choices: tuple[Literal["off", "auto", "on"], ...] = ("off", "auto", "on")
    for choice in choices:
        options = CalibrationOptions(ranges="minmax", equalize=choice, bias_correction=False, rounding="nearest")
        made = quantize_model(graph, weights, plan, batches(images()), options)
        assert made.calibration is not None
        assert (made.calibration.equalization == "none") == (choice == "off")
        worth[choice] = snr(graph, weights, ExactModule(made), images(seed=5))
    assert worth["auto"] > worth["off"] + 6
    assert worth["on"] > worth["off"] + 6


def test_bias_correction_takes_back_a_shift() -> None:
    graph, weights = small()
    data = batches(images(64))
    made = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], data, PLAIN)
    shifted = {**made.weights, "conv1.bias": made.weights["conv1.bias"] + 0.05}
    wrong = type(made)(graph, shifted, made.plan, made.weight_scales, made.ranges)
    corrected = correct_biases(wrong, weights, data)
    error = corrected.weights["conv1.bias"] - weights["conv1.bias"]
    assert float(error.abs().max()) < 0.01
    clean = images(seed=5)
    assert snr(graph, weights, build_compressed(corrected), clean) > snr(graph, weights, build_compressed(wrong), clean)
    assert torch.equal(wrong.weights["conv1.bias"], shifted["conv1.bias"])


def test_compensated_rounding_loses_less() -> None:
    maker = GraphMaker()
    maker.gemm(maker.relu(maker.gemm(maker.input("x", (24,)), 32, "up")), 10, "down", "y")
    graph, weights = maker.build(("x",), ("y",)), maker.weights
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator) * torch.logspace(0, -2, 24)[:, None]
    data = torch.randn(512, 24, generator=generator) @ mix  # correlated inputs, as those of a network are
    plan = uniform_plan(graph, "fp32", 8)[0]
    worth = {}
    roundings: tuple[Literal["nearest", "compensated"], ...] = ("nearest", "compensated")
    for rounding in roundings:
        options = CalibrationOptions(ranges="minmax", equalize="off", bias_correction=False, rounding=rounding)
        made = quantize_model(graph, weights, plan, [(data[:384],)], options)
        worth[rounding] = snr(graph, weights, ExactModule(made), data[384:])
    assert worth["compensated"] > worth["nearest"] + 1


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5], [2]])
def test_few_samples_are_enough_however_they_are_batched(sizes: list[int]) -> None:
    graph, weights = small()
    data = [(part,) for part in torch.split(images(sum(sizes)), sizes)]
    made = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], data)
    assert made.calibration is not None
    assert made.calibration.held_out == (sum(sizes) // 4 or sum(sizes))
    fit, held = held_out(data)
    if sum(sizes) >= 4:
        assert torch.equal(torch.cat([batch[0] for batch in (*fit, *held)]), torch.cat([batch[0] for batch in data]))
    assert len(outputs_of(build_compressed(made), data)[0]) == sum(sizes)


def test_dead_channels_and_constant_activations_are_no_trouble() -> None:
    graph, weights = small()
    for name in ("layer1.0.conv1.weight", "layer1.0.conv1.bias"):
        weights[name][:] = 0.0  # all of a layer
    weights["layer2.0.conv1.weight"][1] = 0.0
    made = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], batches(images()))
    assert snr(graph, weights, ExactModule(made), images(seed=5)) > 20
    constant = quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], batches(torch.ones(8, 1, 8, 8)))
    assert all(low <= 0 <= high and low < high for low, high in constant.ranges.values())
    assert all(bool(torch.isfinite(value).all()) for value in constant.weights.values())


def test_bad_data_are_refused_by_name() -> None:
    graph, weights = small()
    plan = uniform_plan(graph, "int8", 8)[0]
    with pytest.raises(UsageError, match="no calibration samples"):
        quantize_model(graph, weights, plan, [])
    data = images()
    data[19, 0, 2, 2] = float("nan")
    with pytest.raises(UsageError, match="calibration batch 2 has NaN or infinite values in 'image'"):
        quantize_model(graph, weights, plan, batches(data))
    with pytest.raises(UsageError, match="calibration batch 0 holds 2 tensors, but the model's inputs are image"):
        quantize_model(graph, weights, plan, [(images(2), images(2))])
    with pytest.raises(UsageError, match="unknown range method 'median'"):
        CalibrationOptions(ranges="median")
    with pytest.raises(UsageError, match="equalize='yes': give one of auto, on, off"):
        CalibrationOptions(equalize="yes")  # type: ignore[arg-type]


def test_a_float_plan_is_the_model_itself() -> None:
    graph, weights = small()
    made = quantize_model(graph, weights, CompressionPlan(), batches(images()))
    assert made.calibration is not None
    assert made.calibration.snr_db == 200.0
    assert all(torch.equal(made.weights[name], weights[name]) for name in weights)


def test_layers_that_cannot_be_integers_are_named() -> None:
    maker = GraphMaker()
    maker.conv(maker.relu(maker.conv(maker.input("image", (1, 8, 8)), 4, "first")), 2, "last")
    plan, left = uniform_plan(maker.build(("image",), ("last_out",)), "int8", 8)
    assert list(plan.layers) == ["first"]
    assert list(left) == ["last"]
    assert "float output" in left["last"]
