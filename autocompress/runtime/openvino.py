"""OpenVINO on the CPU (the extra ``openvino``): sessions of the same artifacts, and what of them it executes.

OpenVINO reads the quantize and dequantize nodes of an artifact and carries the integers through whole stretches of it.
Sessions compute floats in float32 (processors with bfloat16 units would otherwise round without a word) and keep
weight-only layers in float (their activations would otherwise be quantized on the way in).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.errors import UsageError
from autocompress.runtime.base import Artifact, InputInfo, check_session
from autocompress.runtime.kernels import Kernel, KernelReport, Kind

try:
    import openvino as ov
except ModuleNotFoundError as _error:
    if _error.name != "openvino":
        raise
    raise UsageError(
        "the runtime 'openvino' needs a package that is not installed: pip install 'autocompress[openvino]'"
    ) from _error

WEIGHT_OPS = {"Convolution": "Conv", "FullyConnected": "Gemm", "MatMul": "MatMul"}
"""Operators with weights, by OpenVINO's names, and ONNX's for them in float; in integers they have others."""

_INTEGER_OPS = {"Convolution": "QLinearConv", "FullyConnected": "QLinearMatMul", "MatMul": "QLinearMatMul"}
_CONVERSIONS = frozenset({"FakeQuantize", "Convert", "Reorder", "Transpose"})
_FREE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_NO_KERNELS = frozenset({"Const", "Input", "Output"})
INTEGERS = frozenset({"u8", "i8"})


@dataclass(frozen=True)
class RuntimeInput:
    """What a kernel reads: a tensor of another kernel or, where ``constant``, stored numbers."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool
    source: str


@dataclass(frozen=True)
class RuntimeNode:
    """One node of OpenVINO's execution graph, those that only give constants left out.

    Attributes:
        name: its own name, as in the profile.
        op: OpenVINO's ``layerType``.
        primitive: the implementation, such as ``brgconv_avx512_I8``; it ends with the type computed in.
        precision: what it reads.
        written: what it writes.
        layout: of what it writes, as letters (``acdb``: channels last).
        origins: names of the artifact's nodes that it stands for.
        computes: OpenVINO's types of these, as far as they were in the model when it was read.
        inputs: in order; a convolution has its weights second.
        shape: of its first output.
    """

    name: str
    op: str
    primitive: str
    precision: str
    written: str
    layout: str
    origins: tuple[str, ...]
    computes: frozenset[str]
    inputs: tuple[RuntimeInput, ...]
    shape: tuple[int, ...]

    @property
    def integer(self) -> bool:
        """Whether it computes in integers."""
        return self.primitive.upper().endswith(("_I8", "_U8"))


class OpenvinoSession:
    """A compiled model with one request; inputs are copied into tensors that stay bound to it."""

    def __init__(self, model: Artifact, threads: int, batch: int | None, profiling: bool = False) -> None:
        check_session(model, threads)
        read = _core().read_model(model if isinstance(model, bytes) else str(model))
        if batch is not None:
            shapes = {given.get_any_name(): given.get_partial_shape() for given in read.inputs}
            read.reshape({name: _with_batch(shape, batch) for name, shape in shapes.items()})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "ENABLE_CPU_PINNING": False,
            "PERF_COUNT": profiling,
        }
        self._types = {op.get_friendly_name(): op.get_type_name() for op in read.get_ops()}
        self._compiled = _core().compile_model(read, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._bound: dict[str, Any] = {}
        self._outputs = len(self._compiled.outputs)
        # The compiled model may have lost names that the model's readers rely on.
        self.inputs = tuple(
            InputInfo(
                given.get_any_name(),
                tuple(int(s.get_length()) if s.is_static else None for s in given.get_partial_shape()),
                np.dtype(given.get_element_type().to_dtype()).name,
            )
            for given in read.inputs
        )

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs for inputs by name."""
        for name, array in feed.items():
            bound = self._bound.get(name)
            if bound is None or bound.shape != array.shape:
                bound = np.ascontiguousarray(array).copy()
                self._request.set_tensor(name, ov.Tensor(bound, shared_memory=True))
                self._bound[name] = bound
            else:
                np.copyto(bound, array)
        self._request.infer(share_outputs=True)
        return [self._request.get_output_tensor(i).data.copy() for i in range(self._outputs)]

    def nodes(self) -> list[RuntimeNode]:
        """The execution graph; shapes are known where the batch is."""
        return execution_graph(self._compiled.get_runtime_model(), self._types)

    def microseconds(self) -> dict[str, float]:
        """Mean microseconds of each kernel over all runs so far, cut to whole ones by the runtime."""
        return {entry.node_name: entry.real_time.total_seconds() * 1e6 for entry in self._request.profiling_info}


class OpenvinoRuntime:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    spins = False

    def version(self) -> str:
        # Behind the first dash stands the build.
        return str(ov.__version__).partition("-")[0]

    def session(self, model: Artifact, threads: int = 1, batch: int | None = None) -> OpenvinoSession:
        return OpenvinoSession(model, threads, batch)

    def executed_kernels(self, model: Artifact, threads: int = 1) -> KernelReport:
        """Classifies every kernel; those with weights are called as ONNX calls the operator that they compute.

        A kernel's ``name`` is that of the artifact's node it came from, as far as OpenVINO keeps it.
        """
        nodes = [
            Kernel(op, "openvino", _kind(n), origin, tuple(i.source for i in n.inputs), (n.name,))
            for n in OpenvinoSession(model, threads, 1).nodes()
            for op, origin in _computes(n)
        ]
        counts: Counter[str] = Counter({"int8": 0, "fp32": 0, "convert": 0, "other": 0})
        counts.update(node.kind for node in nodes)
        return KernelReport(dict(counts), tuple(nodes))


def execution_graph(model: Any, types: Mapping[str, str]) -> list[RuntimeNode]:
    """Reads a compiled model's ``get_runtime_model()``, in order of execution.

    Args:
        model: the execution graph.
        types: OpenVINO's types of the nodes of the model it was compiled from, by name.
    """
    constant: set[str] = set()
    nodes = []
    for node in model.get_ordered_ops():
        info = node.get_rt_info()
        facts = {key: info[key].astype(str) for key in _FACTS if key in info}
        name = node.get_friendly_name()
        inputs = []
        for given in node.inputs():
            source = given.get_source_output().get_node().get_friendly_name()
            inputs.append(
                RuntimeInput(
                    _shape(given.get_partial_shape()),
                    given.get_element_type().get_type_name(),
                    source in constant,
                    source,
                )
            )
        op = facts.get("layerType", node.get_type_name())
        if op == "Const" or (inputs and all(i.constant for i in inputs)):
            constant.add(name)
        elif op not in _NO_KERNELS:
            origins = tuple(part for part in facts.get("originalLayersNames", "").split(",") if part)
            nodes.append(
                RuntimeNode(
                    name=name,
                    op=op,
                    primitive=facts.get("primitiveType", ""),
                    precision=facts.get("runtimePrecision", ""),
                    written=facts.get("outputPrecisions", "").partition(",")[0],
                    layout=facts.get("outputLayouts", "").partition(",")[0],
                    origins=origins,
                    computes=frozenset(types[part] for part in origins if part in types),
                    inputs=tuple(inputs),
                    shape=_shape(node.output(0).get_partial_shape()) if node.get_output_size() else (),
                )
            )
    return nodes


_FACTS = (
    "layerType", "primitiveType", "runtimePrecision", "outputPrecisions", "outputLayouts", "originalLayersNames",
)  # fmt: skip

_shared_core: list[Any] = []


def _core() -> Any:
    """One core for the process: loading the plugin takes longer than compiling a small model."""
    if not _shared_core:
        _shared_core.append(ov.Core())
    return _shared_core[0]


def _with_batch(shape: Any, batch: int) -> list[int]:
    """The open sizes of an input are its batch."""
    return [int(size.get_length()) if size.is_static else batch for size in shape]


def _shape(shape: Any) -> tuple[int, ...]:
    return tuple(int(size.get_length()) if size.is_static else -1 for size in shape)


def _has_weights(node: RuntimeNode) -> bool:
    return node.op in WEIGHT_OPS and len(node.inputs) > 1 and node.inputs[1].constant


def matrix_weights(node: RuntimeNode) -> list[tuple[int, int]]:
    """Shapes (outputs, inputs) of the matrices of small fully connected layers that are run as one kernel."""
    if node.op != "Subgraph":
        return []
    found, width = [], next((i.shape[-1] for i in node.inputs if not i.constant and i.shape), 0)
    for given in node.inputs:
        if given.constant and len(given.shape) == 2 and given.shape[0] > 1 and given.shape[1] == width:
            found.append((given.shape[0], width))
            width = given.shape[0]
    return found


def _computes(node: RuntimeNode) -> list[tuple[str, str]]:
    """ONNX's operators and the artifact's nodes that a kernel stands for.

    ``12/WithoutBiases`` and ``12/DequantizationMultiply`` both came from the artifact's node ``12``.
    """
    origin = node.origins[0].partition("/")[0] if node.origins else ""
    if _has_weights(node):
        return [((_INTEGER_OPS if node.integer else WEIGHT_OPS)[node.op], origin)]
    layers = len(matrix_weights(node))
    if layers:
        op = (_INTEGER_OPS if node.integer else WEIGHT_OPS)["FullyConnected"]
        own = [name.partition("/")[0] for name in node.origins if name.endswith("/WithoutBiases")]
        return [(op, own[i] if i < len(own) else "") for i in range(layers)]
    return [(node.op, origin)]


def _kind(node: RuntimeNode) -> Kind:
    weights = _has_weights(node) or bool(matrix_weights(node))
    if node.op in _FREE:
        return "other"
    converts = node.op in _CONVERSIONS or (node.precision in INTEGERS) != (node.written in INTEGERS)
    if converts and not weights:
        return "convert"
    if node.integer and (weights or node.precision in INTEGERS):
        return "int8"
    return "fp32"


__all__ = ["OpenvinoRuntime", "OpenvinoSession", "RuntimeInput", "RuntimeNode", "execution_graph"]
