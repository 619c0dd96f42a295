"""From an ``nn.Module`` to layers in ONNX terms, by way of torch's own exporter, in memory."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.plan import Attribute, Layer

OPSET = 21
"""The first opset with 4-bit integers in DequantizeLinear."""

_TALKATIVE = ("torch.onnx", "torch.export", "torch._export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")
"""Loggers of the exporter; where it fails they, and it itself, show the whole graph."""

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Exported:
    """What the exporter made of a module.

    Attributes:
        layers: its operators in execution order, named after their first output.
        weights: its stored tensors; float ones bear the names they have in the module where they are unchanged.
        scopes: for each layer, the path of the module that was running.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
    """

    layers: list[Layer]
    weights: dict[str, torch.Tensor]
    scopes: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export(module: nn.Module, example_inputs: tuple[torch.Tensor, ...], output_names: Sequence[str] = ()) -> Exported:
    """Exports a module with a dynamic batch, constants folded and batch norms merged by torch's own optimizer.

    Args:
        module: in evaluation mode.
        example_inputs: a batch.
        output_names: what its outputs are called; by default, what torch calls them.

    Raises:
        UsageError: torch cannot export the module.
    """
    names, dynamic = _signature(module, len(example_inputs))
    try:
        with warnings.catch_warnings(), _quiet(*_TALKATIVE), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, example_inputs, dynamo=True, optimize=True, opset_version=OPSET, dynamic_shapes=dynamic,
                input_names=names, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise UsageError(
            f"torch.onnx.export cannot read {type(module).__name__} with a dynamic batch: {_reason(error)}; "
            "avoid control flow that depends on tensor values or on the batch size"
        ) from error
    assert program is not None
    return _with_outputs(_converted(program.model.graph), output_names)


def _reason(error: BaseException) -> str:
    """The error that the exporter's own ones stand for, in a line, with the line of the model where it is known."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    where = re.findall(r'File "([^"]+)", line (\d+), in (?:forward|\w+)\n\s+(.+)', text)
    own = [place for place in where if f"{os.sep}torch{os.sep}" not in place[0]]
    return f"{reason} (at {own[-1][2].strip()!r}, line {own[-1][1]} of {own[-1][0]})" if own else reason


def _signature(module: nn.Module, count: int) -> tuple[list[str], tuple[Any, ...]]:
    """The names of a module's inputs and which of their axes is the batch, in the form of its own arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    single = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    batch = [{0: torch.export.Dim.DYNAMIC} for _ in range(count)]
    if len(single) == count:
        return single, tuple(batch)
    rest = [f"input_{number}" for number in range(len(single), count)]
    return [*single, *rest], (*batch[: len(single)], tuple(batch[len(single) :]))


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps the exporter's account of its passes out of the caller's log."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


def _converted(graph: Any) -> Exported:
    weights = {str(name): _to_torch(value.const_value) for name, value in graph.initializers.items()}
    layers: list[Layer] = []
    scopes: dict[str, str] = {}
    for node in graph:
        outputs = tuple(str(output.name) for output in node.outputs)
        if node.op_type == "Constant":
            weights[outputs[0]] = _to_torch(next(iter(node.attributes.values())).value)
            continue
        layers.append(
            Layer(
                name=outputs[0],
                op=node.op_type,
                inputs=tuple("" if value is None else str(value.name) for value in node.inputs),
                outputs=outputs,
                attributes={a.name: _attribute(a.value) for a in node.attributes.values()},
            )
        )
        scopes[outputs[0]] = _scope(node.metadata_props.get(_SCOPES, ""))
    layers = [layer.model_copy(update={"weights": tuple(i for i in layer.inputs if i in weights)}) for layer in layers]
    names = [tuple(str(value.name) for value in values) for values in (graph.inputs, graph.outputs)]
    return Exported(layers, weights, scopes, names[0], names[1])


def _with_outputs(exported: Exported, names: Sequence[str]) -> Exported:
    """The same operators, their outputs under other names, as far as no input or weight has those already."""
    fixed = {*exported.inputs, *exported.weights}
    pairs = zip(exported.outputs, names, strict=True) if names else ()
    renamed = {old: new for old, new in pairs if old not in fixed and new not in fixed}
    if len(set(renamed.values())) < len(exported.outputs):
        return exported  # one is an input handed on, or two are the same tensor
    inner = {name for layer in exported.layers for name in layer.outputs} - renamed.keys()
    renamed |= {name: f"{name}/inner" for name in renamed.values() if name in inner}
    layers = [
        layer.model_copy(
            update={
                "inputs": tuple(renamed.get(name, name) for name in layer.inputs),
                "outputs": tuple(renamed.get(name, name) for name in layer.outputs),
            }
        )
        for layer in exported.layers
    ]
    return replace(exported, layers=layers, outputs=tuple(renamed[name] for name in exported.outputs))


def _scope(names: str) -> str:
    """The module's path among nested scopes, which end with the operator's own name.

    >>> _scope("['', 'features', 'features.0', 'conv2d']")
    'features.0'
    """
    paths = [part.strip().strip("'\"") for part in names.strip("[]").split(",")]
    return paths[-2] if len(paths) > 1 else ""


def _to_torch(value: Any) -> torch.Tensor:
    array = np.array(value.numpy() if hasattr(value, "numpy") else value)
    return torch.from_numpy(array.copy())


def _attribute(value: Any) -> Attribute:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value  # type: ignore[no-any-return]
