"""Kernels timed inside a model correct its prices; what nothing was seen of keeps the device's price."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest

from autocompress.export.onnx import to_onnx
from autocompress.hardware.coverage import choose
from autocompress.hardware.fitting import MeasuredModel
from autocompress.hardware.kernels import Work
from autocompress.hardware.profile import EndToEnd
from autocompress.hardware.reading import TimedKernel
from autocompress.hardware.refinement import LoweredKernel, Refinement, refine
from autocompress.hardware.synthetic import GraphMaker, random_model
from autocompress.hardware.weight_only import dynamic_products, few_bits_products
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.kernels import executed_kernels

DEVICE = {"conv_fp32": (1.0, 10.0, *[0.0] * 7), "gemm_fp32": (1.0, 5.0, *[0.0] * 7)}
TIMING_US = 2.0
SIZES = (1e5, 4e5, 1e6, 3e6)


def refined(slow: str, times: float) -> Refinement:
    """Three layers; in this model convolutions take 1.5 times what the device profile says, and one layer more."""
    anchors, lowered = [], []
    for size in SIZES:
        kernels, timed, total = [], [], 5.0
        for index, label in enumerate(("a", "b", "c")):
            work = Work(macs=size * (1 + index))
            spent = 1.5 * (1.0 + 10.0 * work.macs * 1e-6) * (times if label == slow else 1.0)
            kernels.append(LoweredKernel(label, "conv_fp32", work))
            timed.append(TimedKernel("conv_fp32", work, spent + TIMING_US))
            total += spent
        anchors.append(MeasuredModel(timed, total))
        lowered.append(kernels)
    ahead = [LoweredKernel("d", "gemm_fp32", Work(macs=size)) for size in SIZES]
    return refine(anchors, lowered, ahead, DEVICE, EndToEnd(per_run_us=5.0))


def test_a_class_is_corrected_where_it_was_seen_and_kept_where_not() -> None:
    found = refined(slow="", times=1.0)
    work = Work(macs=2e6)
    assert found.cost_us("a", "conv_fp32", work) == pytest.approx(1.5 * 21.0, rel=0.06)
    assert found.cost_us("never seen", "conv_fp32", work) == pytest.approx(1.5 * 21.0, rel=0.08)
    assert found.cost_us("d", "gemm_fp32", work) == pytest.approx(11.0, rel=0.02)


def test_a_layer_that_is_slower_than_its_class_is_known_by_name() -> None:
    found = refined(slow="b", times=1.3)
    work = Work(macs=2e6)
    slow, usual = (float(found.cost_us(label, "conv_fp32", work)) for label in ("b", "a"))
    assert slow / usual == pytest.approx(1.3, rel=0.1)
    many = found.cost_us("b", "conv_fp32", Work(macs=np.array([1e6, 2e6])))
    assert many[1] == pytest.approx(slow)


def test_models_are_chosen_for_what_they_add() -> None:
    same, more, other = Counter({("a", 1): 3}), Counter({("a", 1): 3, ("b", 2): 1}), Counter({("c", 1): 2})
    assert choose([same, more, other], 2) == [1, 2]
    assert choose([same, same], 5) == [0, 1], "three are not yet enough of a cell"
    assert choose([Counter({("a", 1): 9}), same], 5) == [0], "nine are"


def test_weight_only_products_run_as_such_and_dynamic_ones_give_the_same_numbers() -> None:
    make = GraphMaker()
    graph = make.build(make.matmul(make.matmul(make.tensor("input", (6, 256)), 128), 128))
    rng = np.random.default_rng(0)
    model = to_onnx(random_model(graph, {}, rng))
    made = dynamic_products(model).SerializeToString()
    feed = {"input": rng.standard_normal((2, 6, 256)).astype(np.float32)}
    expected, got = (
        ort.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (model.SerializeToString(), made)
    )
    if int8_weight_bits() == 8:  # elsewhere sums saturate, which takes no other time
        assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()
    assert {n.op for n in executed_kernels(made).nodes} == {"DynamicQuantizeMatMul"}
    for bits in (2, 4, 8):
        few = few_bits_products(model, bits)
        assert [n.op for n in executed_kernels(few.SerializeToString()).nodes] == ["MatMulNBits"] * 2
        packed = next(t for t in few.graph.initializer if t.name.endswith(".q"))
        assert len(packed.raw_data) == 256 * 128 * bits // 8
