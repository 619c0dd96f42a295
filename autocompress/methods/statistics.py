"""What calibration data says of a model: input second moments, activation ranges, output statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.calibration import least_squares
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Layer, ModelGraph

SAMPLED_ROWS = 16384
"""Rows (image positions) of a layer's input kept from each calibration batch, at most."""

SAMPLED_INPUTS = 1 << 24
"""Rows times columns of a layer's input kept from each calibration batch, at most."""

WIDEST = 5000
"""Inputs up to which a layer's second moments are kept whole: their cost is the square in memory, the cube in time."""

SAMPLED_VALUES = 65536
"""Values of an activation kept for choosing its range."""

choose_range = least_squares
"""How ranges are chosen where nothing else is asked for."""


@dataclass
class CalibrationStatistics:
    """Gathered from one pass over the calibration data.

    Attributes:
        hessians: for each weight layer, ``E[x x^T]`` of its input columns with a constant 1 as the last.
        moments: for each weight layer with more than ``WIDEST`` inputs, the mean and mean square of each.
        samples: for each floating activation, a sample of its values.
        means: for each weight layer, its output's mean a channel.
        deviations: for each weight layer, its output's standard deviation a channel.
    """

    hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    deviations: dict[str, torch.Tensor] = field(default_factory=dict)


def weight_matrix(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A weight as ``[output channels, inputs]``."""
    return weight.flatten(1) if weight_axis(layer) == 0 else weight.t()


def from_matrix(layer: Layer, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of ``weight_matrix``."""
    return (matrix if weight_axis(layer) == 0 else matrix.t()).reshape(tuple(shape))


def input_rows(layer: Layer, x: torch.Tensor, kernel: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """The inputs that output positions multiply, as ``[rows, columns]``; positions are drawn where there are many."""
    if layer.op != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        limit = _row_limit(rows.shape[1])
        if rows.shape[0] > limit:
            rows = rows[torch.randint(rows.shape[0], (limit,), generator=generator)]
        return rows
    pads = layer.attributes.get("pads", (0, 0, 0, 0))
    strides = layer.attributes.get("strides", (1, 1))
    dilations = layer.attributes.get("dilations", (1, 1))
    top, left, bottom, right = (int(p) for p in pads)  # type: ignore[union-attr]
    down, across = (int(s) for s in strides)  # type: ignore[union-attr]
    steps = [int(d) for d in dilations]  # type: ignore[union-attr]
    x = F.pad(x, (left, right, top, bottom))
    height = (x.shape[2] - steps[0] * (kernel[0] - 1) - 1) // down + 1
    width = (x.shape[3] - steps[1] * (kernel[1] - 1) - 1) // across + 1
    count = x.shape[0] * height * width
    limit = _row_limit(x.shape[1] * kernel[0] * kernel[1])
    chosen = torch.randint(count, (limit,), generator=generator) if count > limit else torch.arange(count)
    sample, position = chosen // (height * width), chosen % (height * width)
    y = (position // width * down)[:, None] + torch.arange(kernel[0]) * steps[0]
    z = (position % width * across)[:, None] + torch.arange(kernel[1]) * steps[1]
    taps = x.permute(0, 2, 3, 1)[sample[:, None, None], y[:, :, None], z[:, None, :]]
    return taps.permute(0, 3, 1, 2).reshape(len(chosen), -1)


def _row_limit(columns: int) -> int:
    return max(1, min(SAMPLED_ROWS, SAMPLED_INPUTS // columns))


def collect(
    module: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], seed: int, hessians: bool = True
) -> CalibrationStatistics:
    """Runs the batches through the module and gathers its statistics; the module's own taps are kept in place."""
    graph = module.graph
    generator = torch.Generator().manual_seed(seed)
    result = CalibrationStatistics()
    counts: dict[str, int] = {}
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    samples: dict[str, list[torch.Tensor]] = {}
    extremes: dict[str, torch.Tensor] = {}
    readers: dict[str, list[Layer]] = {}
    producers: dict[str, Layer] = {}
    for layer in graph.compressible:
        producers[layer.outputs[0]] = layer
        if hessians and _is_followed(graph, layer):
            readers.setdefault(layer.inputs[0], []).append(layer)
    original = dict(module.taps)

    def observe(name: str) -> Tap:
        inner = original.get(name)

        def tap(value: torch.Tensor) -> torch.Tensor:
            if value.is_floating_point():
                flat = value.detach().flatten()
                if flat.numel() > SAMPLED_VALUES // 4:
                    chosen = flat[torch.randint(flat.numel(), (SAMPLED_VALUES // 4,), generator=generator)]
                else:
                    chosen = flat.clone()
                samples.setdefault(name, []).append(chosen)
                edges = torch.stack(flat.aminmax())
                known = extremes.setdefault(name, edges)
                extremes[name] = torch.stack([torch.minimum(known[0], edges[0]), torch.maximum(known[1], edges[1])])
                if name in producers:
                    _accumulate(sums, producers[name], value)
            value = inner(value) if inner else value
            for layer in readers.get(name, ()):
                kernel = graph.tensors[layer.inputs[1]].shape[2:]
                rows = input_rows(layer, value, kernel, generator)
                counts[layer.name] = counts.get(layer.name, 0) + rows.shape[0]
                if rows.shape[1] > WIDEST:
                    before = result.moments.get(layer.name, (0.0, 0.0))
                    result.moments[layer.name] = (before[0] + rows.sum(0), before[1] + rows.square().sum(0))
                    continue
                rows = torch.cat([rows, torch.ones(rows.shape[0], 1)], dim=1)
                total = result.hessians.get(layer.name)
                result.hessians[layer.name] = rows.t() @ rows if total is None else total.addmm_(rows.t(), rows)
            return value

        return tap

    names = [*graph.inputs, *(out for layer in graph.layers for out in layer.outputs if out)]
    module.taps = {name: observe(name) for name in names}
    try:
        with torch.no_grad():
            for inputs in batches:
                module(*inputs)
    finally:
        module.taps = original
    for name, count in counts.items():
        if name in result.hessians:
            result.hessians[name] /= count
        else:
            mean, square = result.moments[name]
            result.moments[name] = (mean / count, square / count)
    for name, (total, squares, count) in sums.items():
        mean = total / count
        result.means[name] = mean
        result.deviations[name] = (squares / count - mean.square()).clamp_min(0).sqrt()
    result.samples = {name: _thinned(torch.cat(parts), extremes[name]) for name, parts in samples.items()}
    return result


def merge(first: CalibrationStatistics, second: CalibrationStatistics) -> CalibrationStatistics:
    """Statistics of ``first`` with samples and extremes of both: for ranges that cover all of the data."""
    samples = {}
    for name, sample in first.samples.items():
        both = torch.cat([sample, second.samples[name]])
        samples[name] = _thinned(both, torch.stack(both.aminmax()))
    return replace(first, samples=samples)


def _is_followed(graph: ModelGraph, layer: Layer) -> bool:
    """Whether the layer is one matrix product a position, whose inputs' second moments say all there is to know."""
    if layer.op != "Conv":
        return len(graph.tensors[layer.inputs[1]].shape) == 2
    return layer.attributes.get("group", 1) == 1 and len(graph.tensors[layer.inputs[1]].shape) == 4


def _thinned(sample: torch.Tensor, extremes: torch.Tensor) -> torch.Tensor:
    """At most ``SAMPLED_VALUES`` values spread over all batches, with the extremes of all that was seen."""
    most = SAMPLED_VALUES - 2
    if sample.numel() > most:
        sample = sample[torch.linspace(0, sample.numel() - 1, most, dtype=torch.float64).long()]
    low, high = sample.aminmax()
    # Each only where it is missing: counted twice, the rarest value would look less rare than it is.
    return torch.cat([sample, extremes[:1][extremes[:1] < low], extremes[1:][extremes[1:] > high]])


def _accumulate(sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]], layer: Layer, value: torch.Tensor) -> None:
    channels = value.transpose(0, 1).flatten(1) if layer.op == "Conv" else value.reshape(-1, value.shape[-1]).t()
    total, squares = channels.sum(1), channels.square().sum(1)
    if layer.name in sums:
        before = sums[layer.name]
        sums[layer.name] = (before[0] + total, before[1] + squares, before[2] + channels.shape[1])
    else:
        sums[layer.name] = (total, squares, channels.shape[1])
