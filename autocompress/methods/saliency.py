"""Which channels matter: second-order saliency of whole channels (Optimal Brain Surgeon; ZipLM, 2302.04089)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from autocompress.methods.linear import damped_inverse
from autocompress.methods.statistics import CalibrationStatistics, weight_matrix
from autocompress.plan import Group, Layer, Member, ModelGraph

EXACT_WORK = 1 << 16
"""Channels times columns up to which one channel leaves at a time; above, as many as this goes into it."""


def group_readers(graph: ModelGraph) -> dict[str, list[tuple[Layer, Member]]]:
    """For each group, the weight layers that read its channels."""
    layers = {layer.inputs[1]: layer for layer in graph.compressible}
    return {
        group.id: [(layers[m.tensor], m) for m in group.members if m.role == "in" and m.tensor in layers]
        for group in graph.groups
    }


def columns_of(graph: ModelGraph, layer: Layer, member: Member) -> tuple[int, int]:
    """The first column of a layer's weight matrix that a group's channels fill, and how many each channel has."""
    taps = 1
    if layer.op == "Conv":
        for size in graph.tensors[layer.inputs[1]].shape[2:]:
            taps *= size
    return member.offset * taps, member.repeat * taps


def channel_orders(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], statistics: CalibrationStatistics
) -> dict[str, torch.Tensor]:
    """For each group its channels, the most important first.

    A channel costs what the layers that read it lose by its removal, once their other weights have made up for it
    as well as they can; layers are compared by the share of their own output's energy.
    """
    readers = group_readers(graph)
    last_use = {layer.name: group.id for group in graph.groups for layer, _ in readers[group.id]}
    inverses: dict[str, torch.Tensor] = {}
    orders: dict[str, torch.Tensor] = {}
    for group in graph.groups:
        states: list[_State] = []
        for layer, member in readers[group.id]:
            first, width = columns_of(graph, layer, member)
            places = slice(first, first + group.size * width)
            matrix = weight_matrix(layer, weights[layer.inputs[1]])
            if layer.name in statistics.hessians:
                hessian = statistics.hessians[layer.name]
                if layer.name not in inverses:
                    inverses[layer.name] = damped_inverse(hessian)
                inverse = inverses[layer.name]
                share = 1.0 / _energy(matrix, weights[layer.inputs[2]] if len(layer.inputs) > 2 else None, hessian)
                block = inverse[places, places].clone()
                states.append(_SecondOrder(matrix[:, places].to(block.dtype), block, width, share))
            elif layer.name in statistics.moments:
                states.append(_FirstOrder(matrix, statistics.moments[layer.name], places, width))
        orders[group.id] = _order(group, states) if states else _order_by_norm(group, weights)
        for layer, _ in readers[group.id]:
            if last_use[layer.name] == group.id:
                inverses.pop(layer.name, None)
    return orders


def _energy(matrix: torch.Tensor, bias: torch.Tensor | None, hessian: torch.Tensor) -> float:
    """The mean square of a layer's output, summed over channels."""
    last = torch.zeros(matrix.shape[0]) if bias is None else bias
    full = torch.cat([matrix, last[:, None]], dim=1).to(hessian.dtype)
    return max(float(((full @ hessian) * full).sum()), 1e-12)


def _order(group: Group, states: list[_State]) -> torch.Tensor:
    alive = torch.arange(group.size)
    removed: list[torch.Tensor] = []
    while len(alive) > 1:
        cost = torch.stack([state.costs().float() for state in states]).sum(0)
        work = len(alive) * max(state.columns for state in states)
        count = min(max(1, work // EXACT_WORK), len(alive) - 1)
        gone = cost.argsort(stable=True)[:count]
        keep = torch.ones(len(alive), dtype=torch.bool)
        keep[gone] = False
        removed.append(alive[gone])
        alive = alive[keep]
        for state in states:
            state.remove(gone, keep)
    return torch.cat([torch.cat(removed), alive]).flip(0) if removed else alive


def _order_by_norm(group: Group, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """By weight norm, where no reader has calibration statistics."""
    score = torch.zeros(group.size)
    for member in group.members:
        if member.role == "activation" or weights[member.tensor].dim() < 2:
            continue
        rows = weights[member.tensor].movedim(member.axis, 0).flatten(1)
        rows = rows[member.offset : member.offset + group.size * member.repeat]
        score += rows.reshape(group.size, -1).square().sum(1)
    return score.argsort(descending=True, stable=True)


class _State(Protocol):
    """One reader of a group while channels leave."""

    columns: int

    def costs(self) -> torch.Tensor:
        """What the removal of each remaining channel costs."""

    def remove(self, gone: torch.Tensor, keep: torch.Tensor) -> None:
        """Takes channels away: their numbers among those that remain, and a mask of the others."""


class _SecondOrder:
    """The removed columns' part is taken over by the rest, so the inverse second moments shrink with them."""

    def __init__(self, weight: torch.Tensor, inverse: torch.Tensor, width: int, share: float) -> None:
        self.weight, self.inverse, self.width, self.share = weight, inverse, width, share
        self.columns = inverse.shape[0]

    def costs(self) -> torch.Tensor:
        count = self.columns // self.width
        columns = self.weight.t().reshape(count, self.width, -1)
        if self.width == 1:
            return columns.square().sum(dim=(1, 2)) / self.inverse.diagonal().clamp_min(1e-12) * self.share
        numbers = torch.arange(count)
        blocks = self.inverse.view(count, self.width, count, self.width)[numbers, :, numbers, :]
        solved: torch.Tensor = torch.linalg.solve_triangular(_factor(blocks), columns, upper=False)
        return solved.square().sum(dim=(1, 2)) * self.share

    def remove(self, gone: torch.Tensor, keep: torch.Tensor) -> None:
        places = (gone[:, None] * self.width + torch.arange(self.width)).flatten()
        rest = keep.repeat_interleave(self.width).nonzero().flatten()
        rows = self.inverse.index_select(0, places)
        solved = torch.cholesky_solve(rows.index_select(1, rest), _factor(rows.index_select(1, places)))
        self.weight = self.weight.index_select(1, rest) - self.weight.index_select(1, places) @ solved
        inverse = self.inverse.index_select(0, rest).index_select(1, rest)
        self.inverse = inverse.sub_(rows.index_select(1, rest).t() @ solved)
        self.columns = len(rest)


class _FirstOrder:
    """For layers with too many inputs for their second moments: what is lost if the bias alone makes up for it."""

    def __init__(
        self, matrix: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], places: slice, width: int
    ) -> None:
        mean, square = moments
        power = matrix.square().sum(0)
        variance = (square - mean.square()).clamp_min(0.0)
        energy = max(float((power * square).sum()), 1e-12)
        self._costs = (power * variance)[places].reshape(-1, width).sum(1) / energy
        self.columns = 0

    def costs(self) -> torch.Tensor:
        return self._costs

    def remove(self, gone: torch.Tensor, keep: torch.Tensor) -> None:
        self._costs = self._costs[keep]


def _factor(blocks: torch.Tensor) -> torch.Tensor:
    """Cholesky factors of positive definite blocks, with as much damping as rounding errors have made needful."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    scale = blocks.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)[..., None, None]
    factor: torch.Tensor
    for damping in (1e-7, 1e-4, 1e-1):
        factor, failed = torch.linalg.cholesky_ex(blocks + damping * scale * identity)
        if not failed.any():
            break
    return factor
