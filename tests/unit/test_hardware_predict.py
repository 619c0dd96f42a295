"""Predictions for ONNX files: what is counted by hand, every form of quantization, and what cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

from autocompress.errors import UsageError
from autocompress.hardware.analytic_profile import AnalyticProfile
from autocompress.hardware.predict import predict_in_detail, predict_onnx
from autocompress.plan import Estimate
from tests.fixtures.onnx_files import chain, conv_net, four_bits, normal, odd, save, token_net
from tests.fixtures.search import make_profile


def cost(path: Path, name: str, batch: int = 1) -> float:
    profile = make_profile().model_copy(update={"batch": batch})
    return predict_onnx(path, profile).costs[name].value


# ------------------------------------------------------------------------------------------------------ by hand


def test_multiply_accumulates_by_hand(tmp_path: Path) -> None:
    assert cost(conv_net(tmp_path / "c.onnx"), "macs") == 8 * 8 * 8 * 3 * 9 + 10 * 8
    assert cost(token_net(tmp_path / "t.onnx"), "macs") == 2 * 6 * 64 * 128
    many = cost(token_net(tmp_path / "t.onnx"), "macs", batch=4)
    assert many == 2 * 6 * 64 * 128, "of one sample, whatever the batch"


def test_peak_memory_by_hand(tmp_path: Path) -> None:
    tensor = 4 * 100 * 4
    assert cost(chain(tmp_path / "chain.onnx"), "peak_memory_bytes") == 2 * tensor
    # The view of the first result is its buffer: input and result of the last Sigmoid, and what waits.
    assert cost(chain(tmp_path / "branch.onnx", branch=True), "peak_memory_bytes") == 3 * tensor


def test_latency_is_the_sum_of_what_the_profile_says_of_each_kernel(tmp_path: Path) -> None:
    prediction = predict_in_detail(token_net(tmp_path / "t.onnx"), make_profile())
    products = [kernel for kernel in prediction.kernels if kernel.kind == "matmul_fp32"]
    # 1 us and 8 us a million multiply-accumulates each (tests.fixtures.search.make_profile).
    assert [kernel.latency_ms for kernel in products] == pytest.approx([1e-3 * (1 + 8 * 6 * 64 * 128 * 1e-6)] * 2)
    estimate = prediction.estimate
    assert sum(estimate.per_kernel.values()) == pytest.approx(estimate.costs["latency_ms"].value)
    assert {"up", "relu", "down", "overhead"} <= set(estimate.per_kernel)
    assert estimate.unmodelled == ()


def test_a_batch_makes_the_work_larger(tmp_path: Path) -> None:
    path = token_net(tmp_path / "t.onnx")
    assert cost(path, "latency_ms", batch=64) > 10 * cost(path, "latency_ms")
    assert cost(path, "peak_memory_bytes", batch=64) == 64 * cost(path, "peak_memory_bytes")


def test_several_inputs_of_token_numbers(tmp_path: Path) -> None:
    """Rows of a table of 30 chosen by number, masked, and multiplied: 10 tokens of 16 features to 8."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"]),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["u"]),
        helper.make_node("Mul", ["h", "u"], ["masked"]),
        helper.make_node("MatMul", ["masked", "w"], ["y"]),
    ]
    weights = {"table": normal(30, 16), "w": normal(16, 8), "last": np.array([2])}
    inputs = {"ids": ("B", "S"), "mask": ("B", "S")}
    path = save(tmp_path / "ids.onnx", nodes, inputs, ["y"], weights, given=TensorProto.INT64)
    costs = predict_onnx(path, make_profile(), dims={"S": 10}).costs
    assert costs["macs"].value == 10 * 16 * 8


def test_what_a_loop_repeats_is_paid_each_time(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("s", TensorProto.FLOAT, [4, 16])
    body = helper.make_graph(
        [helper.make_node("MatMul", ["s", "w"], ["o"], "inside"), helper.make_node("Identity", ["c"], ["go"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            rows,
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("o", TensorProto.FLOAT, [4, 16]),
        ],
    )
    loop = helper.make_node("Loop", ["n", "", "x"], ["y"], "loop", body=body)
    path = save(tmp_path / "l.onnx", [loop], {"x": [4, 16]}, ["y"], {"n": np.array(5), "w": normal(16, 16)})
    estimate = predict_onnx(path, make_profile())
    assert estimate.costs["macs"].value == 5 * 4 * 16 * 16
    assert estimate.per_kernel["inside"] == pytest.approx(5e-3 * (1 + 8 * 4 * 16 * 16 * 1e-6))


def test_size_is_that_of_every_file(tmp_path: Path) -> None:
    path = conv_net(tmp_path / "one.onnx")
    assert cost(path, "size_bytes") == path.stat().st_size
    split = tmp_path / "split" / "two.onnx"
    split.parent.mkdir()
    onnx.save(onnx.load(path), split, save_as_external_data=True, location="numbers.bin", size_threshold=0)
    numbers = split.parent / "numbers.bin"
    assert cost(split, "size_bytes") == split.stat().st_size + numbers.stat().st_size
    assert cost(split, "macs") == cost(path, "macs")
    numbers.unlink()
    with pytest.raises(UsageError, match=r"numbers\.bin"):
        cost(split, "size_bytes")


# --------------------------------------------------------------------------------------------- quantized formats


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = 3

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.left -= 1
        return {"x": normal(1, 3, 16, 16)} if self.left >= 0 else None


def test_static_int8(tmp_path: Path) -> None:
    source, path = conv_net(tmp_path / "c.onnx"), tmp_path / "q.onnx"
    logging.disable(logging.WARNING)
    quantize_static(source, path, _Samples(), quant_format=QuantFormat.QDQ, per_channel=True)
    logging.disable(logging.NOTSET)
    kinds = {kernel.name: kernel.kind for kernel in predict_in_detail(path, make_profile()).kernels}
    assert next(kind for name, kind in kinds.items() if name.startswith("first")) == "conv_plain_int8"
    assert "gemm_int8" in kinds.values()
    assert "quantize" in kinds.values()
    assert cost(path, "macs") == cost(source, "macs")


def test_dynamic_int8(tmp_path: Path) -> None:
    source, path = token_net(tmp_path / "t.onnx"), tmp_path / "d.onnx"
    logging.disable(logging.WARNING)
    quantize_dynamic(source, path)
    logging.disable(logging.NOTSET)
    assert cost(path, "macs") == cost(source, "macs")
    assert cost(path, "size_bytes") < cost(source, "size_bytes")
    many = cost(path, "latency_ms", batch=1000)
    assert many > 1e-3 * 2 * 1000 * 6 * 64 * 128 * 1e-6, "its products are priced by their work, at 1 us a million"


def test_float16(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "up"), helper.make_node("Sigmoid", ["h"], ["y"], "gate")]
    weights = {"a": normal(64, 128).astype(np.float16)}
    path = save(tmp_path / "h.onnx", nodes, {"x": [6, 64]}, ["y"], weights, TensorProto.FLOAT16)
    assert cost(path, "macs") == 6 * 64 * 128
    assert {"up", "gate"} <= set(predict_onnx(path, make_profile()).per_kernel)


def test_four_bit_weights(tmp_path: Path) -> None:
    path = four_bits(tmp_path / "n.onnx")
    assert cost(path, "macs") == 6 * 64 * 128
    long = four_bits(tmp_path / "long.onnx", rows=6000)
    assert cost(long, "latency_ms") > 1e-3 * 6000 * 64 * 128 * 1e-6, "priced by its work, at 1 us a million"


# ------------------------------------------------------------------------------------------- a device elsewhere


def device(**changes: object) -> AnalyticProfile:
    """1, 2 and 4 10^9 multiply-accumulates a second in float32, float16 and int8, and memory that is never slower."""
    fields = {
        "name": "elsewhere",
        "threads": 1,
        "batch": 1,
        "precisions": ("fp32", "fp16", "int8"),
        "peak_gmacs": {"fp32": 1.0, "fp16": 2.0, "int8": 4.0},
        "efficiency": {name: {"fp32": 1.0} for name in ("conv", "depthwise", "gemm", "elementwise")},
        "levels": [{"name": "DRAM", "gb_per_s": 1e6}],
        "launch_us": 3.0,
        "run_us": 7.0,
        "error_band": 0.4,
        "sources": {"peak_gmacs": "made up"},
    }
    return AnalyticProfile.model_validate({**fields, **changes})


def test_a_roofline_by_hand(tmp_path: Path) -> None:
    path = conv_net(tmp_path / "c.onnx")
    estimate = predict_onnx(path, device())
    kernels = {name: value for name, value in estimate.per_kernel.items() if name != "overhead"}
    # The convolution with the Relu in it and 13,824 products at 1 a nanosecond, on no grid of this machine's.
    assert max(kernels.values()) == pytest.approx(1e-3 * (3 + 8 * 8 * 8 * 27 * 1e-3))
    assert estimate.per_kernel["overhead"] == pytest.approx(7e-3)
    latency = estimate.costs["latency_ms"]
    assert latency.source == "analytic"
    assert latency.high == pytest.approx(1.4 * latency.value)


def test_a_device_with_float16_computes_in_it(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "up"), helper.make_node("Sigmoid", ["h"], ["y"], "gate")]
    weights = {"a": normal(64, 128).astype(np.float16)}
    path = save(tmp_path / "h.onnx", nodes, {"x": [600, 64]}, ["y"], weights, TensorProto.FLOAT16)
    prediction = predict_in_detail(path, device())
    assert [kernel.op for kernel in prediction.kernels] == ["MatMul", "Sigmoid"], "no conversions of this machine's"
    assert prediction.kernels[0].latency_ms == pytest.approx(1e-3 * (3 + 600 * 64 * 128 / 2 * 1e-3))
    assert prediction.estimate.costs["peak_memory_bytes"].value == 2 * 2 * 600 * 128


def test_energy_by_hand(tmp_path: Path) -> None:
    energy = {"pj_per_mac": {"fp32": 5.0}, "static_mw": 100.0}
    costs = predict_onnx(token_net(tmp_path / "t.onnx"), device(energy=energy)).costs
    expected = 5.0 * 2 * 6 * 64 * 128 * 1e-9 + 100.0 * costs["latency_ms"].value * 1e-3
    assert costs["energy_mj"].value == pytest.approx(expected)
    assert "energy_mj" not in predict_onnx(tmp_path / "t.onnx", device()).costs


def test_a_model_too_large_for_the_device_is_said_to_be(tmp_path: Path) -> None:
    small = device(memory={"ram_bytes": 1000, "flash_bytes": 10_000, "engine_bytes": 500})
    estimate = predict_onnx(token_net(tmp_path / "t.onnx"), small)
    assert estimate.costs["peak_memory_bytes"].value == 500 + 2 * 4 * 6 * 128
    assert len([note for note in estimate.notes if "does not fit" in note]) == 2


def test_a_profile_of_openvino_prices_openvino_kernels(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    profile = make_profile().model_copy(update={"runtime": "openvino"})
    prediction = predict_in_detail(conv_net(tmp_path / "c.onnx"), profile)
    assert {"Convolution", "FullyConnected"} <= {kernel.op for kernel in prediction.kernels}
    assert prediction.estimate.costs["macs"].value == cost(tmp_path / "c.onnx", "macs")
    unheard = profile.model_copy(update={"runtime": "tensorrt"})
    with pytest.raises(UsageError, match="onnxruntime or openvino"):
        predict_onnx(tmp_path / "c.onnx", unheard)


# -------------------------------------------------------------------------------------------- what is not known


def test_an_operator_never_measured_is_named_and_widens_the_band(tmp_path: Path) -> None:
    known = predict_onnx(token_net(tmp_path / "t.onnx"), make_profile())
    guess = predict_onnx(odd(tmp_path / "o.onnx"), make_profile())
    assert guess.unmodelled == ("Det",)
    assert guess.per_kernel["determinant"] > 0, "never free"

    def width(estimate: Estimate) -> float:
        latency = estimate.costs["latency_ms"]
        return (latency.high - latency.low) / latency.value

    assert width(guess) > 1.5 * width(known)


def test_a_class_missing_from_the_profile_is_priced_by_its_substitute(tmp_path: Path) -> None:
    full = make_profile()
    bare = full.model_copy(update={"kernels": {k: v for k, v in full.kernels.items() if k != "matmul_fp32"}})
    path = token_net(tmp_path / "t.onnx")
    with_substitute = predict_onnx(path, bare)
    assert with_substitute.unmodelled == ("MatMul (matmul_fp32) x2",)
    assert with_substitute.costs["latency_ms"].value == pytest.approx(cost(path, "latency_ms"))
    assert with_substitute.costs["latency_ms"].high > predict_onnx(path, full).costs["latency_ms"].high


# ----------------------------------------------------------------------------------------------------- bad input


def test_an_open_axis_needs_a_size(tmp_path: Path) -> None:
    path = token_net(tmp_path / "t.onnx", tokens="sequence")
    with pytest.raises(UsageError, match="--dim sequence=128"):
        predict_onnx(path, make_profile())
    with pytest.raises(UsageError, match=r"unknown open axis 'sequenze'.*'sequence'"):
        predict_onnx(path, make_profile(), dims={"sequence": 6, "sequenze": 6})
    assert predict_onnx(path, make_profile(), dims={"sequence": 6}).costs["macs"].value == 2 * 6 * 64 * 128


def test_files_that_are_no_models(tmp_path: Path) -> None:
    whole = conv_net(tmp_path / "c.onnx").read_bytes()
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("a model?", encoding="utf-8")
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    faults = {"none": "no model file", "empty": "is not", "text": "is not", "cut": "is not|cannot open"}
    for name, says in faults.items():
        with pytest.raises(UsageError, match=says) as caught:
            predict_onnx(tmp_path / f"{name}.onnx", make_profile())
        assert f"{name}.onnx" in str(caught.value)
    with pytest.raises(UsageError, match="folder"):
        predict_onnx(tmp_path, make_profile())


def test_an_operator_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "u.onnx", [helper.make_node("Frobnicate", ["x"], ["y"], "f")], {"x": [1, 4]}, ["y"])
    with pytest.raises(UsageError, match="Frobnicate"):
        predict_onnx(path, make_profile())
