"""What ONNX Runtime really executes, read from the graph it has optimized for this machine.

Constant folding and fusion are not promised by any standard, so each exported file is checked: an "int8" layer that
the runtime executes in float between two conversions is slower than the float model it came from.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime as ort

from autocompress.errors import UsageError
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import LayerPlan

INTEGER_LEVEL = 4
"""The accuracy_level at which MatMulNBits computes in integers; at 0, its default, it is up to 30 times slower."""

Kind = Literal["int8", "fp32", "convert", "other"]

WEIGHT_KERNELS_INT8 = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
    }
)
WEIGHT_KERNELS_NBITS = frozenset({"MatMulNBits"})
WEIGHT_KERNELS_FP32 = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
CONVERSIONS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "ReorderInput",
        "ReorderOutput",
        "Transpose",
        "Cast",
    }
)
_MOVERS = frozenset(
    {
        "Flatten",
        "MaxPool",
        "NhwcMaxPool",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "Slice",
        "Split",
        "Pad",
        "Concat",
    }
)
_FLOAT_RESULTS = frozenset({"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"})
_FREE = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant"})


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph; ``name`` is that of the exported node it came from, where it had one.

    ``accuracy_level`` is what a MatMulNBits is told: 4 computes in integers, less in floats.  ``half`` says whether
    it reads stored 16-bit floats.
    """

    op: str
    domain: str
    kind: Kind
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    accuracy_level: int | None = None
    half: bool = False


@dataclass(frozen=True)
class KernelReport:
    """The kernels of one artifact.

    ``counts`` has ``int8``, ``fp32``, ``convert`` (quantize, dequantize, reorder, transpose, cast) and ``other``
    (operators that compute nothing, such as Flatten).
    """

    counts: Mapping[str, int]
    nodes: tuple[Kernel, ...]

    @property
    def int8_weight_layers(self) -> int:
        """Layers with weights that are executed in integers."""
        return sum(node.op in WEIGHT_KERNELS_INT8 for node in self.nodes)

    @property
    def weight_only_layers(self) -> int:
        """Products whose weights alone are few-bit integers."""
        return sum(node.op in WEIGHT_KERNELS_NBITS for node in self.nodes)

    @property
    def fp32_weight_layers(self) -> int:
        """Layers with weights that are executed in float."""
        return sum(node.op in WEIGHT_KERNELS_FP32 for node in self.nodes)


def optimized_graph(model: Path | str | bytes, threads: int = 1) -> onnx.ModelProto:
    """The graph that a plain session executes: fused, folded and laid out for this machine.

    It is not portable (its layouts are this CPU's), so it is read and thrown away.
    """
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"no model file at {str(model)!r}")
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        target = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3  # it warns that the graph is for this machine only, which is the point
        source = model if isinstance(model, bytes) else str(model)
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


def executed_kernels(model: Path | str | bytes, threads: int = 1) -> KernelReport:
    """Classifies every node that the runtime executes for an artifact."""
    graph = optimized_graph(model, threads).graph
    integer: set[str] = set()
    halves = {stored.name for stored in graph.initializer if stored.data_type == onnx.TensorProto.FLOAT16}
    nodes = []
    for node in graph.node:
        kind = _kind(node, integer)
        if (
            (kind == "int8" and node.op_type not in _FLOAT_RESULTS)
            or node.op_type == "QuantizeLinear"
            or (node.op_type in _MOVERS | {"Transpose"} and node.input[0] in integer)
        ):
            integer.update(node.output)
        made = Kernel(
            node.op_type,
            node.domain,
            kind,
            node.name,
            tuple(node.input),
            tuple(node.output),
            accuracy_level=_level(node),
            half=not halves.isdisjoint(node.input),
        )
        nodes.append(made)
    counts: Counter[str] = Counter({"int8": 0, "fp32": 0, "convert": 0, "other": 0})
    counts.update(node.kind for node in nodes)
    return KernelReport(dict(counts), tuple(nodes))


def _kind(node: onnx.NodeProto, integer: set[str]) -> Kind:
    if node.op_type in CONVERSIONS:
        return "convert"
    if node.op_type in _FREE:
        return "other"
    if node.op_type in WEIGHT_KERNELS_INT8 or node.op_type.startswith(("QLinear", "QAttention", "QEmbed")):
        return "int8"
    if node.op_type in WEIGHT_KERNELS_NBITS:
        return "int8" if _level(node) == INTEGER_LEVEL else "fp32"
    if node.op_type in _MOVERS and node.input and node.input[0] in integer:
        return "int8"
    return "fp32"


def _level(node: onnx.NodeProto) -> int | None:
    if node.op_type not in WEIGHT_KERNELS_NBITS:
        return None
    return next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)


def check_kernels(compressed: CompressedModel, report: KernelReport) -> list[str]:
    """What the runtime executes otherwise than the plan says; empty where the artifact is the plan."""
    layers = compressed.graph.compressible
    plans = compressed.plan.layers
    planned = [plans.get(layer.name, LayerPlan()).compute for layer in layers]
    executed = _executed_layers(report)
    wrong: list[str] = []
    told: set[str] = set()
    for place, (layer, plan) in enumerate(zip(layers, planned, strict=True)):
        runs = executed.get(str(place), "float")
        if runs != ("float" if plan == "fp32" else plan):
            how, advice = _said(plan, runs)
            again = advice in told
            told.add(advice)
            text = f"layer {layer.name!r} is {plan} in the plan, but the runtime executes it {how}"
            wrong.append(text if again else text + advice)
    integer = sum(compute in ("int8", "int8_dynamic") for compute in planned)
    if report.int8_weight_layers != integer:
        wrong.append(f"the plan computes {integer} layers in int8, the runtime executes {report.int8_weight_layers}")
    blocks, found = planned.count("weight_only"), report.weight_only_layers
    if found != blocks:
        wrong.append(f"the plan computes {blocks} layers from few-bit weights, the runtime executes {found}")
    # More are no fault: the runtime executes, for one, a batch norm that follows no convolution as a convolution.
    fp32 = planned.count("fp32")
    if report.fp32_weight_layers < fp32:
        wrong.append(f"the plan computes {fp32} layers in fp32, the runtime executes {report.fp32_weight_layers}")
    return wrong


def _executed_layers(report: KernelReport) -> dict[str, str]:
    """How each layer runs that does not in float, by its place: a type of the plan, or what is wrong with it."""
    makers = {output: node.op for node in report.nodes for output in node.outputs}
    found: dict[str, str] = {}
    for node in report.nodes:
        # The exporter names each weight layer by its place, and the runtime's integer kernels keep that before a "_".
        place = node.name.partition("_")[0]
        if node.op in WEIGHT_KERNELS_NBITS:
            found[place] = "weight_only" if node.accuracy_level == INTEGER_LEVEL else f"level {node.accuracy_level}"
        elif node.op in WEIGHT_KERNELS_FP32 and node.half:
            found[place] = "fp16"
        elif node.op in ("ConvInteger", "MatMulInteger"):
            found[place] = node.op
        elif node.op in WEIGHT_KERNELS_INT8:
            dynamic = node.op == "DynamicQuantizeMatMul" or (
                node.op == "MatMulIntegerToFloat" and makers.get(node.inputs[0]) == "DynamicQuantizeLinear"
            )
            found[place] = "int8_dynamic" if dynamic else "int8"
    return found


def _said(plan: str, runs: str) -> tuple[str, str]:
    """How a layer runs, and why and what to do instead where that can be said."""
    if runs.startswith("level"):
        how = f"as MatMulNBits with accuracy_{runs}"
        return how, f", in floats and up to 30 times slower; write accuracy_level={INTEGER_LEVEL}"
    if runs == "ConvInteger":
        return f"as {runs}", ", 4 to 20 times slower than the float convolution; give it int8 or fp32"
    if runs == "MatMulInteger":
        return f"as {runs}", ", not fused with what scales its result; give it int8 or fp32"
    if plan == "fp16":
        return f"in {runs}", (
            ": ONNX Runtime has no fp16 kernels for this CPU; give it fp32 with weights stored as float of 16 bits, "
            "which is as small and no slower"
        )
    return f"in {runs}", ""
