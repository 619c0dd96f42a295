"""The database of compressed layers: recover each layer once, then stitch candidates from the pieces.

Channels leave in the order of second-order saliency, and the weights that stay are re-fitted in closed form to the
layer's original output on calibration data (2208.11580, 2602.05243).  An entry depends on the channels a layer reads
and on its number format; which of its output channels are kept only selects rows, so entries are few and each is made
once, when first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.methods.channel_correction import StatisticsCorrection
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.linear import NestedRefits, refit
from autocompress.methods.quantization import activation_formats, assign_ranges, weight_axis
from autocompress.methods.rounding import FINE_BITS, round_to_nearest, round_with_compensation, row_scales
from autocompress.methods.saliency import channel_orders, columns_of, group_readers
from autocompress.methods.statistics import CalibrationStatistics, choose_range, from_matrix, weight_matrix
from autocompress.plan import CompressionPlan, Group, Layer, LayerPlan, Member, ModelGraph

Entry = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LayerDatabase:
    """Compressed layers of one model, made on demand and kept.

    Args:
        graph: the dense model.
        weights: its weights.
        statistics: of the dense model on calibration data.
    """

    def __init__(
        self, graph: ModelGraph, weights: Mapping[str, torch.Tensor], statistics: CalibrationStatistics
    ) -> None:
        self.graph = graph
        self.weights = dict(weights)
        self.statistics = statistics
        self.orders = channel_orders(graph, weights, statistics)
        self._ranges: dict[str, tuple[float, float]] = {}
        self._entries: dict[tuple[str, tuple[tuple[str, int], ...], int], Entry] = {}
        self._nested: dict[str, NestedRefits] = {}
        self._read: dict[str, list[tuple[Group, Member]]] = {layer.name: [] for layer in graph.compressible}
        self._made: dict[str, list[tuple[Group, Member]]] = {layer.name: [] for layer in graph.compressible}
        readers = group_readers(graph)
        producers = {layer.inputs[1]: layer.name for layer in graph.compressible}
        for group in graph.groups:
            for layer, member in readers[group.id]:
                self._read[layer.name].append((group, member))
            for member in group.members:
                # Biases have the same members as their weights.
                if member.role in ("out", "through") and member.tensor in producers:
                    self._made[producers[member.tensor]].append((group, member))

    def kept(self, group: str, count: int) -> torch.Tensor:
        """The ``count`` channels of a group that stay, ascending."""
        return self.orders[group][:count].sort().values

    def range_of(self, tensor: str) -> tuple[float, float]:
        """The range an activation is quantized over."""
        if tensor not in self._ranges:
            self._ranges[tensor] = choose_range(self.statistics.samples[tensor])
        return self._ranges[tensor]

    def stitch(self, plan: CompressionPlan) -> CompressedModel:
        """Carries out a plan from the database's entries; ``plan.base`` has been dealt with by the caller."""
        graph = rewrite(self.graph, plan.groups)
        kept = {name: self.kept(name, count) for name, count in plan.groups.items()}
        weights = slice_weights(self.graph, self.weights, kept)
        scales: dict[str, torch.Tensor] = {}
        for layer in self.graph.compressible:
            layer_plan = plan.layers.get(layer.name, LayerPlan())
            bits = layer_plan.storage.bits if layer_plan.storage.scheme == "affine" else 32
            rows = self._kept_outputs(layer, kept)
            weight, bias, scale = self._entry(layer, plan.groups, bits)
            weight = weight.index_select(0, rows)
            shape = graph.tensors[layer.inputs[1]].shape
            weights[layer.inputs[1]] = from_matrix(layer, weight, shape).contiguous()
            if bits < 32:
                scales[layer.name] = scale.index_select(0, rows)
            if len(layer.inputs) > 2:
                weights[layer.inputs[2]] = bias.index_select(0, rows)
        activations = plan.activations or activation_formats(graph, plan.layers)
        plan = plan.model_copy(update={"activations": activations})
        ranges = assign_ranges(graph, activations, self.range_of)
        return CompressedModel(graph=graph, weights=weights, plan=plan, weight_scales=scales, ranges=ranges)

    def correction(self, plan: CompressionPlan) -> StatisticsCorrection:
        """A plan as stitched, its channels' statistics still to be corrected by a pass over some inputs."""
        rows = self.kept_outputs(plan)
        means = {name: value[rows[name]] for name, value in self.statistics.means.items() if name in rows}
        deviations = {name: value[rows[name]] for name, value in self.statistics.deviations.items() if name in rows}
        return StatisticsCorrection(self.stitch(plan), means, deviations)

    def kept_outputs(self, plan: CompressionPlan) -> dict[str, torch.Tensor]:
        """For each weight layer, the indices of its original output channels that a plan keeps."""
        kept = {name: self.kept(name, count) for name, count in plan.groups.items()}
        return {layer.name: self._kept_outputs(layer, kept) for layer in self.graph.compressible}

    # ------------------------------------------------------------------------------------------------ one entry

    def _entry(self, layer: Layer, keep: Mapping[str, int], bits: int) -> Entry:
        """(weight ``[all outputs, kept inputs]``, bias ``[all outputs]``, scales ``[all outputs]``)."""
        inputs = tuple((g.id, keep[g.id]) for g, _ in self._read[layer.name] if keep.get(g.id, g.size) < g.size)
        key = (layer.name, inputs, bits)
        if key not in self._entries:
            self._entries[key] = self._make_entry(layer, dict(inputs), bits)
        return self._entries[key]

    def _make_entry(self, layer: Layer, keep: Mapping[str, int], bits: int) -> Entry:
        weight = weight_matrix(layer, self.weights[layer.inputs[1]]).contiguous()
        has_bias = len(layer.inputs) > 2
        bias = self.weights[layer.inputs[2]] if has_bias else torch.zeros(weight.shape[0])
        hessian = self.statistics.hessians.get(layer.name)
        if keep:
            columns = self._kept_columns(layer, weight.shape[1], keep)
            weight, bias = self._narrowed(layer, weight, bias, columns, has_bias)
            if hessian is not None:
                places = torch.cat([columns, torch.tensor([hessian.shape[0] - 1])])
                hessian = hessian.index_select(0, places).index_select(1, places)
        if bits >= 32:
            return weight, bias, torch.ones(weight.shape[0])
        scales = row_scales(weight, bits)
        if bits >= FINE_BITS or hessian is None or not has_bias:
            return round_to_nearest(weight, scales, bits), bias, scales
        weight, bias = round_with_compensation(weight, bias, hessian, scales, bits)
        return weight, bias, scales

    def _narrowed(
        self, layer: Layer, weight: torch.Tensor, bias: torch.Tensor, columns: torch.Tensor, has_bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias once the layer reads only some columns, made up for as far as its statistics allow."""
        hessian = self.statistics.hessians.get(layer.name)
        if hessian is None:
            if has_bias and layer.name in self.statistics.moments:
                mean = self.statistics.moments[layer.name][0]
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[columns] = False
                bias = bias + weight[:, gone] @ mean[gone]
            return weight.index_select(1, columns), bias
        constant = torch.tensor([weight.shape[1]] if has_bias else [], dtype=torch.int64)
        full = torch.cat([weight, bias[:, None]], dim=1)
        read = self._read[layer.name]
        if len(read) == 1 and read[0][0].size * columns_of(self.graph, layer, read[0][1])[1] == weight.shape[1]:
            if layer.name not in self._nested:
                width = columns_of(self.graph, layer, read[0][1])[1]
                order = (self.orders[read[0][0].id][:, None] * width + torch.arange(width)).flatten()
                self._nested[layer.name] = NestedRefits(full, hessian, torch.cat([constant, order]))
            solved = self._nested[layer.name].first(len(constant) + len(columns)).float()
        else:
            solved = refit(full, hessian, torch.cat([columns, constant])).float()
        if not has_bias:
            return solved.contiguous(), bias
        return solved[:, :-1].contiguous(), solved[:, -1].contiguous()

    # ----------------------------------------------------------------------------------------- groups and axes

    def _kept_columns(self, layer: Layer, columns: int, keep: Mapping[str, int]) -> torch.Tensor:
        mask = torch.ones(columns, dtype=torch.bool)
        for group, member in self._read[layer.name]:
            if group.id in keep:
                first, width = columns_of(self.graph, layer, member)
                stays = torch.zeros(group.size, dtype=torch.bool)
                stays[self.orders[group.id][: keep[group.id]]] = True
                mask[first : first + group.size * width] = stays.repeat_interleave(width)
        return mask.nonzero().flatten()

    def _kept_outputs(self, layer: Layer, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = torch.ones(self.graph.tensors[layer.inputs[1]].shape[weight_axis(layer)], dtype=torch.bool)
        for group, member in self._made[layer.name]:
            if group.id in kept:
                stays = torch.zeros(group.size, dtype=torch.bool)
                stays[kept[group.id]] = True
                mask[member.offset : member.offset + group.size * member.repeat] = stays.repeat_interleave(
                    member.repeat
                )
        return mask.nonzero().flatten()
