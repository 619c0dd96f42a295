"""The kernel check says of each layer what it runs as, where that is not the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.export.onnx import to_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import INT8_WEIGHT, LayerPlan, NumFormat
from autocompress.runtime.cpu import needs_reduced_range
from autocompress.runtime.kernels import Kernel, KernelReport, check_kernels, executed_kernels
from tests.graphs import GraphMaker, compress

DYNAMIC = LayerPlan(compute="int8_dynamic", storage=INT8_WEIGHT)
FEW_BITS = LayerPlan(compute="weight_only", storage=NumFormat(bits=4, granularity="block", block=32))
STATIC = LayerPlan(compute="int8", storage=INT8_WEIGHT)


def products(**plans: LayerPlan) -> CompressedModel:
    maker = GraphMaker()
    x = maker.input("given", (4, 64))
    for name in plans:
        x = maker.matmul(x, 64, name)
    return compress(maker.build(("given",), (x,)), maker.weights, plans)


def test_products_of_all_types_side_by_side_run_as_planned() -> None:
    compressed = products(a=DYNAMIC, b=FEW_BITS, c=STATIC, d=LayerPlan(), e=DYNAMIC)
    report = executed_kernels(to_onnx(compressed).SerializeToString())
    assert check_kernels(compressed, report) == []
    assert (report.int8_weight_layers, report.weight_only_layers, report.fp32_weight_layers) == (3, 1, 1)


@pytest.mark.parametrize("level", [None, 0, 1])
def test_few_bits_that_are_multiplied_as_floats_are_no_success(level: int | None) -> None:
    compressed = products(a=FEW_BITS)
    model = to_onnx(compressed)
    (node,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    (place,) = (i for i, attribute in enumerate(node.attribute) if attribute.name == "accuracy_level")
    if level is None:
        del node.attribute[place]
    else:
        node.attribute[place].i = level
    (wrong,) = check_kernels(compressed, executed_kernels(model.SerializeToString()))
    assert (
        f"'a' is weight_only in the plan, but the runtime executes it as MatMulNBits with accuracy_level {level or 0}"
        in wrong
    )
    assert "write accuracy_level=4" in wrong


@pytest.mark.parametrize(
    ("planned", "made", "words"),
    [
        (DYNAMIC, STATIC, "is int8_dynamic in the plan, but the runtime executes it in int8"),
        (STATIC, DYNAMIC, "is int8 in the plan, but the runtime executes it in int8_dynamic"),
        (FEW_BITS, LayerPlan(), "is weight_only in the plan, but the runtime executes it in float"),
        (LayerPlan(), FEW_BITS, "is fp32 in the plan, but the runtime executes it in weight_only"),
    ],
)
def test_another_type_than_planned_is_named(planned: LayerPlan, made: LayerPlan, words: str) -> None:
    report = executed_kernels(to_onnx(products(a=made)).SerializeToString())
    assert words in check_kernels(products(a=planned), report)[0]


@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_integer_kernels_that_do_not_pay_are_a_mismatch(op: str) -> None:
    report = KernelReport({}, (Kernel(op, "", "int8", "0", ("x", "w"), ("y",)),))
    assert f"executes it as {op}, " in check_kernels(products(a=DYNAMIC), report)[0]


def test_half_precision_kernels_are_told_from_floats() -> None:
    half = LayerPlan.model_validate({"compute": "fp16", "storage": {"bits": 16, "scheme": "float"}})
    compressed = products(a=half)
    for stored, count in ((True, 0), (False, 1)):
        report = KernelReport({}, (Kernel("MatMul", "", "fp32", "0", ("x", "w"), ("y",), half=stored),))
        assert len(check_kernels(compressed, report)) == count


def test_only_x86_without_vnni_needs_seven_bits(tmp_path: Path) -> None:
    for flags, needs in (("fma avx2", True), ("avx2 avx_vnni", False), ("avx512f avx512_vnni", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags} sse\n")
        assert needs_reduced_range("x86_64", tmp_path / "cpuinfo") is needs
    assert needs_reduced_range("x86_64", tmp_path / "none") is True
    assert needs_reduced_range("aarch64", tmp_path / "none") is False
    assert needs_reduced_range("arm64", tmp_path / "none") is False
