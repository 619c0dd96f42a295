"""What the lowerings of all runtimes start from: a graph, its shapes and formats under many plans, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autocompress.hardware.kernels import Number, Work
from autocompress.hardware.steps import Mask, Step
from autocompress.plan import ModelGraph

Emit = Callable[[str, str, Work, Mask, bool], None]
"""``emit(label, kind, work, mask, whole)``; without ``whole`` the work joins a kernel already emitted."""


@dataclass
class Placement:
    """A batch of plans of one graph.

    Args:
        graph: the model.
        steps: from ``steps.make_steps``.
        dims: the shape of each tensor, an entry being a number or one a plan.
        int8: for each weight layer the plans in which it computes in int8.
        held: the plans in which each activation is int8 (from ``steps.quantized_tensors``).
        count: plans.
        block: channels the runtime packs together (0: it never packs).
        batch: samples of one run.
        emit: told of every kernel.
    """

    graph: ModelGraph
    steps: tuple[Step, ...]
    dims: Mapping[str, tuple[Number, ...]]
    int8: Mapping[str, Mask]
    held: Mapping[str, Mask]
    count: int
    block: int
    batch: int
    emit: Emit

    def __post_init__(self) -> None:
        self.none = np.zeros(self.count, dtype=bool)
        self.all = ~self.none

    def _elements(self, tensor: str) -> Number:
        count: Number = self.batch
        for size in self.dims[tensor]:
            count = count * size
        return count

    def _mask(self, condition: Number) -> Mask:
        return condition if isinstance(condition, np.ndarray) else (self.all if condition else self.none)

    def _is_held(self, tensor: str) -> Mask:
        return self.held.get(tensor, self.none)

    def _factors(self, step: Step) -> tuple[str, Number, Number, Number]:
        """Of a matrix product: its class without the type, its rows, and the sides of its matrix."""
        layer = step.layer
        *leading, inputs = self.dims[layer.inputs[0]]
        rows: Number = self.batch
        for size in leading:
            rows = rows * size
        name = "gemm" if layer.op == "Gemm" else "matmul"
        return name, rows, inputs, self.dims[layer.outputs[0]][-1]
