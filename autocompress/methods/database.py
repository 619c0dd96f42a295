"""The database of compressed layers: recover each layer once, then stitch candidates from the pieces.

Channels leave in the order of second-order saliency (Optimal Brain Surgeon; for structures ZipLM, 2302.04089), and the
weights that stay are re-fitted in closed form to the layer's original output on calibration data (2208.11580,
2602.05243).  An entry depends on the channels a layer reads and on its number format; which of its output channels
are kept only selects rows, so entries are few and each is made once, when first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import activation_formats, assign_ranges
from autocompress.methods.rounding import round_to_nearest, round_with_compensation, row_scales
from autocompress.methods.statistics import (
    CalibrationStatistics,
    choose_range,
    from_matrix,
    weight_matrix,
)
from autocompress.plan import CompressionPlan, Group, Layer, LayerPlan, Member, ModelGraph

DAMPING = 0.01


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
        self.orders = {group.id: self._order(group) for group in graph.groups}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._entries: dict[tuple[str, tuple[tuple[str, int], ...], int], tuple[torch.Tensor, ...]] = {}
        self._readers = {layer.name: self._input_groups(layer) for layer in graph.compressible}

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

    def kept_outputs(self, plan: CompressionPlan) -> dict[str, torch.Tensor]:
        """For each weight layer, the indices of its original output channels that a plan keeps."""
        kept = {name: self.kept(name, count) for name, count in plan.groups.items()}
        return {layer.name: self._kept_outputs(layer, kept) for layer in self.graph.compressible}

    # ------------------------------------------------------------------------------------------------ one entry

    def _entry(self, layer: Layer, keep: Mapping[str, int], bits: int) -> tuple[torch.Tensor, ...]:
        """(weight ``[all outputs, kept inputs]``, bias ``[all outputs]``, scales ``[all outputs]``)."""
        inputs = tuple((m.id, keep[m.id]) for m, _ in self._readers[layer.name] if m.id in keep)
        key = (layer.name, inputs, bits)
        if key not in self._entries:
            self._entries[key] = self._make_entry(layer, dict(inputs), bits)
        return self._entries[key]

    def _make_entry(self, layer: Layer, keep: Mapping[str, int], bits: int) -> tuple[torch.Tensor, ...]:
        weight = weight_matrix(layer, self.weights[layer.inputs[1]]).contiguous()
        has_bias = len(layer.inputs) > 2
        bias = self.weights[layer.inputs[2]] if has_bias else torch.zeros(weight.shape[0])
        hessian = self.statistics.hessians.get(layer.name)
        if keep:
            columns = self._kept_columns(layer, weight.shape[1], keep)
            if hessian is None:
                weight = weight.index_select(1, columns)
            else:
                weight, bias = _refit(weight, bias, hessian, columns, has_bias)
                places = torch.cat([columns, torch.tensor([hessian.shape[0] - 1])])
                hessian = hessian[places][:, places]
        if bits >= 32:
            return weight, bias, torch.ones(weight.shape[0])
        scales = row_scales(weight, bits)
        if bits >= 8 or hessian is None or not has_bias:
            return round_to_nearest(weight, scales, bits), bias, scales
        weight, bias = round_with_compensation(weight, bias, hessian, scales, bits)
        return weight, bias, scales

    # ----------------------------------------------------------------------------------------- groups and axes

    def _input_groups(self, layer: Layer) -> list[tuple[Group, Member]]:
        """The groups whose channels the layer reads through its weight."""
        weight = layer.inputs[1]
        return [(g, m) for g in self.graph.groups for m in g.members if m.tensor == weight and m.role == "in"]

    def _kept_columns(self, layer: Layer, columns: int, keep: Mapping[str, int]) -> torch.Tensor:
        mask = torch.ones(columns, dtype=torch.bool)
        for group, member in self._readers[layer.name]:
            if group.id in keep:
                gone = self.orders[group.id][keep[group.id] :]
                mask[_columns_of(layer, member, gone, self.graph)] = False
        return mask.nonzero().flatten()

    def _kept_outputs(self, layer: Layer, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight = layer.inputs[1]
        count = self.graph.tensors[weight].shape[0 if layer.op == "Conv" or layer.attributes.get("transB") else 1]
        mask = torch.ones(count, dtype=torch.bool)
        for group in self.graph.groups:
            if group.id not in kept:
                continue
            for member in group.members:
                if member.tensor == weight and member.role in ("out", "through"):
                    gone = torch.ones(group.size, dtype=torch.bool)
                    gone[kept[group.id]] = False
                    places = member.offset + gone.nonzero() * member.repeat + torch.arange(member.repeat)
                    mask[places.flatten()] = False
        return mask.nonzero().flatten()

    def _order(self, group: Group) -> torch.Tensor:
        """Channels from the most to the least important."""
        states = []
        for layer in self.graph.compressible:
            for member in group.members:
                if member.role == "in" and member.tensor == layer.inputs[1] and layer.name in self.statistics.hessians:
                    matrix = weight_matrix(layer, self.weights[layer.inputs[1]]).double()
                    bias = self.weights[layer.inputs[2]] if len(layer.inputs) > 2 else torch.zeros(matrix.shape[0])
                    full = torch.cat([matrix, bias[:, None].double()], dim=1)
                    inverse = torch.linalg.inv(_damped(self.statistics.hessians[layer.name]))
                    places = torch.stack(
                        [_columns_of(layer, member, torch.tensor([c]), self.graph) for c in range(group.size)]
                    )
                    # Layers are compared by the share of their own output's energy that a removal costs.
                    energy = (full @ self.statistics.hessians[layer.name].double() * full).sum().clamp_min(1e-12)
                    states.append(_Saliency(full, inverse, places, 1.0 / float(energy)))
        if not states:
            return self._order_by_norm(group)
        removed: list[int] = []
        alive = torch.ones(group.size, dtype=torch.bool)
        for _ in range(group.size - 1):
            cost = torch.stack([state.costs() for state in states]).sum(0)
            channel = int(torch.where(alive, cost, torch.inf).argmin())
            alive[channel] = False
            removed.append(channel)
            for state in states:
                state.remove(channel)
        last = [int(alive.nonzero().flatten()[0])]
        return torch.tensor(last + removed[::-1])

    def _order_by_norm(self, group: Group) -> torch.Tensor:
        """By weight norm, where no reader has calibration statistics."""
        score = torch.zeros(group.size)
        for member in group.members:
            if member.role == "activation" or self.weights[member.tensor].dim() < 2:
                continue
            weight = self.weights[member.tensor].transpose(0, member.axis).flatten(1)
            places = member.offset + torch.arange(group.size)[:, None] * member.repeat + torch.arange(member.repeat)
            score += weight[places.flatten()].reshape(group.size, -1).square().sum(1)
        return score.argsort(descending=True)


class _Saliency:
    """Optimal Brain Surgeon over blocks of columns of one layer (a channel's taps)."""

    def __init__(
        self, weight: torch.Tensor, inverse: torch.Tensor, places: torch.Tensor, weight_of_layer: float
    ) -> None:
        self.weight, self.inverse, self.places, self.share = weight, inverse, places, weight_of_layer
        self.alive = torch.ones(places.shape[0], dtype=torch.bool)

    def costs(self) -> torch.Tensor:
        """The rise of the squared output error when each channel goes, its removal compensated by the rest."""
        blocks = self.inverse[self.places[:, :, None], self.places[:, None, :]]
        blocks = blocks + 1e-9 * torch.eye(blocks.shape[-1], dtype=blocks.dtype)
        columns = self.weight[:, self.places].permute(1, 2, 0)
        cost = (columns * torch.linalg.solve(blocks, columns)).sum(dim=(1, 2))
        return torch.where(self.alive, cost * self.share, torch.inf)

    def remove(self, channel: int) -> None:
        places = self.places[channel]
        block = self.inverse[places][:, places] + 1e-9 * torch.eye(len(places), dtype=self.inverse.dtype)
        solved = torch.linalg.solve(block, self.inverse[places])
        self.weight = self.weight - self.weight[:, places] @ solved
        self.inverse = self.inverse - self.inverse[:, places] @ solved
        self.weight[:, places] = 0.0
        # The removed rows become an identity so that later solves of this block stay regular.
        self.inverse[places] = 0.0
        self.inverse[:, places] = 0.0
        self.inverse[places, places] = 1.0
        self.alive[channel] = False


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    matrix = hessian.double()
    return matrix + DAMPING * matrix.diagonal().mean().clamp_min(1e-8) * torch.eye(matrix.shape[0], dtype=matrix.dtype)


def _columns_of(layer: Layer, member: Member, channels: torch.Tensor, graph: ModelGraph) -> torch.Tensor:
    """The columns of a layer's weight matrix that belong to channels of a group it reads."""
    taps = 1
    if layer.op == "Conv":
        for size in graph.tensors[layer.inputs[1]].shape[2:]:
            taps *= size
    width = member.repeat * taps
    start = (member.offset + channels * member.repeat) * taps
    return (start[:, None] + torch.arange(width)).flatten()


def _refit(
    weight: torch.Tensor, bias: torch.Tensor, hessian: torch.Tensor, columns: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares weights on the columns that stay: ``W H[:, S] H[S, S]^-1``, the bias among them."""
    full = torch.cat([weight, bias[:, None]], dim=1).double()
    matrix = _damped(hessian)
    places = torch.cat([columns, torch.tensor([matrix.shape[0] - 1])]) if has_bias else columns
    target = full @ matrix[:, places]
    solved = torch.linalg.solve(matrix[places][:, places], target.t()).t().float()
    if not has_bias:
        return solved, bias
    return solved[:, :-1].contiguous(), solved[:, -1].contiguous()
