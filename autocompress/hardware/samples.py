"""The models that a device is profiled on: random members of the families people deploy, chosen for what they cover."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from autocompress.export.onnx import to_onnx
from autocompress.hardware.coverage import cells, choose, lowered_kernels
from autocompress.hardware.synthetic import (
    encoder_net,
    heavy_net,
    inverted_net,
    joined_net,
    odd_net,
    plain_net,
    random_formats,
    random_model,
    residual_net,
    token_net,
)  # fmt: skip
from autocompress.hardware.weight_only import dynamic_products, few_bits_products
from autocompress.plan import LayerPlan, ModelGraph
from autocompress.runtime.base import DEFAULT_RUNTIME

Builder = Callable[..., ModelGraph]

_SPECS: tuple[tuple[Builder, tuple[int, ...], tuple[int, int]], ...] = (
    (residual_net, (28, 32), (8, 48)),
    (inverted_net, (28, 32), (8, 24)),
    (plain_net, (28, 32), (4, 64)),
    (residual_net, (14, 20, 24, 32), (4, 32)),
    (residual_net, (28, 32), (16, 64)),
    (inverted_net, (96, 112), (8, 24)),
    (residual_net, (96, 128, 224), (16, 48)),
    (residual_net, (24, 40), (80, 160)),
    (inverted_net, (24, 40), (48, 128)),
    (inverted_net, (160, 224), (8, 24)),
    (odd_net, (14, 20, 28), (18, 48)),
    (odd_net, (56, 80), (18, 48)),
    (token_net, (16, 48), (48, 128)),
    (token_net, (1, 4), (256, 768)),
    (encoder_net, (16, 32, 64), (64, 128)),
    (encoder_net, (96, 128, 196), (128, 384)),
)
"""Family, image sizes or tokens, range of the first width: small images and narrow layers most of all, with some of
every kind up to those of large networks, where weights no longer fit the caches."""

_STYLES = ("fp32", "int8", "mixed", "runs")
_CANDIDATES_EACH = 2

_HEAVY = (
    (512, 1, "fp32"), (512, 2, "fp32"), (512, 3, "fp32"), (512, 4, "fp32"), (512, 2, "int8"), (512, 3, "int8"),
    (512, 5, "int8"),
)  # fmt: skip
"""Channels, depth and format of the models that show what weights beyond the caches cost."""

_WEIGHT_ONLY = (
    ("dynamic", 16), ("dynamic", 1), ("dynamic", 64), ("dynamic", 4), ("dynamic", 1), ("dynamic", 16), ("8 bits", 16),
    ("8 bits", 1), ("4 bits", 16), ("4 bits", 1), ("2 bits", 4), ("2 bits", 1), ("4 bits", 4), ("slow", 4), ("slow", 1),
)  # fmt: skip
"""What the weights of a network of matrix products are held in, and its tokens; ``slow``: 4 bits computed in float."""

_FOREIGN = (16, 64, 128)
"""Tokens of networks with kernels that this project's own exports do not bring about, but other files do."""


@dataclass(frozen=True)
class Sample:
    """A model to time; ``input_shape`` is that of one sample."""

    graph: ModelGraph
    model: bytes
    input_shape: tuple[int, ...]


def choose_samples(count: int, rng: np.random.Generator, block: int, runtime: str = DEFAULT_RUNTIME) -> list[Sample]:
    """The ``count`` models that cover most, then those with heavy weights and with weights of few bits.

    Args:
        count: models of the families; below 20 the others are left out.
        rng: gives widths, sizes and formats.
        block: channels that the runtime packs together.
        runtime: what will run them; ONNX Runtime alone has kernels for weights of few bits.
    """
    weight_only = runtime == DEFAULT_RUNTIME
    candidates = list(_candidates(rng))
    covered = [cells(lowered_kernels(graph, layers, block, 1)) for graph, layers in candidates]
    samples = [_sample(*candidates[index], rng, runtime) for index in choose(covered, count)]
    if count < 20:
        return samples
    for channels, depth, style in _HEAVY:
        graph = heavy_net(channels, depth)
        samples.append(_sample(graph, random_formats(graph, rng, style), rng, runtime))
    few_bits = [(*kind, ((64, 128), (192, 384))[index % 2]) for index, kind in enumerate(_WEIGHT_ONLY)]
    for style, tokens, widths in few_bits if weight_only else ():
        graph = token_net(rng, tokens, widths)
        made = to_onnx(random_model(graph, {}, rng))
        if style == "dynamic":
            made = dynamic_products(made)
        else:
            bits = 4 if style == "slow" else int(style[0])
            made = few_bits_products(made, bits, accuracy_level=0 if style == "slow" else 4)
        samples.append(Sample(graph, made.SerializeToString(), graph.tensors["input"].shape))
    for tokens in _FOREIGN if weight_only else ():
        graph = encoder_net(rng, tokens, (64, 256))
        dynamic = dynamic_products(to_onnx(random_model(graph, {}, rng)))
        samples.append(Sample(graph, dynamic.SerializeToString(), graph.tensors["input"].shape))
        samples.append(_sample(joined_net(rng, tokens, (64, 256)), {}, rng, runtime))
    return samples


def _sample(graph: ModelGraph, layers: dict[str, LayerPlan], rng: np.random.Generator, runtime: str) -> Sample:
    model = to_onnx(random_model(graph, layers, rng), runtime=runtime)
    return Sample(graph, model.SerializeToString(), graph.tensors["input"].shape)


def _candidates(rng: np.random.Generator) -> Iterator[tuple[ModelGraph, dict[str, LayerPlan]]]:
    """Every family in every format; a quarter has channels off all grids."""
    for family, sizes, widths in _SPECS:
        for style in _STYLES:
            for index in range(_CANDIDATES_EACH):
                graph = family(rng, int(rng.choice(sizes)), widths, odd=index == 1 and bool(rng.random() < 0.5))
                yield graph, random_formats(graph, rng, style)
