"""The torch simulation and the exported file side by side, tensor by tensor: which is the first that departs.

Each layer is judged by itself: once a tensor is compared, the simulation goes on with the file's values, so that a
departure is not inherited from the layers before, and the first one named is where it begins.

The file's tensors are read from a copy whose outputs they are.  An output keeps the runtime from fusing what lies
around it, so only tensors are read that fusion leaves in place: the integers behind each QuantizeLinear, which are what
an integer kernel writes, and floats that no integer kernel swallows.  That the copy computes what the file computes is
checked: their own outputs must be the same to the bit, else the floats are left out, and where it is not so even then
nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from autocompress.errors import UsageError
from autocompress.export.onnx import Names, to_onnx_named
from autocompress.graph.executor import Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import MOVERS, fused_output
from autocompress.methods.simulation import build_compressed
from autocompress.plan import LayerPlan, ModelGraph, is_weight_layer
from autocompress.runtime.session import make_session

STEPS = 1.0
"""Integers may differ by one where a sum lies between two of them, and torch adds in another order."""

RELATIVE = 1e-3
"""Share of a float tensor's largest value by which it may differ."""

_SLACK = 1e-2


@dataclass(frozen=True)
class TensorDeparture:
    """How far one tensor of the file lies from its simulation, the layers before it being equal.

    Attributes:
        layer: that computes it; the tensor's own name for an input of the model.
        tensor: in the model's graph.
        unit: ``steps`` of quantization, or ``relative`` to the largest value of a float tensor.
        largest: difference of any element.
        share: of elements that differ by more than half a step (or the tolerance, for floats).
        departs: whether ``largest`` is beyond the tolerance.
    """

    layer: str
    tensor: str
    unit: Literal["steps", "relative"]
    largest: float
    share: float
    departs: bool


def compare_tensors(
    compressed: CompressedModel,
    onnx_path: Path | str,
    inputs: Sequence[torch.Tensor],
    steps: float = STEPS,
    relative: float = RELATIVE,
) -> list[TensorDeparture]:
    """Compares the file with its simulation on the same inputs.

    Args:
        compressed: what the file was written from.
        onnx_path: the file.
        inputs: one batch, in the order of the model's inputs.
        steps: quantization steps by which integers may differ.
        relative: share of the largest value by which floats may differ.

    Returns:
        One entry a tensor, in execution order.

    Raises:
        UsageError: the file is missing, was not written from this model, or cannot be looked into without changing
            what it computes.
    """
    path = Path(onnx_path)
    if not path.is_file():
        raise UsageError(f"no model file at {str(path)!r}")
    made, names = to_onnx_named(compressed)
    model = onnx.load(path)
    if list(model.graph.node) != list(made.graph.node):
        raise UsageError(f"{path} was not written from this model and plan: its operators are others")
    feed = {name: value.numpy() for name, value in zip(compressed.graph.inputs, inputs, strict=True)}
    found = _values(model, names, _plain_floats(compressed, names), feed)
    return _Comparison(compressed, names, found, steps, relative).run(inputs)


def first_departure(departures: Sequence[TensorDeparture]) -> TensorDeparture | None:
    """The first tensor beyond its tolerance; None where there is none."""
    return next((departure for departure in departures if departure.departs), None)


class _Comparison:
    def __init__(
        self, compressed: CompressedModel, names: Names, found: dict[str, np.ndarray], steps: float, relative: float
    ) -> None:
        self.compressed = compressed
        self.names = names
        self.found = found
        self.steps = steps
        self.relative = relative
        self.departures: list[TensorDeparture] = []

    def run(self, inputs: Sequence[torch.Tensor]) -> list[TensorDeparture]:
        module = build_compressed(self.compressed)
        module.taps = {**module.taps, **{tensor: self._tap(tensor, module.taps.get(tensor)) for tensor in self.found}}
        with torch.no_grad():
            module(*inputs)
        return self.departures

    def _tap(self, tensor: str, rounding: Tap | None) -> Tap:
        """Rounds as the simulation does, compares, and hands on the file's value."""

        def tap(value: torch.Tensor) -> torch.Tensor:
            # A tap may work in place, and what it is given may be an input of the caller.
            simulated = rounding(value.clone()) if rounding is not None else value
            actual = self._actual(tensor)
            self._record(tensor, simulated, actual)
            return actual

        return tap

    def _actual(self, tensor: str) -> torch.Tensor:
        if tensor not in self.names.integers:
            return torch.from_numpy(self.found[tensor])
        _, scale, zero = self.names.integers[tensor]
        return torch.from_numpy((self.found[tensor].astype(np.float32) - zero) * np.float32(scale))

    def _record(self, tensor: str, simulated: torch.Tensor, actual: torch.Tensor) -> None:
        producer = self.compressed.graph.producers.get(tensor)
        layer = tensor if producer is None else producer.name
        difference = (simulated - actual).abs()
        if tensor in self.names.integers:
            difference = difference / self.names.integers[tensor][1]
            largest, share = float(difference.max()), float((difference > 0.5).float().mean())
            departs = not largest <= self.steps + _SLACK
            self.departures.append(TensorDeparture(layer, tensor, "steps", largest, share, departs))
            return
        difference = difference / max(float(actual.abs().max()), 1e-12)
        largest, share = float(difference.max()), float((difference > self.relative).float().mean())
        self.departures.append(TensorDeparture(layer, tensor, "relative", largest, share, not largest <= self.relative))


def _plain_floats(compressed: CompressedModel, names: Names) -> dict[str, str]:
    """Float tensors that the runtime really makes: the end of what it fuses, and no part of an integer kernel."""
    graph, chosen = compressed.graph, {}
    for layer in graph.layers:
        tensor = layer.outputs[0]
        plan = compressed.plan.layers.get(layer.name, LayerPlan())
        swallowed = is_weight_layer(layer) and plan.compute != "fp32"
        if tensor not in names.floats or graph.tensors[tensor].dtype != "float32":
            continue
        if _moved_to_integers(compressed.graph, names, tensor) or fused_output(graph, layer) != tensor:
            continue
        if tensor in graph.outputs or not (swallowed or set(layer.activations) <= names.integers.keys()):
            chosen[tensor] = names.floats[tensor]
    return chosen


def _moved_to_integers(graph: ModelGraph, names: Names, tensor: str) -> bool:
    """Whether a tensor is rounded behind operators that only move it: the runtime rounds it before it moves it."""
    movers = [layer for layer in graph.consumers.get(tensor, ()) if layer.op in MOVERS]
    moved = [out for layer in movers for out in layer.outputs]
    return any(out in names.integers or _moved_to_integers(graph, names, out) for out in moved)


def _values(
    model: onnx.ModelProto, names: Names, floats: dict[str, str], feed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The file's tensors by their name in the graph, of a copy that is known to compute the same."""
    plain = [output.name for output in model.graph.output]
    expected = make_session(model.SerializeToString()).run(plain, feed)
    integers = {tensor: name for tensor, (name, _, _) in names.integers.items()}
    for wanted in ({**integers, **floats}, {**integers, **{t: n for t, n in floats.items() if n in plain}}):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        kinds = dict.fromkeys(integers.values(), onnx.TensorProto.UINT8)
        for name in sorted(set(wanted.values()) - set(plain)):
            # The shape stays open: it is whatever the batch makes it.
            kind = kinds.get(name, onnx.TensorProto.FLOAT)
            copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        order = list(wanted.values())
        results = make_session(copy.SerializeToString()).run([*plain, *order], feed)
        if all(np.array_equal(a, b) for a, b in zip(expected, results, strict=False)):
            return dict(zip(wanted, results[len(plain) :], strict=True))
    raise UsageError("the runtime computes something else as soon as the file's tensors are looked at one by one")
