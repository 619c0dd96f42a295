"""The lowering for OpenVINO against its own execution graphs, and rules by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from autocompress.export.onnx import to_onnx
from autocompress.hardware.kernels import Work
from autocompress.hardware.openvino_lowering import OpenvinoLowering
from autocompress.hardware.openvino_reading import describe, packed_block
from autocompress.hardware.steps import Mask, make_steps, quantized_tensors
from autocompress.hardware.synthetic import (
    INT8,
    GraphMaker,
    encoder_net,
    inverted_net,
    plain_net,
    random_formats,
    random_model,
    residual_net,
    token_net,
)  # fmt: skip
from autocompress.plan import LayerPlan, ModelGraph
from autocompress.runtime.openvino import OpenvinoSession

BLOCK = 16


def lowered(graph: ModelGraph, plans: list[Mapping[str, LayerPlan]]) -> list[dict[str, tuple[int, float]]]:
    """For each plan the number of kernels of each class, and the bytes they read and write."""
    steps, count = make_steps(graph), len(plans)
    int8 = {layer.name: np.array([layer.name in plan for plan in plans]) for layer in graph.compressible}
    held = quantized_tensors(graph, steps, int8, count)
    found: list[dict[str, tuple[int, float]]] = [{} for _ in plans]

    def emit(label: str, kind: str, work: Work, mask: Mask, whole: bool) -> None:
        moved = np.broadcast_to(np.asarray(work.read_bytes + work.written_bytes), (count,))
        for index in np.flatnonzero(mask):
            before = found[index].get(kind, (0, 0.0))
            found[index][kind] = (before[0] + 1, before[1] + float(moved[index]))

    dims = {name: tensor.shape for name, tensor in graph.tensors.items()}
    OpenvinoLowering(graph, steps, dims, int8, held, count, BLOCK, 1, emit).run()
    return found


def executed(graph: ModelGraph, plan: Mapping[str, LayerPlan]) -> Counter[str]:
    artifact = to_onnx(random_model(graph, plan, np.random.default_rng(0)), runtime="openvino").SerializeToString()
    described = [describe(node, BLOCK) for node in OpenvinoSession(artifact, 1, 1).nodes()]
    return Counter(found[0] for found in described if found is not None)


@pytest.mark.parametrize("family", [residual_net, inverted_net, plain_net, token_net, encoder_net])
def test_kernels_are_those_that_openvino_runs(family: object) -> None:
    assert callable(family)
    if packed_block() != BLOCK:
        pytest.skip("the rules were read off a processor with AVX-512")
    wrong = total = 0
    for seed in range(3):
        # OpenVINO leaves some int8 products of attention in float, by rules of its own.
        for style in ("fp32",) if family is encoder_net else ("fp32", "int8", "mixed", "runs"):
            rng = np.random.default_rng(seed)
            graph = family(rng, 28, (16, 48))
            plan = random_formats(graph, rng, style)
            real = executed(graph, plan)
            made = Counter({kind: number for kind, (number, _) in lowered(graph, [plan])[0].items()})
            wrong += (real - made).total() + (made - real).total()
            total += real.total()
            if style == "fp32" and family in (residual_net, token_net, encoder_net):
                assert made == real
    assert wrong <= 0.06 * total


def block_of(first: str, second: str) -> tuple[ModelGraph, Mapping[str, LayerPlan]]:
    """A stem, two convolutions with a shortcut, and the plan in which those called ``8`` compute in int8."""
    make = GraphMaker()
    stem = make.relu(make.conv(make.tensor("input", (3, 8, 8)), 16))
    inner = make.relu(make.conv(stem, 16))
    joined = make.relu(make.add(make.conv(inner, 16), stem))
    graph = make.build(make.head(joined, 10))
    names = [layer.name for layer in graph.compressible]
    return graph, {name: INT8 for name, kind in zip(names[1:], (first, second), strict=False) if kind == "8"}


def test_kernels_by_hand() -> None:
    # The whole image is 3 x 8 x 8, each activation behind it 16 x 8 x 8 = 1024 numbers.
    float_graph, nothing = block_of("f", "f")
    (plain,) = lowered(float_graph, [nothing])
    assert {kind: number for kind, (number, _) in plain.items()} == {
        "reorder_input": 1, "conv_fp32": 3, "global_pool_fp32": 1, "gemm_fp32": 1,
    }  # fmt: skip
    # Input channels are taken as they come; the sum is read by the convolution that it runs in.
    assert plain["conv_fp32"][1] == 4 * (3 * 64 + 1024) + 4 * (1024 + 1024) + 4 * (1024 + 1024 + 1024)

    graph, second = block_of("f", "8")
    (mixed,) = lowered(graph, [second])
    # The inner tensor is quantized; the float summand is rescaled first and the float reader rescales back.
    assert mixed["quantize"] == (1, 5 * 1024.0)
    assert mixed["elementwise_fp32"] == (2, 2 * 8 * 1024.0)
    # u8 in and float32 summand in, float32 out: 1024 results, 3 more bytes each, 4 bytes of each summand.
    assert mixed["conv_int8"] == (1, 1024.0 + 1024 + 3 * 1024 + 4 * 1024)

    graph, first = block_of("8", "f")
    (other,) = lowered(graph, [first])
    # What the first convolution writes has one float reader, so it is written as float32: nothing is dequantized but
    # the shortcut, which the addition reads as integers, so that it cannot run inside the float convolution.
    assert "dequantize" not in other
    assert other["quantize"] == (1, 5 * 1024.0)
    assert other["add_fp32"] == (1, 4 * 1024.0 + 1024 + 4 * 1024)


def test_plans_are_lowered_together_as_alone() -> None:
    rng = np.random.default_rng(5)
    graph = inverted_net(rng, 28, (16, 48))
    plans = [random_formats(graph, rng, style) for style in ("fp32", "int8", "mixed", "runs", "mixed")]
    assert lowered(graph, plans) == [lowered(graph, [plan])[0] for plan in plans]
