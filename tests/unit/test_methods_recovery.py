"""Norms for training, quantization-aware rounding, and the correction of statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.graph.executor import GraphModule, build_module
from autocompress.methods.channel_correction import correct_statistics
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.recovery import add_norms, fold_norms, quantize_aware, storage_bits
from autocompress.methods.rounding import integer_range
from autocompress.methods.simulation import build_compressed
from autocompress.methods.statistics import collect
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, CompressionPlan, LayerPlan, ModelGraph
from tests.graphs import GraphMaker, resnet


def data(count: int = 32, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def gated() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """A depthwise convolution and a squeeze-excitation gate."""
    maker = GraphMaker()
    wide = maker.relu(maker.conv(maker.input("image", (1, 8, 8)), 6, "expand"))
    deep = maker.conv(wide, 6, "depthwise", group=6, stride=2)
    pooled = maker.op("GlobalAveragePool", (deep,), "squeezed", (6, 1, 1))
    gate = maker.conv(maker.relu(maker.conv(pooled, 3, "se.down", kernel=1)), 6, "se.up", kernel=1)
    maker.head(
        maker.op("Mul", (maker.op("Sigmoid", (gate,), "gate", (6, 1, 1)), deep), "scaled", (6, 4, 4)), 3, "logits"
    )
    return maker.build(("image",), ("logits",)), maker.weights


@pytest.mark.parametrize("make", [lambda: resnet((4, 6, 8), blocks=1, size=8), gated])
def test_norms_change_nothing_until_trained(make) -> None:  # type: ignore[no-untyped-def]
    graph, weights = make()
    module = build_module(graph, weights)
    images = data()
    with torch.no_grad():
        before = module(images)
        add_norms(module, [(images[:16],), (images[16:],)])
        assert not module.training
        torch.testing.assert_close(module(images), before, rtol=1e-4, atol=1e-5)
        fold_norms(module)
        assert not module.norms
        torch.testing.assert_close(module(images), before, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("fresh", [False, True])
def test_trained_norms_fold_to_the_same_outputs(fresh: bool) -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    module = build_module(graph, weights)
    images = data()
    add_norms(module, [(images,)], fresh=fresh)
    generator = torch.Generator().manual_seed(3)
    for norm in module.norms.values():
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
        with torch.no_grad():
            norm.weight.uniform_(-1.0, 1.0, generator=generator)
            norm.bias.normal_(generator=generator)
    with torch.no_grad():
        before = module(images)
        fold_norms(module)
        torch.testing.assert_close(module(images), before, rtol=1e-4, atol=1e-4)


def test_which_layers_get_norms() -> None:
    graph, weights = gated()
    module = build_module(graph, weights)
    add_norms(module, [(data(),)])
    assert set(module.norms) == {"expand", "depthwise"}
    assert not module.weight("expand.bias").requires_grad
    assert module.weight("se.up.bias").requires_grad


def test_a_layer_used_twice_gets_no_norm() -> None:
    maker = GraphMaker()
    once = maker.relu(maker.conv(maker.input("image", (4, 8, 8)), 4, "conv"))
    layer = maker.layers[0]
    maker.tensors["again"] = maker.tensors["conv_out"].model_copy(update={"id": "again"})
    update = {"name": "conv/2", "inputs": (once, *layer.inputs[1:]), "outputs": ("again",), "shared_with": ("conv",)}
    maker.layers.append(layer.model_copy(update=update))
    graph = maker.build(("image",), ("again",))
    module = build_module(graph, maker.weights)
    add_norms(module, [(data(shape=(4, 8, 8)),)])
    assert not module.norms


def int8_plan(graph: ModelGraph, storage=INT8_WEIGHT) -> CompressionPlan:  # type: ignore[no-untyped-def]
    from autocompress.methods.quantization import activation_formats

    layers = {layer.name: LayerPlan(compute="int8", storage=storage) for layer in graph.compressible}
    return CompressionPlan(layers=layers, activations=activation_formats(graph, layers))


@pytest.mark.parametrize("storage", [INT8_WEIGHT, INT4_WEIGHT])
def test_rounded_as_they_are(storage) -> None:  # type: ignore[no-untyped-def]
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    plan = int8_plan(graph, storage)
    before = {name: value.clone() for name, value in weights.items()}
    compressed = quantize_aware(graph, weights, plan, [(data(),)])
    assert all(torch.equal(before[name], value) for name, value in weights.items())
    assert set(compressed.ranges) == set(plan.activations)
    low, high = integer_range(storage.bits)
    for layer in graph.compressible:
        assert storage_bits(plan, layer) == storage.bits
        scale = compressed.weight_scales[layer.name]
        integers = compressed.weights[layer.inputs[1]].flatten(1) / scale[:, None]
        assert float((integers - integers.round()).abs().max()) < 1e-3
        assert low - 1e-3 <= float(integers.min()) <= float(integers.max()) <= high + 1e-3
        if storage.bits == 8:
            error = (compressed.weights[layer.inputs[1]] - weights[layer.inputs[1]]).flatten(1).abs()
            assert bool((error <= 0.5001 * scale[:, None]).all())
    with torch.no_grad():
        wanted = build_module(graph, weights)(data())
        error = (build_compressed(compressed)(data()) - wanted).square().mean() / wanted.square().mean()
    assert float(error) < (0.02 if storage.bits == 8 else 0.5)


def test_training_with_formats_simulated_brings_the_output_nearer() -> None:
    graph, weights = resnet((8, 16, 32), blocks=1, size=8)
    images = data(64)
    with torch.no_grad():
        wanted = build_module(graph, weights)(images)
    seen: list[int] = []

    def train(module: GraphModule, grids: list[nn.Parameter]) -> None:
        seen.append(len(grids))
        optimizer = torch.optim.Adam([*module.parameters(), *grids], lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        for _ in range(50):
            optimizer.zero_grad()
            (module(images) - wanted).square().mean().backward()
            optimizer.step()
            schedule.step()
        assert all(grid.grad is not None and bool((grid != 0).all()) for grid in grids)

    def error(compressed: CompressedModel) -> float:
        with torch.no_grad():
            return float((build_compressed(compressed)(images) - wanted).square().mean())

    plan = int8_plan(graph, INT4_WEIGHT)
    plain = quantize_aware(graph, weights, plan, [(images,)])
    trained = quantize_aware(graph, weights, plan, [(images,)], train)
    assert seen == [len(graph.compressible)]
    assert error(trained) < 0.9 * error(plain)


def test_nothing_is_trained_where_nothing_is_rounded() -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)

    def train(*_: object) -> None:
        raise AssertionError

    compressed = quantize_aware(graph, weights, CompressionPlan(), [(data(),)], train)
    assert all(torch.equal(compressed.weights[name], weights[name]) for name in graph.weight_names())


@pytest.mark.parametrize("make", [lambda: resnet((4, 6, 8), blocks=1, size=8), gated])
def test_statistics_are_those_of_the_original_again(make) -> None:  # type: ignore[no-untyped-def]
    graph, weights = make()
    images = data()
    wanted = collect(build_module(graph, weights), [(images,)], seed=0, hessians=False)
    generator = torch.Generator().manual_seed(1)
    damaged = {
        name: value * (0.8 + 0.4 * torch.rand(value.shape[0], generator=generator).view(-1, *[1] * (value.dim() - 1)))
        for name, value in weights.items()
    }
    compressed = quantize_aware(graph, damaged, int8_plan(graph), [(images,)])
    corrected = correct_statistics(compressed, [(images,)], wanted.means, wanted.deviations)
    module = GraphModule(graph, corrected.weights).eval()
    module.taps = build_compressed(corrected).taps
    found = collect(module, [(images,)], seed=0, hessians=False)
    for layer in graph.compressible:
        if layer.op == "Conv":
            near = {"rtol": 0.05, "atol": 0.05 * float(wanted.deviations[layer.name].max())}
            torch.testing.assert_close(found.means[layer.name], wanted.means[layer.name], **near)
            torch.testing.assert_close(found.deviations[layer.name], wanted.deviations[layer.name], **near)
        scale = corrected.weight_scales[layer.name]
        integers = corrected.weights[layer.inputs[1]].flatten(1) / scale[:, None]
        assert float((integers - integers.round()).abs().max()) < 1e-3
    assert compressed.weights["fc.weight"] is corrected.weights["fc.weight"]


def test_a_dead_channel_is_not_amplified() -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    images = data()
    wanted = collect(build_module(graph, weights), [(images,)], seed=0, hessians=False)
    weights["conv1.weight"][2] = 0.0
    compressed = quantize_aware(graph, weights, CompressionPlan(), [(images,)])
    corrected = correct_statistics(compressed, [(images,)], wanted.means, wanted.deviations)
    assert float(corrected.weights["conv1.weight"][2].abs().max()) == 0.0
    torch.testing.assert_close(corrected.weights["conv1.bias"][2], wanted.means["conv1"][2], rtol=1e-4, atol=1e-5)
