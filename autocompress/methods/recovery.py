"""Brings a compressed model back to quality: distillation in float, then with its number formats simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.channel_correction import sharing
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import assign_ranges
from autocompress.methods.rounding import DEAD_ROW, integer_range, round_to_nearest, row_scales
from autocompress.methods.simulation import activation_taps
from autocompress.methods.statistics import choose_range, collect, from_matrix, weight_matrix
from autocompress.plan import CompressionPlan, Layer, LayerPlan, ModelGraph

Batches = Iterable[tuple[torch.Tensor, ...]]


def add_norms(module: GraphModule, batches: Batches, fresh: bool = False) -> None:
    """Puts a batch norm behind every convolution, set up so that the module still computes what it did.

    Exported models have their batch norms folded away; training a deep network without any is slow and unstable.
    The norm's scale and shift are the output's own deviation and mean, so at first it changes nothing; ``fresh``
    starts it as a new network's instead (scale 1, shift 0).  Layers whose weights have a second use get none, for
    it could not be folded, nor do those behind a global pool, whose one value a sample no network normalises.
    """
    graph = module.graph
    pooled = _pooled(graph)
    convolutions = [
        layer
        for layer in graph.compressible
        if layer.op == "Conv"
        and len(graph.tensors[layer.inputs[1]].shape) == 4
        and layer.name not in sharing(graph)
        and layer.inputs[0] not in pooled
    ]
    statistics = None if fresh else collect(module, batches, seed=0, hessians=False)
    for layer in convolutions:
        channels = module.graph.tensors[layer.outputs[0]].shape[0]
        norm = nn.BatchNorm2d(channels)
        if statistics is not None:
            mean, deviation = statistics.means[layer.name], statistics.deviations[layer.name]
            with torch.no_grad():
                norm.running_mean.copy_(mean)  # type: ignore[union-attr]
                norm.running_var.copy_(deviation.square())  # type: ignore[union-attr]
                norm.weight.copy_((deviation.square() + norm.eps).sqrt())
                norm.bias.copy_(mean)
        module.set_norm(layer, norm.train(module.training))
        if len(layer.inputs) > 2:  # A bias in front of a norm has no effect.
            module.weight(layer.inputs[2]).requires_grad_(False)


def _pooled(graph: ModelGraph) -> set[str]:
    """Tensors computed from globally pooled ones alone."""
    found: set[str] = set()
    for layer in graph.layers:
        if layer.op == "GlobalAveragePool" or (layer.activations and found.issuperset(layer.activations)):
            found.update(layer.outputs)
    return found


def fold_norms(module: GraphModule) -> None:
    """Merges the norms of ``add_norms`` back into the convolutions before them."""
    for layer in module.graph.compressible:
        norm = module.norm_of(layer)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = module.weight(layer.inputs[1]), module.weight(layer.inputs[2])
        with torch.no_grad():
            weight.mul_(gain.reshape(-1, *([1] * (weight.dim() - 1))))
            bias.copy_((bias - norm.running_mean) * gain + norm.bias)
        bias.requires_grad_(True)
    module.norms = nn.ModuleDict()


class _LearnedGrid(nn.Module):
    """Rounds a weight to a grid whose scales are trained with it (LSQ, 1902.08153).

    What is trained is the logarithm of each scale's change: the optimizer's steps are then shares of the scale, where
    steps of the weights' size would throw small scales about (a third less error at 4 bits).
    """

    start: torch.Tensor

    def __init__(self, layer: Layer, weight: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits
        self.register_buffer("start", row_scales(weight_matrix(layer, weight.detach()), bits))
        self.floor = DEAD_ROW * float(self.start.max())
        self.stretch = nn.Parameter(torch.zeros_like(self.start))

    @property
    def scales(self) -> torch.Tensor:
        return (self.start * self.stretch.exp()).clamp_min(self.floor)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        low, high = integer_range(self.bits)
        matrix = weight_matrix(self.layer, weight).float()
        scales = self.scales[:, None]
        ratio = matrix / scales
        rounded = ratio + (ratio.round() - ratio).detach()
        return from_matrix(self.layer, rounded.clamp(low, high) * scales, weight.shape)


def storage_bits(plan: CompressionPlan, layer: Layer) -> int:
    """The bits a layer's weights are stored in; 32 where they stay floating point."""
    storage = plan.layers.get(layer.name, LayerPlan()).storage
    return storage.bits if storage.scheme == "affine" else 32


def quantize_aware(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    plan: CompressionPlan,
    batches: Batches,
    train: Callable[[GraphModule, list[nn.Parameter]], object] | None = None,
) -> CompressedModel:
    """Turns float weights of an already pruned graph into the plan's formats.

    Args:
        graph: the graph after pruning.
        weights: its float weights.
        plan: whose layers and activations give the formats.
        batches: calibration inputs, read more than once.
        train: trains the simulated module and the grids' parameters given to it; None rounds the weights as they are.
    """
    module = GraphModule(graph, weights).eval()
    statistics = collect(module, batches, seed=0, hessians=False)
    ranges = assign_ranges(graph, plan.activations, lambda name: choose_range(statistics.samples[name]))
    grids: dict[str, _LearnedGrid] = {}
    for layer in graph.compressible:
        bits = storage_bits(plan, layer)
        if bits < 32:
            grids[layer.name] = _LearnedGrid(layer, module.weight(layer.inputs[1]), bits)
    if train is not None and (grids or ranges):
        module.taps = activation_taps(ranges)
        module.weight_taps = dict[str, Tap](grids)
        train(module, [grid.stretch for grid in grids.values()])
        module.taps = {}
    final = module.weights()
    scales: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for layer in graph.compressible:
            if layer.name in grids:
                grid = grids[layer.name]
                weight = final[layer.inputs[1]]
                scales[layer.name] = grid.scales.detach().clone()
                rounded = round_to_nearest(weight_matrix(layer, weight), scales[layer.name], grid.bits)
                final[layer.inputs[1]] = from_matrix(layer, rounded, weight.shape)
    final = {name: value.contiguous() for name, value in final.items()}
    return CompressedModel(graph=graph, weights=final, plan=plan, weight_scales=scales, ranges=ranges)
