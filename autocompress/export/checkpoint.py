"""A compressed model on disk: ``model.safetensors`` holds the numbers, ``plan.json`` everything else.

Weights stored as integers lie under their own name, with their scales under ``scale/<layer>``: of 7 and 8 bits as
int8, of 2 and 4 bits four and two a byte, of other widths as planes.  Of a codebook these are indices, and its tables
lie under ``table/<layer>``.  Weights of 16 bits are halves, all other tensors as they are.  Nothing is pickled.
Writing is atomic: the tensors first, then the plan, which names the digest that the tensors must carry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from autocompress.errors import UsageError
from autocompress.export.files import write_atomic
from autocompress.export.integers import (
    codebook,
    grid_scale,
    pack_fields,
    pack_planes,
    unpack_fields,
    unpack_planes,
    weight_integers,
)
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import is_integer
from autocompress.methods.quantization import weight_axis
from autocompress.plan import CompressionPlan, Layer, LayerPlan, ModelGraph, NumFormat, Value, weight_of

SCHEMA = 1
TENSORS = "model.safetensors"
PLAN = "plan.json"


class _Description(Value):
    """The content of ``plan.json``."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    digest: str
    plan: CompressionPlan
    ranges: dict[str, tuple[float, float]]
    graph: ModelGraph


def save_checkpoint(compressed: CompressedModel, directory: Path | str) -> None:
    """Writes both files into ``directory`` (made if it is not there).

    Raises:
        UsageError: the weights of a layer are not what its format can hold: storing them would change the model.
    """
    stored: dict[str, torch.Tensor] = {}
    for name in compressed.graph.weight_names():
        stored[name] = compressed.weights[name].detach().cpu().contiguous()
    for weight, (layer, plan) in _formats(compressed.graph, compressed.plan).items():
        stored.update(_packed(compressed, weight, layer, plan))
    for name, tensor in compressed.weight_scales.items():
        stored[f"scale/{name}"] = tensor.detach().cpu().contiguous()
    digest = compressed.plan.digest
    description = _Description(
        digest=digest, plan=compressed.plan, ranges=dict(compressed.ranges), graph=compressed.graph
    )
    folder = Path(directory)
    write_atomic(folder / TENSORS, safetensors.torch.save(stored, {"format": "pt", "plan": digest}))
    text = description.model_dump_json(by_alias=True)
    write_atomic(folder / PLAN, text.encode())


def load_compressed(directory: Path | str) -> CompressedModel:
    """Reads what :func:`save_checkpoint` wrote, to the bit.

    Raises:
        UsageError: a file is missing, unreadable, of another version, or does not belong to the other.
    """
    folder = Path(directory)
    description = _read_description(folder / PLAN)
    tensors, digest = _read_tensors(folder / TENSORS)
    if digest != description.digest:
        raise UsageError(f"{folder / TENSORS} does not belong to {folder / PLAN}: it was written for another plan")
    graph, plan = description.graph, description.plan
    weights: dict[str, torch.Tensor] = {}
    for name in graph.weight_names():
        if name not in tensors:
            raise UsageError(f"{folder / TENSORS} has no tensor {name!r}, which the model needs")
        weights[name] = tensors[name]
    scales = {key.removeprefix("scale/"): value for key, value in tensors.items() if key.startswith("scale/")}
    tables = {key.removeprefix("table/"): value for key, value in tensors.items() if key.startswith("table/")}
    for weight, (layer, layer_plan) in _formats(graph, plan).items():
        if layer_plan.storage.scheme == "float":
            weights[weight] = weights[weight].float()
            continue
        for what, found in (("scales", scales), ("table", tables)):
            if layer.name not in found and (what == "scales" or layer_plan.storage.scheme == "codebook"):
                raise UsageError(f"{folder / TENSORS} has no {what} for layer {layer.name!r}")
        shape = graph.tensors[weight].shape
        integers = _unpacked(layer, layer_plan.storage, weights[weight], tables.get(layer.name), shape)
        weights[weight] = _restore(layer, integers, scales[layer.name].numpy(), layer_plan.storage)
    return CompressedModel(graph=graph, weights=weights, plan=plan, weight_scales=scales, ranges=description.ranges)


def read_plan(path: Path | str) -> tuple[ModelGraph, CompressionPlan]:
    """What a delivered model is, without its numbers: its graph, already cut to the plan's widths, and its plan.

    Args:
        path: the folder of a delivered model, or the ``plan.json`` in it.

    Raises:
        UsageError: the file is missing, unreadable or of another version.
    """
    given = Path(path)
    description = _read_description(given / PLAN if given.is_dir() else given)
    return description.graph, description.plan


def _formats(graph: ModelGraph, plan: CompressionPlan) -> dict[str, tuple[Layer, LayerPlan]]:
    """For each weight not stored as float32, the (first) layer that says how."""
    found: dict[str, tuple[Layer, LayerPlan]] = {}
    for layer in graph.stored:
        layer_plan = plan.layers.get(layer.name)
        if layer_plan is not None and (is_integer(layer_plan.storage) or layer_plan.storage.bits == 16):
            found.setdefault(weight_of(layer), (layer, layer_plan))
    return found


def _packed(compressed: CompressedModel, weight: str, layer: Layer, plan: LayerPlan) -> dict[str, torch.Tensor]:
    """What is stored for one weight: itself, and a codebook's tables."""
    storage, given = plan.storage, compressed.weights[weight].detach().cpu()
    if storage.scheme == "float":
        half = given.half()
        if not torch.equal(half.float(), given):
            raise UsageError(f"the weights of layer {layer.name!r} are no 16-bit floats; round them before saving")
        return {weight: half.contiguous()}
    integers, scale = weight_integers(compressed, layer, plan)
    if not torch.equal(_restore(layer, integers, scale, storage), given):
        raise UsageError(
            f"the weights of layer {layer.name!r} are not {storage.bits}-bit integers times their scale; "
            "quantize them before saving"
        )
    if storage.scheme == "codebook":
        tables, indices = codebook(integers, storage, weight_axis(layer), layer.name)
        return {
            weight: torch.from_numpy(_packer(storage)(indices, storage.bits)),
            f"table/{layer.name}": torch.from_numpy(tables),
        }
    return {weight: torch.from_numpy(integers if storage.bits > 6 else _packer(storage)(integers, storage.bits))}


def _packer(storage: NumFormat) -> Callable[[np.ndarray, int], np.ndarray]:
    return pack_fields if storage.bits in (2, 4) else pack_planes


def _unpacked(
    layer: Layer, storage: NumFormat, stored: torch.Tensor, tables: torch.Tensor | None, shape: tuple[int, ...]
) -> np.ndarray:
    """The integers that ``_packed`` stored."""
    given, unpack = stored.numpy(), unpack_fields if storage.bits in (2, 4) else unpack_planes
    if tables is None:
        return given if storage.bits > 6 else unpack(given, storage.bits, shape)
    axis = weight_axis(layer)
    indices = np.moveaxis(unpack(given, storage.bits, shape, signed=False), axis, 0)
    values = np.take_along_axis(tables.numpy(), indices.reshape(len(tables), -1), axis=1)
    return np.ascontiguousarray(np.moveaxis(values.reshape(indices.shape), 0, axis))


def _restore(layer: Layer, integers: np.ndarray, scale: np.ndarray, storage: NumFormat) -> torch.Tensor:
    return torch.from_numpy(integers.astype(np.float32) * grid_scale(layer, integers, scale, storage))


def _read_description(path: Path) -> _Description:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path} has schema {schema!r}; this version of autocompress reads schema {SCHEMA}")
    try:
        return _Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}") from error


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get("plan", "")  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
