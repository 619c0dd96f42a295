"""Prices: by hand, vectorised against one at a time, and corrected by a few measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from autocompress.errors import UsageError
from autocompress.graph.rewrite import rewrite
from autocompress.hardware.calibration import Calibration
from autocompress.hardware.cost import FittedCostModel
from autocompress.hardware.kernels import FAMILIES, KINDS
from autocompress.hardware.profile import EndToEnd, FittedProfile, KernelCost, Provenance
from autocompress.hardware.skeleton import FORMATS, Skeleton
from autocompress.hardware.synthetic import INT8, GraphMaker
from autocompress.plan import INT4_WEIGHT, CompressionPlan, Group, LayerPlan, Member, ModelGraph, Student

PROVENANCE = Provenance(measured_at="2026-01-01T00:00:00+00:00", seconds=1.0, cpu="test", cores=1, system="test")


def make_profile(**kernels: KernelCost) -> FittedProfile:
    """Heavy kernels cost by their work, light ones by their bytes; int8 is four times as fast."""
    table = {
        kind: KernelCost(
            fixed_us=1.0,
            per_mmac_us=8.0 if family == "fp32" else 2.0 if family == "int8" else 0.0,
            per_read_mb_us=20.0 if family in ("light", "boundary") else 0.0,
        )
        for kind, family in KINDS.items()
    }
    return FittedProfile(
        name="made-up",
        runtime_version="1.0",
        threads=1,
        batch=1,
        nchwc_block=16,
        kernels={**table, **kernels},
        end_to_end=EndToEnd(per_run_us=2.0),
        provenance=PROVENANCE,
    )


def small_net() -> ModelGraph:
    """One convolution, pooled and classified."""
    make = GraphMaker()
    x = make.relu(make.conv(make.tensor("input", (3, 8, 8)), 8))
    return make.build(make.head(x, 10))


def residual_graph() -> ModelGraph:
    """A stem, a residual block and a strided convolution, with their three groups."""
    make = GraphMaker()
    stem = make.relu(make.conv(make.tensor("input", (3, 16, 16)), 64))
    inner = make.relu(make.conv(stem, 64))
    added = make.add(make.conv(inner, 64), stem)
    joined = make.relu(added)
    wide = make.relu(make.conv(joined, 128, stride=2))
    graph = make.build(make.head(wide, 10))
    first, second, third, fourth = [layer for layer in graph.layers if layer.op == "Conv"]
    head = graph.layers[-1]

    def group(name: str, out: Sequence[str], into: Sequence[tuple[str, int]], activations: Sequence[str]) -> Group:
        members = [Member(tensor=f"{n}.{part}", axis=0, role="out") for n in out for part in ("weight", "bias")]
        members += [Member(tensor=f"{n}.weight", axis=axis, role="in") for n, axis in into]
        members += [Member(tensor=t, axis=0, role="activation") for t in activations]
        size = graph.tensors[f"{out[0]}.weight"].shape[0]
        return Group(id=name, kind="channel", size=size, align=16, members=tuple(members))

    pooled, flat = graph.layers[-3].outputs[0], graph.layers[-2].outputs[0]
    groups = (
        group(
            first.name,
            [first.name, third.name],
            [(second.name, 1), (fourth.name, 1)],
            [first.outputs[0], stem, third.outputs[0], added, joined],
        ),
        group(second.name, [second.name], [(third.name, 1)], [second.outputs[0], inner]),
        group(fourth.name, [fourth.name], [(head.name, 1)], [fourth.outputs[0], wide, pooled, flat]),
    )
    return graph.model_copy(update={"groups": groups})


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return residual_graph()


@pytest.fixture
def skeleton(graph: ModelGraph) -> Skeleton:
    return FittedCostModel(make_profile()).lower(graph)


def random_plans(graph: ModelGraph, count: int, seed: int = 0, step: int = 4) -> list[CompressionPlan]:
    rng = np.random.default_rng(seed)
    names = [layer.name for layer in graph.compressible]
    return [
        CompressionPlan(
            groups={g.id: int(rng.integers(1, g.size // step + 1)) * step for g in graph.groups},
            layers={name: FORMATS[int(rng.integers(len(FORMATS)))] for name in names if rng.random() < 0.7},
        )
        for _ in range(count)
    ]


def test_float_latency_by_hand() -> None:
    profile = make_profile(
        conv_few_fp32=KernelCost(fixed_us=1.0, per_mmac_us=10.0, per_read_mb_us=100.0),
        reorder_output=KernelCost(fixed_us=0.5),
        global_pool_fp32=KernelCost(fixed_us=0.25),
        view=KernelCost(fixed_us=0.125),
        gemm_fp32=KernelCost(fixed_us=1.0, per_mmac_us=100.0),
    )
    table = FittedCostModel(profile).lower(small_net()).price([CompressionPlan()])
    # 3 -> 8 channels run as 3 -> 16 packed ones; pooling 8 channels needs them unpacked first.
    conv = 1.0 + 10 * (64 * 9 * 3 * 16) * 1e-6 + 100 * (4 * 3 * 64) * 1e-6
    gemm = 1.0 + 100 * (8 * 10) * 1e-6
    assert table.latency_ms[0] * 1e3 == pytest.approx(conv + 0.5 + 0.25 + 0.125 + gemm + 2.0)
    assert table.macs[0] == 64 * 9 * 3 * 8 + 80
    # The input and the convolution's result are alive together.
    assert table.peak_memory_bytes[0] == 4 * (3 * 64 + 8 * 64)


def test_int8_latency_by_hand() -> None:
    profile = make_profile(**{kind: KernelCost(fixed_us=1.0) for kind in KINDS})
    graph = small_net()
    plan = CompressionPlan(layers={layer.name: INT8 for layer in graph.compressible})
    skeleton = FittedCostModel(profile).lower(graph)
    estimate = skeleton.estimate(plan)
    # quantize, pad, transpose, convolution, pool, transpose, flatten, gemm; and 2 us a run
    assert estimate.costs["latency_ms"].value * 1e3 == pytest.approx(8 + 2)
    assert skeleton.price([plan]).peak_memory_bytes[0] == 3 * 64 + 8 * 64
    assert estimate.per_kernel["edge:input"] * 1e3 == pytest.approx(2.0)


def test_where_float_meets_int8_both_forms_take_memory() -> None:
    make = GraphMaker()
    x = make.relu(make.conv(make.tensor("input", (3, 8, 8)), 8))
    graph = make.build(make.head(make.relu(make.conv(x, 4)), 10))
    second = graph.compressible[1].name
    peak = FittedCostModel(make_profile()).lower(graph).price([CompressionPlan(layers={second: INT8})])
    # The first convolution writes floats, which are quantized for the second while the input is still there.
    assert peak.peak_memory_bytes[0] == 4 * 3 * 64 + 4 * 8 * 64 + 8 * 64


def test_mixed_types_pay_for_their_edges(graph: ModelGraph, skeleton: Skeleton) -> None:
    names = skeleton.layer_names
    alternating = skeleton.estimate(CompressionPlan(layers={name: INT8 for name in names[::2]}))
    whole = skeleton.estimate(CompressionPlan(layers=dict.fromkeys(names, INT8)))
    edges = [sum(v for k, v in e.per_kernel.items() if k.startswith("edge:")) for e in (alternating, whole)]
    assert edges[0] > edges[1] > 0


def test_breakdown_adds_up(graph: ModelGraph, skeleton: Skeleton) -> None:
    for plan in random_plans(graph, 5):
        estimate = skeleton.estimate(plan)
        latency = estimate.costs["latency_ms"]
        assert sum(estimate.per_kernel.values()) == pytest.approx(latency.value)
        assert estimate.per_kernel["overhead"] * 1e3 == pytest.approx(2.0)
        assert latency.low < latency.value < latency.high
        assert latency.source == "fitted"
        assert estimate.unmodelled == ()


def test_arrays_price_like_plans_one_by_one(graph: ModelGraph, skeleton: Skeleton) -> None:
    plans = random_plans(graph, 40)
    together = skeleton.price(plans)
    keeps, formats = skeleton.encode(plans)
    from_arrays = skeleton.price_arrays(keeps, formats)
    for row, plan in enumerate(plans):
        alone = skeleton.price([plan])
        for field in ("latency_ms", "size_bytes", "peak_memory_bytes", "macs"):
            assert getattr(together, field)[row] == getattr(from_arrays, field)[row]
            assert getattr(together, field)[row] == pytest.approx(getattr(alone, field)[0])


def test_pruned_plan_prices_like_the_pruned_graph(graph: ModelGraph, skeleton: Skeleton) -> None:
    for plan in random_plans(graph, 8, seed=1):
        small = rewrite(graph, plan.groups)
        direct = FittedCostModel(skeleton.profile).lower(small).price([CompressionPlan(layers=plan.layers)])
        table = skeleton.price([plan])
        assert table.latency_ms[0] == pytest.approx(direct.latency_ms[0])
        assert table.size_bytes[0] == direct.size_bytes[0]
        assert table.peak_memory_bytes[0] == direct.peak_memory_bytes[0]
        assert table.macs[0] == small.macs()


def test_wider_is_never_cheaper_on_the_grid(graph: ModelGraph, skeleton: Skeleton) -> None:
    for code in (0, 1):
        for column, group in enumerate(graph.groups):
            widths = np.arange(16, group.size + 1, 16)
            keeps = np.tile([g.size for g in graph.groups], (len(widths), 1))
            keeps[:, column] = widths
            table = skeleton.price_arrays(keeps, np.full((len(widths), len(skeleton.layer_names)), code))
            for costs in (table.latency_ms, table.size_bytes, table.macs):
                assert (np.diff(costs) > 0).all()
            assert (np.diff(table.peak_memory_bytes) >= 0).all()


def test_stored_bits_set_the_size_and_not_the_macs(graph: ModelGraph, skeleton: Skeleton) -> None:
    plans = [CompressionPlan(layers=dict.fromkeys(skeleton.layer_names, plan)) for plan in FORMATS]
    sizes = dict(zip(FORMATS, skeleton.price(plans).size_bytes, strict=True))
    weights = sum(graph.tensors[layer.inputs[1]].elements for layer in graph.compressible)
    assert sizes[FORMATS[0]] - sizes[FORMATS[1]] == pytest.approx(3 * weights, rel=0.02)
    assert sizes[FORMATS[1]] - sizes[FORMATS[2]] == pytest.approx(weights / 2, rel=0.02)
    assert len(set(skeleton.price(plans).macs)) == 1


def test_encode_learns_new_formats_and_refuses_unknown_names(graph: ModelGraph, skeleton: Skeleton) -> None:
    name, group = skeleton.layer_names[0], graph.groups[0]
    before = len(skeleton.formats)
    odd = LayerPlan(storage=INT4_WEIGHT.model_copy(update={"bits": 3}))
    _, codes = skeleton.encode([CompressionPlan(layers={name: odd}), CompressionPlan(layers={name: odd.model_copy()})])
    assert len(skeleton.formats) == before + 1
    assert skeleton.formats[codes[0, 0]] == odd
    assert codes[0, 0] == codes[1, 0]
    with pytest.raises(UsageError, match="unknown weight layer 'conv_00'"):
        skeleton.encode([CompressionPlan(layers={"conv_00": INT8})])
    with pytest.raises(UsageError, match="unknown group"):
        skeleton.encode([CompressionPlan(groups={"nothing": 1})])
    with pytest.raises(UsageError, match="cannot keep 65"):
        skeleton.encode([CompressionPlan(groups={group.id: 65})])
    with pytest.raises(UsageError, match="student"):
        skeleton.encode([CompressionPlan(base=Student(width=0.5))])


def test_wrong_array_shapes_are_refused(skeleton: Skeleton) -> None:
    with pytest.raises(UsageError, match="must be"):
        skeleton.price_arrays(np.ones((2, 1)), np.zeros((2, 1)))


def test_no_plans_cost_nothing(skeleton: Skeleton) -> None:
    assert len(skeleton.price([])) == 0


def test_unmeasured_kernels_are_named_and_never_free(graph: ModelGraph) -> None:
    profile = make_profile()
    kernels = {kind: cost for kind, cost in profile.kernels.items() if kind != "add_fp32"}
    skeleton = FittedCostModel(profile.model_copy(update={"kernels": kernels})).lower(graph)
    names = skeleton.layer_names
    plan = CompressionPlan(layers={names[0]: INT8})
    estimate = skeleton.estimate(plan)
    (missing,) = estimate.unmodelled
    assert missing.endswith("(add_fp32)")
    assert estimate.per_kernel[missing.split(" ")[0]] > 0
    sure = FittedCostModel(profile).lower(graph).estimate(plan).costs["latency_ms"]
    unsure = estimate.costs["latency_ms"]
    assert unsure.high / unsure.value > sure.high / sure.value


def test_unknown_operator_is_named() -> None:
    make = GraphMaker()
    x = make.conv(make.tensor("input", (3, 8, 8)), 16)
    x = make.op("Cos", (x,), make.tensors[x].shape)
    graph = make.build(make.head(x, 10))
    estimate = FittedCostModel(make_profile()).lower(graph).estimate(CompressionPlan())
    assert any("Cos" in name for name in estimate.unmodelled)
    assert estimate.per_kernel["cos_1"] > 0


def test_weights_beyond_the_cache_cost_extra(graph: ModelGraph) -> None:
    profile = make_profile()
    end = profile.end_to_end.model_copy(update={"per_cold_mb_us": 30.0, "cache_mb": 0.4})
    plan = CompressionPlan()
    cold = FittedCostModel(profile.model_copy(update={"end_to_end": end})).lower(graph).estimate(plan)
    warm = FittedCostModel(profile).lower(graph).estimate(plan)
    # Convolutions 3 -> 64 -> 64 -> 64 -> 128 of 3x3 and 128 -> 10, in float32.
    megabytes = 4e-6 * (9 * (3 * 64 + 2 * 64 * 64 + 64 * 128) + 1280)
    extra = cold.costs["latency_ms"].value - warm.costs["latency_ms"].value
    assert extra * 1e3 == pytest.approx(30.0 * megabytes * (megabytes / 0.4 - 1.0))
    assert cold.per_kernel["cold weights"] == pytest.approx(extra)


def test_an_empty_profile_is_refused(graph: ModelGraph) -> None:
    with pytest.raises(UsageError, match="no kernel costs"):
        FittedCostModel(make_profile().model_copy(update={"kernels": {}})).lower(graph)


def test_calibration_recovers_scales_and_sizes(graph: ModelGraph, skeleton: Skeleton) -> None:
    truth = FittedCostModel(skeleton.profile).lower(graph)
    scales = {"fp32": 1.25, "int8": 0.85, "light": 1.1, "boundary": 1.3}
    truth.calibration = Calibration(
        scales=tuple(scales.get(family, 1.0) for family in FAMILIES),
        per_kernel_us=0.2,
        per_run_us=6.0,
        size_coefficients=(2000.0, 60.0, 90.0, 75.0, 20.0),
    )
    rng = np.random.default_rng(3)
    anchors = random_plans(graph, 10, seed=2, step=16)
    measured = truth.price(anchors)
    noise = rng.normal(1.0, 0.003, len(anchors))
    unseen = random_plans(graph, 30, seed=9)
    true = truth.price(unseen)
    before = np.abs(skeleton.price(unseen).latency_ms / true.latency_ms - 1).mean()
    fit = skeleton.calibrate(
        [
            (p, float(ms * n), float(size))
            for p, ms, n, size in zip(anchors, measured.latency_ms, noise, measured.size_bytes, strict=True)
        ]
    )
    priced = skeleton.price(unseen)
    after = np.abs(priced.latency_ms / true.latency_ms - 1)
    assert after.mean() < 0.03 < before
    assert np.abs(priced.size_bytes / true.size_bytes - 1).max() < 0.02
    assert fit.observations == 10
    assert len(fit.errors) == 10
    assert fit.band < 0.15
    assert skeleton.estimate(anchors[0]).costs["size_bytes"].high == pytest.approx(measured.size_bytes[0], rel=0.05)


def test_one_observation_moves_prices_only_so_far(graph: ModelGraph, skeleton: Skeleton) -> None:
    plan = CompressionPlan()
    before = skeleton.price([plan])
    ms = float(before.latency_ms[0])
    fit = skeleton.calibrate([(plan, 1.1 * ms, float(before.size_bytes[0]))])
    assert skeleton.price([plan]).latency_ms[0] == pytest.approx(1.1 * ms, rel=0.02)
    assert fit.errors == ()
    with pytest.raises(UsageError, match="at least one"):
        skeleton.calibrate([])
