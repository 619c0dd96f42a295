"""Which kernels the runtime executes for an ONNX file, with the shapes of everything they read and write.

The file is opened as a user would open it and run once on made-up inputs.  What that run tells is taken for its shapes
alone: its times are thrown away, so what is read here can be priced for any device.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from autocompress.errors import UsageError, unknown_name

LAYOUTS = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
"""Fused, folded, and laid out for this machine: what is executed here."""

FUSED = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
"""Fused and folded, without the layouts of this machine: the nearest there is to what another device executes."""

AS_WRITTEN = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
"""The file's own operators: what multiply-accumulates are counted on."""

WIDTHS = {
    "double": 8, "int64": 8, "uint64": 8, "float": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "uint16": 2, "int8": 1, "uint8": 1, "bool": 1, "int4": 0.5, "uint4": 0.5,
}  # fmt: skip
"""Bytes an element, by the runtime's names of types."""

_NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class ExecutedNode:
    """One node as the runtime executed it; ``arguments`` is the runtime's own record of its shapes."""

    name: str
    node: onnx.NodeProto
    arguments: Mapping[str, Any]

    @property
    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of each output."""
        names = [name for name in self.node.output if name]
        entries = [next(iter(entry.items())) for entry in self.arguments["output_type_shape"]]
        return [(name, kind, tuple(shape)) for name, (kind, shape) in zip(names, entries, strict=False)]


@dataclass(frozen=True)
class ExecutedGraph:
    """What one run of a file executed, in order.

    Attributes:
        weights: the shape of every stored tensor.
        values: the shape of every tensor computed or given, by name.
        bytes: how much each of those takes.
        types: the runtime's name of the type of each.
        inputs: names of the model's inputs.
        outputs: names of its outputs.
    """

    nodes: tuple[ExecutedNode, ...]
    weights: Mapping[str, tuple[int, ...]]
    values: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, float]
    types: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """The shape of a stored or computed tensor; None for one that never existed."""
        return self.weights.get(tensor, self.values.get(tensor))


def read_model(path: Path) -> onnx.ModelProto:
    """The structure of an ONNX file, without data stored outside it.

    Raises:
        UsageError: there is no such file, or it is no ONNX model.
    """
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder; give the .onnx file in it")
    if not path.is_file():
        raise UsageError(f"no model file at {str(path)!r}")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise UsageError(f"{str(path)!r} is not an ONNX model, or is cut short: {_first_line(error)}") from error
    if not model.graph.node or not model.ir_version:
        raise UsageError(f"{str(path)!r} is not an ONNX model: there is no operator in it")
    return model


def execute(
    path: Path,
    level: ort.GraphOptimizationLevel = LAYOUTS,
    *,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
) -> ExecutedGraph:
    """Runs a file once and tells what was executed.

    Args:
        path: the ONNX file; data stored beside it is found by the runtime.
        level: which optimizations the runtime makes.
        batch: the size of a first axis that the file leaves open.
        dims: the sizes of other open axes, by the names the file gives them.

    Raises:
        UsageError: the runtime cannot open or run the file, or an open axis has no size.
    """
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        target = Path(folder) / "executed.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(target)
        # Numbers go to a file beside it that nobody reads: a model in one piece could not be larger than 2 GB.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "numbers")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4  # what goes wrong is raised
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a dozen exceptions without a common base
            raise UsageError(
                f"onnxruntime {ort.__version__} cannot open {str(path)!r}: {_first_line(error)}"
            ) from error
        shapes = input_shapes(session, path, batch, dims or {})
        feed = _run(session, shapes, path)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        model = onnx.load(target, load_external_data=False)
    nodes = tuple(_match(model.graph, _events(events)))
    values = {name: array.shape for name, array in feed.items()}
    types = {given.name: given.type[len("tensor(") : -1] for given in session.get_inputs()}
    weights = {i.name: tuple(i.dims) for graph in _graphs(model.graph) for i in graph.initializer}
    for executed in nodes:
        read = executed.arguments["input_type_shape"]
        # What a loop or a branch hands to the nodes in it is the output of none of them.
        if read and executed.node.input[0] not in values and executed.node.input[0] not in weights:
            kind, shape = next(iter(read[0].items()))
            values[executed.node.input[0]], types[executed.node.input[0]] = tuple(shape), kind
        for name, kind, shape in executed.outputs:
            values[name], types[name] = shape, kind
    return ExecutedGraph(
        nodes=nodes,
        weights=weights,
        values=values,
        bytes={name: WIDTHS.get(kind, 4) * math.prod(values[name]) for name, kind in types.items()},
        types=types,
        inputs=tuple(feed),
        outputs=tuple(output.name for output in model.graph.output),
    )


def input_shapes(
    session: ort.InferenceSession, path: Path, batch: int, dims: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shape given to each input: an open first axis takes the batch, others what ``dims`` says of their name."""
    inputs = session.get_inputs()
    known = {i.shape[0]: batch for i in inputs if i.shape and isinstance(i.shape[0], str)} | dict(dims)
    shapes: dict[str, tuple[int, ...]] = {}
    open_axes: dict[str, None] = {}
    for given in inputs:
        shape = []
        for axis, size in enumerate(given.shape):
            name = size or f"{given.name}.{axis}"
            if isinstance(size, int):
                shape.append(size)
                continue
            open_axes.setdefault(name)
            if name not in known and axis > 0:
                raise UsageError(
                    f"input {given.name!r} of {str(path)!r} has an open axis {name!r}, and its cost depends on it; "
                    f"say what to assume, for example with --dim {name}=128"
                )
            shape.append(known.get(name, batch))
        shapes[given.name] = tuple(shape)
    for name, size in dims.items():
        if size < 1:
            raise UsageError(f"axis {name!r} cannot have size {size}; give 1 or more")
        if name not in open_axes:
            raise unknown_name("open axis", name, open_axes)
    return shapes


def _run(session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, np.ndarray]:
    """Runs once; integers are ones, or zeros where ones are no index the model takes."""
    error: Exception | None = None
    for whole in (1, 0):
        feed = _feed(session, shapes, whole)
        try:
            session.run(None, feed)
        except Exception as raised:  # the runtime has a dozen exceptions without a common base
            error = error or raised
        else:
            return feed
    assert error is not None
    raise UsageError(f"onnxruntime {ort.__version__} cannot run {str(path)!r}: {_first_line(error)}") from error


def _feed(session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]], whole: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        dtype = _NUMPY.get(given.type)
        if dtype is None:
            allowed = ", ".join(name[7:-1] for name in _NUMPY)
            raise UsageError(f"cannot make up input {given.name!r} of type {given.type}; allowed: {allowed}")
        shape = shapes[given.name]
        numbers = rng.random(shape) if np.issubdtype(dtype, np.floating) else np.full(shape, whole)
        feed[given.name] = numbers.astype(dtype)
    return feed


def _events(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and record of each kernel of the last run, in order."""
    last: list[tuple[str, Mapping[str, Any]]] = []
    current: list[tuple[str, Mapping[str, Any]]] = []
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            current.append((name.removesuffix("_kernel_time"), event["args"]))
        elif name == "model_run":
            last, current = current, []
    return last


def _match(graph: onnx.GraphProto, events: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ExecutedNode]:
    """Joins the runtime's record with its graph: in order where they agree, else by name, else by operator."""
    nodes = list(graph.node)
    if [node.op_type for node in nodes] == [arguments["op_name"] for _, arguments in events]:
        yield from (ExecutedNode(name, node, arguments) for node, (name, arguments) in zip(nodes, events, strict=True))
        return
    # Branches and loops: their nodes are recorded once for each time they run.
    every = [node for inner in _graphs(graph) for node in inner.node]
    named = {node.name: node for node in every if node.name}
    unnamed: dict[str, deque[onnx.NodeProto]] = defaultdict(deque)
    for node in every:
        if not node.name:
            unnamed[node.op_type].append(node)
    for name, arguments in events:
        waiting = unnamed[str(arguments["op_name"])]
        node = named.get(name)
        if node is None and waiting:
            node = waiting[0]
            waiting.rotate(-1)
        if node is not None and not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            yield ExecutedNode(name, node, arguments)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _first_line(error: Exception) -> str:
    """What an exception of a library says, without the places in its source that it names first."""
    text = str(error).strip()
    text = text.partition(" : FAIL : ")[2] or text
    line = text.partition("\n")[0]
    return line or type(error).__name__
