"""Every way to compute with weights and every way to store them: exported, run in a plain session, compared."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch

from autocompress.errors import UsageError
from autocompress.export.onnx import to_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import STORAGES, describe, refusal
from autocompress.methods.quantization import affine_parameters
from autocompress.methods.simulation import build_compressed
from autocompress.plan import FLOAT16, LayerPlan, ModelGraph, NumFormat
from autocompress.runtime.base import load_runtime
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.kernels import check_kernels, executed_kernels, optimized_graph
from autocompress.runtime.session import make_session
from tests.graphs import GraphMaker, compress

UNPACKING = {"Cast", "Mul", "Gather", "GatherElements", "Split", "Reshape", "BitShift", "BitwiseAnd"}


def conv(maker: GraphMaker, group: int, channels: int) -> str:
    x = maker.conv(maker.input("given", (channels, 5, 5)), channels, "layer", group=group)
    x = maker.op("GlobalAveragePool", (maker.relu(x),), "pooled", (channels, 1, 1))
    return maker.op("Flatten", (x,), "answer", (channels,))


def product(maker: GraphMaker, rows: tuple[int, ...]) -> str:
    source = maker.input("given", (*rows, 200))
    return maker.matmul(source, 60, "layer") if rows else maker.gemm(source, 60, "layer")


KINDS = {
    "conv": lambda maker: conv(maker, 1, 36),
    "depthwise": lambda maker: conv(maker, 776, 776),
    "gemm": lambda maker: product(maker, ()),
    "matmul": lambda maker: product(maker, (3,)),
}


def made(kind: str, plan: LayerPlan) -> CompressedModel:
    maker = GraphMaker()
    output = KINDS[kind](maker)
    return compress(maker.build(("given",), (output,)), maker.weights, {"layer": plan})


def pairs() -> Iterator[tuple[str, LayerPlan]]:
    for kind in KINDS:
        layer = made(kind, LayerPlan()).graph.by_name["layer"]
        for compute, storages in STORAGES.items():
            for storage in storages:
                plan = LayerPlan(compute=compute, storage=storage)
                if not refusal(layer, plan) and compute != "fp16":
                    yield kind, plan


def name_of(value: object) -> str:
    return f"{value.compute}, {describe(value.storage)}" if isinstance(value, LayerPlan) else str(value)


@pytest.mark.parametrize(("kind", "plan"), list(pairs()), ids=name_of)
def test_a_format_runs_as_planned_and_as_simulated(kind: str, plan: LayerPlan) -> None:
    compressed = made(kind, plan)
    model = to_onnx(compressed)
    onnx.checker.check_model(model, full_check=True)
    artifact = model.SerializeToString()
    assert check_kernels(compressed, executed_kernels(artifact)) == []
    assert not UNPACKING & {node.op_type for node in optimized_graph(artifact).graph.node}

    if plan.compute.startswith("int8") and plan.storage.scheme == "affine" and plan.storage.bits > int8_weight_bits():
        pytest.skip("this processor saturates sums of 8-bit products, which is why exports keep to 7 bits here")
    inputs = torch.randn((7, *compressed.graph.tensors["given"].shape), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = build_compressed(compressed)(inputs).numpy()
    found = make_session(artifact).run(None, {"given": inputs.numpy()})[0]
    step = 0.0
    if "layer_out_relu" in compressed.plan.activations:
        step = affine_parameters(*compressed.ranges["layer_out_relu"])[0]
    assert np.abs(found - expected).max() <= step + 1e-5 * np.abs(expected).max()
    assert np.abs(found - expected).mean() <= 1e-3 * np.abs(expected).max()

    if plan.storage.bits < 32:
        floats = sum(int(np.prod(i.dims)) for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
        weight = compressed.graph.tensors["layer.weight"].shape
        scales = compressed.weight_scales.get("layer", torch.zeros(())).numel()
        assert floats <= scales + max(weight) + 80  # scales, a bias, and what unpacks planes


@pytest.mark.parametrize(("kind", "plan"), [p for p in pairs() if p[0] in ("conv", "gemm") and p[1].storage.bits < 8])
def test_fewer_bits_are_a_smaller_file(kind: str, plan: LayerPlan) -> None:
    compressed = made(kind, plan)
    weights = compressed.graph.tensors["layer.weight"].elements
    tables = 0
    if plan.storage.scheme == "codebook":
        tables = 2**plan.storage.bits * (1 if plan.storage.granularity == "tensor" else 60)
    padded = weights if plan.storage.block is None else 60 * -(-200 // plan.storage.block) * plan.storage.block
    bits = 8 if plan.storage.bits == 7 else plan.storage.bits
    around = 4 * sum(scales.numel() for scales in compressed.weight_scales.values()) + tables
    assert to_onnx(compressed).ByteSize() <= padded * bits / 8 + around + 1900


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul"])
def test_half_precision_that_the_runtime_does_not_have_is_found(kind: str) -> None:
    compressed = made(kind, LayerPlan(compute="fp16", storage=FLOAT16))
    model = to_onnx(compressed)
    artifact = model.SerializeToString()
    inputs = torch.rand((3, *compressed.graph.tensors["given"].shape))
    with torch.no_grad():
        expected = build_compressed(compressed)(inputs).numpy()
    found = make_session(artifact).run(None, {"given": inputs.numpy()})[0]
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    report = executed_kernels(artifact)
    wrong = check_kernels(compressed, report)
    if platform.machine() in ("x86_64", "AMD64"):
        assert any(
            "no fp16 kernels for this CPU; give it fp32 with weights stored as float of 16 bits" in w for w in wrong
        )
    else:
        assert bool(wrong) == (not any(node.half for node in report.nodes))


def test_what_cannot_be_computed_says_what_can() -> None:
    for compute, storage in (
        ("int8_dynamic", STORAGES["int8_dynamic"][0]),
        ("weight_only", STORAGES["weight_only"][0]),
    ):
        with pytest.raises(UsageError, match=f"'layer': a convolution cannot compute in {compute}.*give it int8"):
            to_onnx(made("conv", LayerPlan.model_validate({"compute": compute, "storage": storage})))


def test_weights_shared_by_two_layers_are_stored_once() -> None:
    for compute in ("fp32", "int8_dynamic"):
        sizes = {}
        for layers in (1, 2):
            maker = GraphMaker()
            x = maker.input("given", (4, 128))
            for place in range(layers):
                y = maker.matmul(x, 128, f"m{place}")
                if place:
                    first, last = maker.layers[0], maker.layers.pop()
                    maker.layers.append(
                        last.model_copy(update={"inputs": (last.inputs[0], first.inputs[1]), "weights": first.weights})
                    )
                x = y
            graph: ModelGraph = maker.build(("given",), (x,))
            plan = LayerPlan.model_validate({"compute": compute, "storage": {"bits": 3}})
            sizes[layers] = to_onnx(
                compress(graph, maker.weights, {f"m{place}": plan for place in range(layers)})
            ).ByteSize()
        assert sizes[2] - sizes[1] < 400, compute


def test_a_tensor_that_two_layers_quantize_while_they_run_is_quantized_once() -> None:
    maker = GraphMaker()
    source = maker.input("given", (4, 64))
    outputs = tuple(maker.matmul(source, 64, name) for name in ("query", "key"))
    plan = LayerPlan.model_validate({"compute": "int8_dynamic", "storage": {"bits": int8_weight_bits()}})
    compressed = compress(maker.build(("given",), outputs), maker.weights, dict.fromkeys(("query", "key"), plan))
    artifact = to_onnx(compressed).SerializeToString()
    report = executed_kernels(artifact)
    assert check_kernels(compressed, report) == []
    inputs = torch.randn(2, 4, 64)
    with torch.no_grad():
        expected = build_compressed(compressed)(inputs)
    for found, wanted in zip(make_session(artifact).run(None, {"given": inputs.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("storage", [s for s in STORAGES["int8"] if s.bits < 4], ids=describe)
def test_other_runtimes_read_every_storage(storage: NumFormat) -> None:
    compressed = made("conv", LayerPlan(compute="int8", storage=storage))
    runtime = load_runtime("openvino")
    artifact = to_onnx(compressed, runtime="openvino")
    assert artifact.opset_import[0].version < 25
    inputs = torch.randn((2, *compressed.graph.tensors["given"].shape)).numpy()
    (expected,) = make_session(to_onnx(compressed).SerializeToString()).run(None, {"given": inputs})
    (found,) = runtime.session(artifact.SerializeToString()).run({"given": inputs})
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_numbers_that_fill_more_than_one_chunk_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.export.storage.CHUNK_WEIGHTS", 4096)
    for kind in ("conv", "matmul"):
        compressed = made(kind, LayerPlan(storage=NumFormat(bits=5)))
        inputs = torch.randn((2, *compressed.graph.tensors["given"].shape))
        with torch.no_grad():
            expected = build_compressed(compressed)(inputs).numpy()
        found = make_session(to_onnx(compressed).SerializeToString()).run(None, {"given": inputs.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
