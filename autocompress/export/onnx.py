"""Writes a compressed model as the ONNX file that ONNX Runtime executes as the plan says, in a plain session.

What decides the form, each found by reading ONNX Runtime's optimized graph:

* An int8 layer is ``DequantizeLinear -> op -> [Relu] -> QuantizeLinear`` with int8 weights behind their own
  DequantizeLinear: the runtime replaces the whole by one ``QLinearConv`` or ``QGemm``.
* Its bias stays float32: where a QuantizeLinear follows, the runtime turns it into int32 itself (its
  ``WeightBiasQuantization`` rewrite), and a stored int32 bias would need a second scale for every channel.  Where
  none follows (an output of the model) the bias is stored as int32, without which the layer would not be replaced.
* Weights of fewer than 8 bits become int8 by nodes that are folded when the model is loaded (``export/storage.py``): a
  DequantizeLinear on int4 itself is executed at every run.
* Integer weights of a float32 layer are ``Cast -> Mul``: folded when the model is loaded.  A DequantizeLinear is not.
* A product in ``int8_dynamic`` is ``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul [-> Add]``: one kernel.
* A float32 layer between int8 tensors would be quantized behind the plan's back by the same rewrite.  It asks for a
  scale per tensor, so such a layer reads its input through a DequantizeLinear with one (equal) scale per channel.
* Operators that only move values (MaxPool, Flatten, ...) work on the integers themselves.
* A hard-swish is ``x * clip(x / 6 + 1/2, 0, 1)``, and the clipped line is what integers do by themselves: x read with
  another zero point and quantized again.  ``x * sigmoid(x)`` has no such form; one float kernel between conversions is
  faster than the two integer kernels, and rounds once.
* A first convolution reads a fourth channel of zeros, for windows are gathered a word at a time.
* Products whose input comes in float quantize it while they run; rows of a table are made floats once they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from autocompress.export.activations import INTEGER_KERNELS, Activations
from autocompress.export.builder import IR_VERSIONS, RUNTIME_DOMAIN, GraphBuilder
from autocompress.export.external import LIMIT, data_path, weight_bytes, write_external
from autocompress.export.files import write_atomic
from autocompress.export.weights import WeightLayers
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import Layer, ModelGraph, Tensor, is_weight_layer
from autocompress.runtime.base import DEFAULT_RUNTIME


def to_onnx(
    compressed: CompressedModel, metadata: Mapping[str, str] | None = None, runtime: str = DEFAULT_RUNTIME
) -> onnx.ModelProto:
    """The model as ONNX: a dynamic batch, the model's own input and output names, checked.

    Args:
        compressed: what a plan made of a model.
        metadata: short facts stored in the file (``metadata_props``); each costs its length.
        runtime: what will run it.  All compute the same of any file; forms that only make ONNX Runtime faster are left
            out for others.
    """
    model = _Exporter(compressed, runtime == DEFAULT_RUNTIME).model(metadata or {})
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class Names:
    """What the tensors of a model are called in its file, whose own names are short.

    Attributes:
        integers: for each tensor held in 8 bits, its name, scale and zero point.
        floats: for each other tensor that is computed as floats, its name.
    """

    integers: Mapping[str, tuple[str, float, int]]
    floats: Mapping[str, str]


def to_onnx_named(compressed: CompressedModel) -> tuple[onnx.ModelProto, Names]:
    """:func:`to_onnx` unchecked, and what it calls the model's tensors."""
    exporter = _Exporter(compressed, True)
    model = exporter.model({})
    held = exporter.activations
    integers = {tensor: (name, *held.scales[tensor]) for tensor, name in held.integers.items()}
    return model, Names(integers, {t: name for t, name in held.floats().items() if t not in integers})


def write_onnx(
    compressed: CompressedModel,
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    runtime: str = DEFAULT_RUNTIME,
    external_above: int = LIMIT,
) -> int:
    """Writes :func:`to_onnx` to ``path`` in one step (a reader never sees half a file) and returns its bytes.

    Args:
        compressed: what a plan made of a model.
        path: of the file.
        metadata: as of :func:`to_onnx`.
        runtime: likewise.
        external_above: a model with more bytes of weights keeps them beside it, in ``<name>.data``, and both count.
    """
    target = Path(path)
    model = _Exporter(compressed, runtime == DEFAULT_RUNTIME).model(metadata or {})
    if weight_bytes(model) > external_above:
        return write_external(model, target)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    write_atomic(target, data)
    data_path(target).unlink(missing_ok=True)
    return len(data)


class _Exporter:
    def __init__(self, compressed: CompressedModel, tuned: bool) -> None:
        self.compressed = compressed
        self.graph = compressed.graph
        self.out = GraphBuilder(frozenset((*self.graph.inputs, *self.graph.outputs)))
        self.activations = Activations(compressed, self.out, tuned)
        self.weights = WeightLayers(compressed, self.activations, self.out, tuned)
        self.node_names = node_names(self.graph)

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        for name in self.graph.inputs:
            self.activations.produced(name, name)
        for layer in self.graph.layers:
            self._add(layer)
        made = self.out.model
        graph = made.graph
        graph.name = "g"
        graph.node.extend(self.out.nodes)
        graph.input.extend(_value_info(self.graph.tensors[name]) for name in self.graph.inputs)
        graph.output.extend(_value_info(self.graph.tensors[name]) for name in self.graph.outputs)
        versions = [helper.make_opsetid("", self.out.opset)]
        versions += [helper.make_opsetid(domain, 1) for domain in sorted(self.out.domains)]
        made.ir_version = IR_VERSIONS[self.out.opset]
        made.opset_import.extend(versions)
        for key, value in metadata.items():
            made.metadata_props.add(key=key, value=value)
        return made

    def _add(self, layer: Layer) -> None:
        source = layer.inputs[0] if layer.inputs else ""
        if self.activations.moves_integers(layer):
            inputs = [self.activations.integers[source], *(self.weights.stored(i) for i in layer.inputs[1:])]
            self.out.layer(layer.op, inputs, self.activations.moved(layer), layer.attributes)
            self.activations.give(layer.outputs)
            return
        if layer.name in self.activations.gates or self.activations.shifted(layer):
            return
        if layer.name in self.activations.swishes:
            self._swish(layer)
            return
        if self._runs_in_int8(layer):
            self.activations.born_int8.add(self.activations.behind_clip(layer))
        names = [self._output_name(o) for o in layer.outputs]
        if self.weights.writes(layer):
            self.weights.write(layer, names[0], self.node_names.get(layer.name, ""))
        else:
            if layer.op == "MaxPool" and source in self.activations.integers:
                inputs = [self.activations.as_float_per_axis(source)]
            else:
                inputs = [self._input(layer, i) for i in layer.inputs]
            self.out.layer(layer.op, inputs, names, layer.attributes)
        for tensor, made in zip(layer.outputs, names, strict=True):
            if tensor:
                self.activations.produced(tensor, made, layer.op)
        self.activations.give(layer.outputs)

    def _swish(self, layer: Layer) -> None:
        """``x * sigmoid(x)`` of integers: one float kernel between two conversions is faster than two integer ones."""
        source, result = self.activations.swishes[layer.name], layer.outputs[0]
        made = self._output_name(result)
        self.out.layer("QuickGelu", [self.activations.as_float(source)], [made], {"alpha": 1.0}, domain=RUNTIME_DOMAIN)
        if source in self.activations.born_int8:
            self.activations.born_int8.add(result)
        self.activations.produced(result, made)
        self.activations.give(layer.outputs)

    def _output_name(self, tensor: str) -> str:
        if not tensor:
            return ""
        return tensor if tensor in self.graph.outputs and tensor not in self.activations.scales else self.out.name()

    def _input(self, layer: Layer, tensor: str) -> str:
        if not tensor:
            return ""
        return self.weights.stored(tensor) if tensor in layer.weights else self.activations.as_float(tensor)

    def _runs_in_int8(self, layer: Layer) -> bool:
        """Whether the runtime replaces the layer by an integer kernel."""
        if is_weight_layer(layer):
            return self.weights.plan(layer).compute == "int8"
        return layer.op in INTEGER_KERNELS and all(i in self.activations.integers for i in layer.inputs)


def node_names(graph: ModelGraph) -> dict[str, str]:
    """The node name of each weight layer: its place among them, which the runtime's integer kernels keep."""
    return {layer.name: str(place) for place, layer in enumerate(graph.compressible)}


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    # The graph's shapes leave the batch out of floating tensors only.
    rest = tensor.shape if tensor.dtype.startswith("float") else tensor.shape[1:]
    return helper.make_tensor_value_info(tensor.id, kind, ["N", *rest])
