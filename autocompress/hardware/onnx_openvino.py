"""The kernels that OpenVINO makes of an ONNX file, for a profile that was measured with it."""

from __future__ import annotations

from pathlib import Path

import onnx

from autocompress.errors import UsageError
from autocompress.hardware.onnx_kernels import ExecutedGraph
from autocompress.hardware.onnx_works import OTHER, NodeWork
from autocompress.hardware.openvino_reading import describe
from autocompress.hardware.profile import FittedProfile
from autocompress.runtime.openvino import OpenvinoSession


def openvino_works(path: Path, graph: ExecutedGraph, profile: FittedProfile) -> list[NodeWork]:
    """The kernels of a file, compiled for the very shapes that ``graph`` was executed with; nothing is run.

    Raises:
        UsageError: the runtime cannot compile the file.
    """
    model = onnx.load(path)
    for given in model.graph.input:
        for dim, size in zip(given.type.tensor_type.shape.dim, graph.values.get(given.name, ()), strict=False):
            dim.dim_value = size
    try:
        session = OpenvinoSession(model.SerializeToString(), profile.threads, None)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise UsageError(f"openvino cannot compile {str(path)!r}: {reason}") from error
    works = []
    for node in session.nodes():
        described = describe(node, profile.nchwc_block)
        if described is not None:
            works.append(NodeWork(node.name, node.op, *described, described[0] != OTHER))
    return works
