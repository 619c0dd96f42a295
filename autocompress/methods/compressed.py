"""A compressed model in memory: what export, simulation and checkpoints share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autocompress.methods.calibration_report import CalibrationReport
from autocompress.plan import CompressionPlan, ModelGraph


def not_finite(graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The weights and biases of a graph's weight layers that hold a value which is no finite number.

    Other constants may: attention masks are made of infinities.
    """
    names = dict.fromkeys(name for layer in graph.compressible for name in layer.weights)
    return [name for name in names if not torch.isfinite(weights[name]).all()]


@dataclass(frozen=True)
class CompressedModel:
    """A plan carried out.

    Attributes:
        graph: the model after pruning (shapes are those of the compressed model).
        weights: every name of ``graph.weight_names()`` as a CPU tensor (float32 parameters, int64 constants).
            Weights already are what their storage format can hold: integers times their scale, or 16-bit floats.
        plan: the plan; ``plan.layers`` is keyed by layer name, ``plan.activations`` by tensor name.
        weight_scales: for each layer with affine or codebook storage, float32 ``[out_channels]``, or
            ``[out_channels, blocks]`` where blocks of inputs have their own: ``weight = scale * integer``.  A codebook
            needs no table beside them: it is the integers that occur.
        ranges: for each tensor of ``plan.activations``, the (lowest, highest) value it represents.
        calibration: how ranges and corrections were chosen, where post-training quantization chose them.
    """

    graph: ModelGraph
    weights: Mapping[str, torch.Tensor]
    plan: CompressionPlan
    weight_scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calibration: CalibrationReport | None = None
