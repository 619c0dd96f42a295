"""Rooflines: worked out by hand, monotone, honest about what a device cannot do, and corrected by measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.hardware.analytic import AnalyticCostModel
from autocompress.hardware.analytic_calibration import calibrate_profile, read_measurements
from autocompress.hardware.analytic_profile import AnalyticProfile, UserMeasurement
from autocompress.hardware.kernels import Work
from autocompress.hardware.profile import HardwareProfile, load_hardware
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, CompressionPlan, Estimate, LayerPlan, NumFormat, Quantity
from tests.fixtures.search import make_graph, make_profile
from tests.graphs import GraphMaker, resnet

INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
INT4 = LayerPlan(compute="int8", storage=INT4_WEIGHT)

TOY: Mapping[str, Any] = {
    "name": "toy",
    "threads": 1,
    "batch": 1,
    "precisions": ("fp32", "int8"),
    "channel_step": {"fp32": 8, "int8": 16},
    "error_band": 1.0,
    "peak_gmacs": {"fp32": 10.0, "int8": 40.0},
    "efficiency": {
        "conv": {"fp32": 0.5},
        "depthwise": {"fp32": 0.1},
        "gemm": {"fp32": 0.5},
        "elementwise": {"fp32": 1},
    },
    "levels": ({"name": "near", "capacity_bytes": 10_000, "gb_per_s": 8.0}, {"name": "far", "gb_per_s": 1.0}),
    "launch_us": 2.0,
    "run_us": 5.0,
    "sources": {"all": "made up"},
}


def toy(**fields: object) -> AnalyticProfile:
    return AnalyticProfile.model_validate({**TOY, **fields})


def one_conv(channels: int = 12) -> Any:
    """A convolution 3x3 of 4 channels into ``channels``, on 8x8."""
    maker = GraphMaker()
    maker.conv(maker.input("image", (4, 8, 8)), channels, "conv")
    return maker.build(("image",), ("conv_out",))


def latency_us(profile: AnalyticProfile, graph: Any, plan: CompressionPlan | None = None) -> float:
    return float(AnalyticCostModel(profile).lower(graph).price([plan or CompressionPlan()]).latency_ms[0]) * 1e3


def test_a_layer_bound_by_computation() -> None:
    # 64 positions x 16 outputs (12 on a grid of 8) x 40 inputs (36 on a grid of 8), at 5 GMAC/s.
    compute = 64 * 16 * 40 / 5e9 * 1e6
    assert latency_us(toy(), one_conv()) == pytest.approx(5 + 2 + compute)
    fine = toy(channel_step={})
    assert latency_us(fine, one_conv()) == pytest.approx(5 + 2 + 64 * 12 * 36 / 5e9 * 1e6)


def test_a_layer_bound_by_memory_pays_for_the_level_it_fits_in() -> None:
    fast = toy(peak_gmacs={"fp32": 1e6, "int8": 1e6})
    moved, weights = 4 * 64 * (4 + 12), 4 * 12 * 36
    assert moved + weights < 10_000
    assert latency_us(fast, one_conv()) == pytest.approx(5 + 2 + (moved + weights) / 8e9 * 1e6)
    moved, weights = 4 * 64 * (4 + 48), 4 * 48 * 36
    assert weights < 10_000 < moved + weights
    # The activations go to the far memory with their working set; the weights of the whole model fit in the near one.
    assert latency_us(fast, one_conv(48)) == pytest.approx(5 + 2 + moved / 1e9 * 1e6 + weights / 8e9 * 1e6)
    flash = toy(peak_gmacs={"fp32": 1e6, "int8": 1e6}, weights_gb_per_s=0.5)
    assert latency_us(flash, one_conv(48)) == pytest.approx(5 + 2 + moved / 1e9 * 1e6 + weights / 0.5e9 * 1e6)


def test_weights_beyond_a_memory_come_from_the_next() -> None:
    roofline = AnalyticCostModel(toy())._roofline
    assert roofline.weights_us_per_byte(8_000) == pytest.approx(1e-3 / 8)
    assert roofline.weights_us_per_byte(40_000) == pytest.approx((10_000 / 8 + 30_000) * 1e-3 / 40_000)


def test_int8_is_quantized_at_the_edges_and_falls_back_to_what_the_device_has() -> None:
    plan = CompressionPlan(layers={"conv": INT8})
    model = AnalyticCostModel(toy())
    estimate = model.lower(one_conv()).estimate(plan)
    # 16 outputs, 48 inputs on a grid of 16, at 20 GMAC/s; the input is quantized: 5 bytes for each of 256 numbers.
    assert estimate.per_kernel["conv"] * 1e3 == pytest.approx(2 + 64 * 16 * 48 / 20e9 * 1e6)
    assert estimate.per_kernel["edge:image"] * 1e3 == pytest.approx(2 + 5 * 256 / 8e9 * 1e6)
    assert estimate.per_kernel["overhead"] * 1e3 == pytest.approx(5)
    halves = toy(precisions=("fp32", "fp16"), peak_gmacs={"fp32": 10, "fp16": 20}, channel_step={"fp16": 8})
    alone = AnalyticCostModel(halves).lower(one_conv()).estimate(plan).per_kernel["conv"]
    assert alone * 1e3 == pytest.approx(2 + 64 * 16 * 40 / 10e9 * 1e6), "int8 runs in half precision"


def test_bits_make_a_bit_flexible_device_faster_in_steps() -> None:
    flexible = toy(bit_rule="bitfusion", levels=({"name": "all", "gb_per_s": 1e6},))
    times = {
        bits: AnalyticCostModel(flexible)
        .lower(one_conv())
        .estimate(CompressionPlan(layers={"conv": LayerPlan(compute="int8", storage=NumFormat(bits=bits))}))
        .per_kernel["conv"]
        * 1e3
        - 2
        for bits in (8, 6, 5, 4, 3, 2)
    }
    whole = 64 * 16 * 48 / 20e9 * 1e6
    assert times == pytest.approx({8: whole, 6: whole, 5: whole, 4: whole / 2, 3: whole / 2, 2: whole / 4})
    # Where bandwidth binds, every bit counts: 432 weights from a slow memory.
    slow = toy(bit_rule="bitfusion", peak_gmacs={"fp32": 1e6, "int8": 1e6}, weights_gb_per_s=0.01)
    saved = [latency_us(slow, one_conv(), CompressionPlan(layers={"conv": INT8}))]
    saved.append(
        latency_us(
            slow, one_conv(), CompressionPlan(layers={"conv": LayerPlan(compute="int8", storage=NumFormat(bits=6))})
        )
    )
    assert saved[0] - saved[1] == pytest.approx(432 * 2 / 8 / 0.01e9 * 1e6)


def test_an_int8_only_device_refuses_or_uses_its_host() -> None:
    only = {"precisions": ("int8",), "peak_gmacs": {"int8": 40.0}, "channel_step": {}}
    skeleton = AnalyticCostModel(toy(**only)).lower(one_conv())
    with pytest.raises(UsageError, match=r"toy computes in int8 only.*cannot run conv in fp32; give these layers int8"):
        skeleton.estimate(CompressionPlan())
    table = skeleton.price([CompressionPlan(), CompressionPlan(layers={"conv": INT8})])
    assert math.isinf(table.latency_ms[0])
    assert 0 < table.latency_ms[1] < 1
    stand_in = toy(**{**only, "precisions": ("int8", "fp16"), "peak_gmacs": {"int8": 40, "fp16": 20}}, floats_as="fp16")
    estimate = AnalyticCostModel(stand_in).lower(one_conv()).estimate(CompressionPlan())
    assert estimate.per_kernel["conv"] * 1e3 == pytest.approx(2 + 64 * 12 * 36 / 10e9 * 1e6)
    assert estimate.notes == ("layers in fp32 run in what stands in for it on toy: fp16",)
    host = {"peak_gmacs": 1.0, "gb_per_s": 1.0, "launch_us": 7.0, "link_gb_per_s": 0.5}
    estimate = AnalyticCostModel(toy(**only, host=host)).lower(one_conv()).estimate(CompressionPlan())
    moved = 4 * 64 * (4 + 12)
    assert estimate.per_kernel["conv"] * 1e3 == pytest.approx(7 + 64 * 12 * 36 / 1e9 * 1e6 + moved / 0.5e9 * 1e6)
    assert any("host" in note for note in estimate.notes)


def test_what_does_not_fit_is_said() -> None:
    small = toy(memory={"ram_bytes": 5000, "flash_bytes": 1000, "engine_bytes": 1500})
    estimate = AnalyticCostModel(small).lower(one_conv()).estimate(CompressionPlan())
    assert estimate.costs["peak_memory_bytes"].value == 4 * 64 * (4 + 12) + 1500
    ram, flash = estimate.notes
    assert "5.6 kB of RAM" in ram
    assert "flash" in flash
    roomy = toy(memory={"ram_bytes": 50_000, "flash_bytes": 50_000})
    assert AnalyticCostModel(roomy).lower(one_conv()).estimate(CompressionPlan()).notes == ()


def test_energy_is_work_bytes_and_time() -> None:
    profile = toy(energy={"pj_per_mac": {"fp32": 4}, "pj_per_byte": 10, "static_mw": 100}, channel_step={})
    estimate = AnalyticCostModel(profile).lower(one_conv()).estimate(CompressionPlan())
    moved = 4 * (64 * (4 + 12) + 12 * 36)
    milliseconds = estimate.costs["latency_ms"].value
    expected = (64 * 12 * 36 * 4 + moved * 10) * 1e-9 + 100 * milliseconds * 1e-3
    assert estimate.costs["energy_mj"].value == pytest.approx(expected)
    assert "energy_mj" not in AnalyticCostModel(toy()).lower(one_conv()).estimate(CompressionPlan()).costs


def test_the_band_is_a_factor() -> None:
    latency = AnalyticCostModel(toy()).lower(one_conv()).estimate(CompressionPlan()).costs["latency_ms"]
    assert latency.source == "analytic"
    assert (latency.low, latency.high) == pytest.approx((latency.value / 2, latency.value * 2))


def test_threads_and_batch_scale_and_are_limited() -> None:
    profile = toy(max_threads=4, thread_share=0.5)
    four = latency_us(profile.at(4, None), one_conv())
    assert four - 7 == pytest.approx((latency_us(profile, one_conv()) - 7) / 2.5)
    fast = toy(levels=({"name": "all", "gb_per_s": 1e3},))
    assert latency_us(fast.at(None, 8), one_conv()) - 7 == pytest.approx(8 * (latency_us(fast, one_conv()) - 7))
    with pytest.raises(UsageError, match="at most 4"):
        profile.at(5, None)


def test_kernels_of_any_model_are_priced() -> None:
    model = AnalyticCostModel(toy())
    work = Work(macs=5e6, read_bytes=100, written_bytes=100, weight_bytes=100)
    assert model.kernel_us("conv_fp32", work) == pytest.approx(2 + 1000)
    assert model.kernel_us("depthwise_fp32", work) == pytest.approx(2 + 5000)
    assert model.kernel_us("matmul_int8", work) == pytest.approx(2 + 250)
    assert model.kernel_us("view", work) == 0
    assert model.run_us(0) == 5
    assert model.run_us(1e6) > model.run_us(1e5) > 5
    with pytest.raises(UsageError, match="unknown kernel class"):
        model.kernel_us("conv_fp33", work)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([16, 32, 48, 64]), min_size=2, max_size=2, unique=True),
    bits=st.lists(st.sampled_from([2, 3, 4, 5, 6, 7, 8]), min_size=2, max_size=2, unique=True),
    rule=st.sampled_from(["none", "bitfusion"]),
    near=st.sampled_from([1_000, 30_000, 1_000_000]),
)
def test_more_channels_or_bits_are_never_cheaper(widths: list[int], bits: list[int], rule: str, near: int) -> None:
    levels = ({"name": "near", "capacity_bytes": near, "gb_per_s": 8.0}, {"name": "far", "gb_per_s": 1.0})
    model = AnalyticCostModel(toy(bit_rule=rule, levels=levels))
    narrow, wide = (model.lower(one_conv(width)) for width in sorted(widths))
    few, many = (
        CompressionPlan(layers={"conv": LayerPlan(compute="int8", storage=NumFormat(bits=b))}) for b in sorted(bits)
    )
    for plan in (CompressionPlan(), few, many):
        assert narrow.price([plan]).latency_ms[0] <= wide.price([plan]).latency_ms[0]
        assert narrow.price([plan]).size_bytes[0] < wide.price([plan]).size_bytes[0]
    assert wide.price([few]).latency_ms[0] <= wide.price([many]).latency_ms[0]
    assert wide.price([few]).size_bytes[0] <= wide.price([many]).size_bytes[0]
    if {2, 4, 8} >= set(bits):  # other widths may lie in the bytes of the next of these
        assert wide.price([few]).size_bytes[0] < wide.price([many]).size_bytes[0]


def test_arrays_price_like_plans_one_by_one() -> None:
    graph = make_graph()
    skeleton = AnalyticCostModel(toy()).lower(graph)
    rng = np.random.default_rng(0)
    plans = [
        CompressionPlan(
            groups={group.id: int(rng.integers(1, group.size + 1)) for group in graph.groups},
            layers={name: [LayerPlan(), INT8, INT4][int(rng.integers(3))] for name in skeleton.layer_names},
        )
        for _ in range(30)
    ]
    together = skeleton.price(plans)
    for row, plan in enumerate(plans):
        estimate = skeleton.estimate(plan)
        assert together.latency_ms[row] == pytest.approx(estimate.costs["latency_ms"].value)
        assert sum(estimate.per_kernel.values()) == pytest.approx(together.latency_ms[row])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"precisions": ("fp32",)}, "differ"),
        ({"efficiency": {"conv": {"fp32": 0.5}}}, "no depthwise, gemm, elementwise"),
        ({"levels": ({"name": "a", "capacity_bytes": 1, "gb_per_s": 1},)}, "holds everything"),
        ({"levels": ({"name": "a", "capacity_bytes": 1, "gb_per_s": 1}, {"name": "b", "gb_per_s": 2})}, "no faster"),
        ({"threads": 2}, "at most max_threads=1"),
        ({"validated": True}, "validated"),
        ({"launch_us": float("inf")}, "launch_us"),
        ({"peak_gmacs": {"fp32": -1, "int8": 1}}, "peak_gmacs"),
    ],
)
def test_impossible_devices_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        toy(**fields)


# ---------------------------------------------------------------------------------------------------- calibration


def predictor(works: Mapping[str, tuple[float, float]], truth: tuple[float, float] = (1.0, 1.0)) -> Any:
    """Predicts by name: milliseconds of computation and of overhead."""

    def predict(path: Path, profile: HardwareProfile) -> Estimate:
        assert isinstance(profile, AnalyticProfile)
        work, overhead = works[path.name]
        value = work * profile.scale_compute * truth[0] + overhead * profile.scale_overhead * truth[1]
        return Estimate(
            target="toy", costs={"latency_ms": Quantity(value=value, low=value, high=value, source="analytic")}
        )

    return predict


WORKS = {"small.onnx": (0.5, 1.0), "large.onnx": (40.0, 2.0), "other.onnx": (8.0, 4.0)}


def measured(names: list[str], compute: float, overhead: float) -> list[UserMeasurement]:
    return [
        UserMeasurement(model=f"folder/{n}", latency_ms=WORKS[n][0] * compute + WORKS[n][1] * overhead) for n in names
    ]


def test_two_measurements_tell_computation_from_overhead() -> None:
    made = calibrate_profile(toy(), measured(["small.onnx", "large.onnx"], 1.5, 1.2), predictor(WORKS))
    assert (made.scale_compute, made.scale_overhead) == pytest.approx((1.5, 1.2), rel=0.02)
    assert made.validated is False
    assert [m.model for m in made.calibrated_on] == ["small.onnx", "large.onnx"]
    assert made.error_band >= 0.5, "two measurements do no more than halve the band"
    assert latency_us(made, one_conv()) == pytest.approx(1.2 * 7 + 1.5 * 64 * 16 * 40 / 5e9 * 1e6, rel=0.02)
    again = calibrate_profile(made, measured(["small.onnx", "large.onnx"], 1.5, 1.2), predictor(WORKS))
    assert again.scale_compute == pytest.approx(made.scale_compute), "scales replace those before"


def test_the_band_follows_what_measurements_support() -> None:
    names = list(WORKS)
    good = calibrate_profile(toy(), measured(names, 1.3, 1.3), predictor(WORKS))
    assert good.error_band == pytest.approx(0.1)
    wild = measured(names, 1.3, 1.3)
    wild[1] = wild[1].model_copy(update={"latency_ms": wild[1].latency_ms * 4})
    assert calibrate_profile(toy(), wild, predictor(WORKS)).error_band > 1.0, "a contradiction widens it"


def test_calibration_needs_two_and_an_analytic_profile() -> None:
    with pytest.raises(UsageError, match="give at least 2"):
        calibrate_profile(toy(), measured(["small.onnx"], 1, 1), predictor(WORKS))
    with pytest.raises(UsageError, match="measure again"):
        calibrate_profile(make_profile(), measured(["small.onnx"], 1, 1), predictor(WORKS))


def test_measurements_are_read_and_checked(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    path = tmp_path / "mine.yaml"
    path.write_text("- {model: a.onnx, latency_ms: 2.5}\n")
    assert read_measurements(path) == [UserMeasurement(model=str(tmp_path / "a.onnx"), latency_ms=2.5)]
    for content, says in (
        ("model: a.onnx", "expected a list"),
        ("- {model: a.onnx, latency_ms: -1}", "entry 1: latency_ms"),
        ("- {model: b.onnx, latency_ms: 1}", "no such file"),
        ("- {model: a.onnx, ms: 1}", "entry 1"),
        ("[", "not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=says):
            read_measurements(path)


def test_a_calibrated_profile_survives_its_file(tmp_path: Path) -> None:
    made = calibrate_profile(toy(), measured(list(WORKS), 1.5, 1.2), predictor(WORKS))
    assert load_hardware(made.save(tmp_path / "mine.yaml")) == made


def test_a_whole_network_is_priced_fast_enough() -> None:
    """20,000 plans of ResNet-20 a second; a tenth of it is asked for here, on a busy machine."""
    import time

    skeleton = AnalyticCostModel(toy()).lower(resnet()[0])
    formats = np.random.default_rng(0).integers(0, 3, (4096, len(skeleton.layer_names)))
    begin = time.process_time()
    skeleton.price_arrays(np.zeros((4096, 0)), formats)
    assert 4096 / (time.process_time() - begin) > 2_000
