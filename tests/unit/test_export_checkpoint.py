"""Checkpoints hold integers, come back to the bit, and say what is wrong with a damaged one."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autocompress.errors import UsageError
from autocompress.export.checkpoint import load_compressed, save_checkpoint
from autocompress.export.onnx import to_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import STORAGES, describe
from autocompress.plan import FLOAT32, INT4_WEIGHT, INT8_WEIGHT, Compute, LayerPlan, NumFormat
from tests.graphs import GraphMaker, compress, resnet


@pytest.fixture(scope="module")
def mixed() -> CompressedModel:
    graph, weights = resnet(blocks=1)
    chooser = random.Random(0)
    kinds: list[tuple[Compute, object]] = [("int8", INT8_WEIGHT), ("int8", INT4_WEIGHT), ("fp32", INT4_WEIGHT)]
    layers = {}
    for layer in graph.compressible:
        compute, storage = chooser.choice([*kinds, ("fp32", FLOAT32)])
        layers[layer.name] = LayerPlan.model_validate({"compute": compute, "storage": storage})
    return compress(graph, weights, layers)


def test_round_trip_to_the_bit(mixed: CompressedModel, tmp_path: Path) -> None:
    save_checkpoint(mixed, tmp_path / "new")
    loaded = load_compressed(tmp_path / "new")
    assert loaded.graph == mixed.graph
    assert loaded.plan == mixed.plan
    assert dict(loaded.ranges) == dict(mixed.ranges)
    for name in mixed.graph.weight_names():
        assert loaded.weights[name].dtype == mixed.weights[name].dtype
        assert torch.equal(loaded.weights[name], mixed.weights[name])
    assert set(loaded.weight_scales) == set(mixed.weight_scales)
    assert to_onnx(loaded) == to_onnx(mixed)


@pytest.mark.parametrize(
    "storage", [s for s in STORAGES["fp32"] if s.bits < 32] + list(STORAGES["weight_only"]), ids=describe
)
def test_every_format_comes_back_to_the_bit_in_its_own_bits(storage: NumFormat, tmp_path: Path) -> None:
    maker = GraphMaker()
    x = maker.matmul(maker.input("tokens", (2, 130)), 33, "first")
    graph = maker.build(("tokens",), (maker.matmul(x, 127, "second"),))
    compute: Compute = "weight_only" if storage.granularity == "block" else "fp32"
    plan = LayerPlan(compute=compute, storage=storage)
    compressed = compress(graph, maker.weights, {"first": plan, "second": plan})
    save_checkpoint(compressed, tmp_path)
    loaded = load_compressed(tmp_path)
    for name in graph.weight_names():
        assert torch.equal(loaded.weights[name], compressed.weights[name])
        assert loaded.weights[name].is_contiguous()
    assert to_onnx(loaded) == to_onnx(compressed)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        held = file.get_tensor("first.weight")
    bits = 8 if storage.bits == 7 else storage.bits
    assert held.numel() * held.element_size() <= -(-130 * 33 // 8) * bits


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    sizes = {}
    for bits, storage in ((4, INT4_WEIGHT), (8, INT8_WEIGHT)):
        plan = LayerPlan(compute="int8", storage=storage)
        save_checkpoint(compress(graph, weights, {layer.name: plan for layer in graph.compressible}), tmp_path)
        sizes[bits] = (tmp_path / "model.safetensors").stat().st_size
    elements = sum(graph.tensors[layer.inputs[1]].elements for layer in graph.compressible)
    assert sizes[8] - sizes[4] == pytest.approx(elements / 2, rel=0.01)


def test_weights_off_their_grid_are_refused(mixed: CompressedModel, tmp_path: Path) -> None:
    layer = next(layer for layer in mixed.graph.compressible if layer.name in mixed.weight_scales)
    weights = {**mixed.weights, layer.inputs[1]: mixed.weights[layer.inputs[1]] * 1.01}
    with pytest.raises(UsageError, match=layer.name):
        save_checkpoint(replace(mixed, weights=weights), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damage_is_reported(mixed: CompressedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_compressed(tmp_path / "missing")
    save_checkpoint(mixed, tmp_path)
    plan = tmp_path / "plan.json"
    good = json.loads(plan.read_text())

    plan.write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        load_compressed(tmp_path)
    plan.write_text(json.dumps({**good, "schema": 99}))
    with pytest.raises(UsageError, match="schema 99"):
        load_compressed(tmp_path)
    plan.write_text(json.dumps({**good, "surprise": 1}))
    with pytest.raises(UsageError, match="surprise"):
        load_compressed(tmp_path)
    plan.write_text(json.dumps({**good, "digest": "other"}))
    with pytest.raises(UsageError, match="another plan"):
        load_compressed(tmp_path)

    plan.write_text(json.dumps(good))
    load_compressed(tmp_path)
    tensors = tmp_path / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"cannot read .*model\.safetensors"):
        load_compressed(tmp_path)
