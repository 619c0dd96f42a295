"""Models that one protobuf message cannot hold (2 GB): their weights lie beside them in ``<name>.data``.

The format is ONNX's own external data: each tensor names the file, relative to the model, and where in it its bytes
lie.  They begin at multiples of a page, so that a runtime may map the file instead of reading it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

SUFFIX = ".data"

PAGE = 1 << 12
"""Large tensors begin at multiples of this."""

SMALL = 1 << 10
"""Tensors of fewer bytes stay in the model: shapes, scales, what a checker must read to infer shapes."""

LIMIT = (1 << 31) - (1 << 24)
"""Bytes of weights that still lie in the model; the rest of a message must fit beside them."""


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the initializers that lie in the model itself."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def stored_bytes(path: Path | str) -> int:
    """Everything that a model needs on disk: the file, and its weights where they lie beside it."""
    data = data_path(Path(path))
    return Path(path).stat().st_size + (data.stat().st_size if data.is_file() else 0)


def data_path(path: Path) -> Path:
    """Where the weights of a large model lie."""
    return path.with_name(path.name + SUFFIX)


def write_external(model: onnx.ModelProto, path: Path) -> int:
    """Writes a model and its weights as two files, checked, and returns their bytes together.

    Both are complete, and have passed the checker, before either appears; the weights appear first.  The model is
    changed: its tensors lose their bytes one by one, so that no second copy of them is in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside, written = Path(folder) / path.name, data_path(Path(folder) / path.name)
        with written.open("wb") as file:
            for tensor in model.graph.initializer:
                count = len(tensor.raw_data)
                if count < SMALL:
                    continue
                file.write(bytes(-file.tell() % PAGE))
                place = file.tell()
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (("location", written.name), ("offset", place), ("length", count)):
                    tensor.external_data.add(key=key, value=str(value))
        beside.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(beside), full_check=True)
        size = stored_bytes(beside)
        written.replace(data_path(path))
        beside.replace(path)
    return size
