"""The rules of lowering against what the runtime really executes, and the fit on kernels it really timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autocompress.export.onnx import to_onnx
from autocompress.hardware import measure
from autocompress.hardware.anchors import anchor_plans, measure_plans
from autocompress.hardware.cost import FittedCostModel
from autocompress.hardware.coverage import lowered_kernels
from autocompress.hardware.fitting import MeasuredModel, fit_kernels, hold_out
from autocompress.hardware.kernels import KINDS, Work, conv_work, cost_us, round_up
from autocompress.hardware.profile import HardwareProfile, KernelCost
from autocompress.hardware.profiling import profile_kernels
from autocompress.hardware.reading import TimedKernel
from autocompress.hardware.steps import make_steps, quantized_tensors
from autocompress.hardware.synthetic import (
    INT8,
    GraphMaker,
    encoder_net,
    inverted_net,
    odd_net,
    plain_net,
    random_formats,
    random_model,
    residual_net,
    token_net,
)
from autocompress.methods.quantization import activation_formats
from autocompress.plan import INT8_WEIGHT, CompressionPlan, Group, LayerPlan, Member, ModelGraph, NumFormat
from autocompress.runtime import timing

NETS = (residual_net, inverted_net, plain_net, odd_net, token_net, encoder_net)


@pytest.fixture(scope="module")
def block() -> int:
    """Channels that this machine's runtime packs together."""
    return measure._detect_block(np.random.default_rng(0), 1, "onnxruntime")


@pytest.mark.parametrize("style", ["fp32", "int8", "mixed", "runs"])
@pytest.mark.parametrize("net", NETS)
def test_lowering_predicts_the_kernels_that_run(net: Callable[..., ModelGraph], style: str, block: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(3):
        # The third of the inverted nets has gates.
        graph = net(rng, 16, (18, 48))
    layers = random_formats(graph, rng, style)
    (executed,) = profile_kernels([to_onnx(random_model(graph, layers, rng)).SerializeToString()], block)
    predicted = [(kind, work) for _, kind, work in lowered_kernels(graph, layers, block, 1)]
    assert all(kernel.microseconds >= 0 for kernel in executed)

    def heavy(kernels: list[tuple[str, Work]]) -> Counter[tuple[str, int, int]]:
        return Counter((k, int(w.macs), int(w.weight_bytes)) for k, w in kernels if KINDS[k] in ("fp32", "int8"))

    ran = [(kernel.kind, kernel.work) for kernel in executed]
    assert heavy(predicted) == heavy(ran)
    # Around them, up to a few transpositions that the runtime moves about by its own accounts.
    light, seen = (Counter(k for k, _ in kernels if KINDS[k] not in ("fp32", "int8")) for kernels in (predicted, ran))
    assert sum((light - seen).values()) + sum((seen - light).values()) <= max(4, len(ran) // 8)
    if style in ("fp32", "int8"):
        assert light == seen


@pytest.mark.parametrize("net", [token_net, encoder_net, plain_net])
def test_products_in_every_type_are_predicted(net: Callable[..., ModelGraph], block: int) -> None:
    rng = np.random.default_rng(4)
    graph = net(rng, 16, (18, 48))
    few = NumFormat(bits=4, granularity="block", block=32)
    dynamic, blocks = (
        LayerPlan(compute="int8_dynamic", storage=INT8_WEIGHT),
        LayerPlan(compute="weight_only", storage=few),
    )
    names = [layer.name for layer in graph.compressible if layer.op != "Conv"]
    choices = [dict.fromkeys(names, dynamic), dict.fromkeys(names, blocks)]
    choices += [{n: [dynamic, blocks, INT8, LayerPlan()][int(rng.integers(4))] for n in names} for _ in range(2)]
    for layers in choices:
        (executed,) = profile_kernels([to_onnx(random_model(graph, layers, rng)).SerializeToString()], block)
        kinds = Counter((kernel.kind, int(kernel.work.macs), int(kernel.work.weight_bytes)) for kernel in executed)
        predicted = lowered_kernels(graph, layers, block, 1)
        products = ("fp32", "int8")
        found = Counter((kind, int(work.macs), int(work.weight_bytes)) for _, kind, work in predicted)
        assert {k: n for k, n in found.items() if KINDS[k[0]] in products} == {
            k: n for k, n in kinds.items() if KINDS[k[0]] in products
        }
        assert sum(k == "quantize_dynamic" for _, k, _ in predicted) == sum(
            k.kind == "quantize_dynamic" for k in executed
        )


@pytest.mark.parametrize("net", NETS)
def test_held_tensors_follow_the_rule_of_activation_formats(net: Callable[..., ModelGraph]) -> None:
    rng = np.random.default_rng(1)
    graph = net(rng, 24, (18, 32))
    names = [layer.name for layer in graph.compressible]
    codes = rng.random((30, len(names))) < 0.5
    held = quantized_tensors(graph, make_steps(graph), {n: codes[:, i] for i, n in enumerate(names)}, len(codes))
    for row, chosen in enumerate(codes):
        layers = {name: INT8 for name, yes in zip(names, chosen, strict=True) if yes}
        assert {t for t, mask in held.items() if mask[row]} == set(activation_formats(graph, layers))


def test_rounding_and_padding() -> None:
    assert [round_up(v, 16) for v in (1, 16, 17)] == [16, 16, 32]
    assert round_up(np.array([3, 12, 13]), 12).tolist() == [12, 12, 24]
    assert round_up(7, 0) == 7
    padded = conv_work("conv_fp32", 100, 9, 20, 33, 100, 16)
    assert padded.macs == 100 * 9 * 32 * 48
    assert padded.read_bytes == 4 * 100 * 32
    assert padded.written_bytes == 4 * 100 * 48
    assert conv_work("conv_fp32", 100, 9, 16, 80, 100, 16).points == 200, "80 channels take two passes"
    assert conv_work("conv_plain_fp32", 1, 1, 5, 7, 1, 16).macs == 35
    assert conv_work("depthwise_int8", 10, 9, 1, 24, 10, 16).macs == 10 * 9 * 32
    assert conv_work("depthwise_plain_int8", 10, 9, 1, 20, 10, 16).taps == 10 * 9 * 4, "4 channels off the grid of 8"


def test_fit_recovers_costs_through_the_cost_of_timing() -> None:
    rng = np.random.default_rng(0)
    truth = {"conv_fp32": (0.5, 7.0, 60.0), "add_fp32": (0.3, 0.0, 0.0), "conv_int8": (0.7, 1.0, 40.0)}
    models = []
    for _ in range(25):
        kernels, total = [], 5.0
        for _ in range(20):
            kind = str(rng.choice(list(truth)))
            if kind == "add_fp32":
                work = Work(read_bytes=int(rng.integers(1000, 200_000)))
                spent = 0.3 + 10.0 * work.read_bytes * 1e-6
            else:
                work = Work(macs=int(rng.integers(10_000, 4_000_000)), taps=int(rng.integers(1_000, 200_000)))
                spent = float(cost_us(KernelCost.of(truth[kind]).coefficients, work))
            total += spent
            kernels.append(TimedKernel(kind, work, (spent + 2.0) * float(rng.normal(1, 0.02))))
        models.append(MeasuredModel(kernels, total * float(rng.normal(1, 0.005))))
    fit = fit_kernels(models)
    assert fit.kernels["conv_fp32"].per_mmac_us == pytest.approx(7.0, rel=0.1)
    assert fit.kernels["conv_int8"].per_mtap_us == pytest.approx(40.0, rel=0.15)
    assert fit.kernels["add_fp32"].per_read_mb_us == pytest.approx(10.0, rel=0.2)
    assert sum(cost.samples for cost in fit.kernels.values()) == 500
    errors = hold_out(models)
    assert errors.mape < 0.03
    assert errors.kendall_tau > 0.9


def grouped_graph() -> ModelGraph:
    make = GraphMaker()
    x = make.relu(make.conv(make.tensor("input", (3, 12, 12)), 32))
    graph = make.build(make.head(x, 10))
    conv, head = graph.layers[0], graph.layers[-1]
    members = [Member(tensor=f"{conv.name}.{part}", axis=0, role="out") for part in ("weight", "bias")]
    members += [Member(tensor=f"{head.name}.weight", axis=1, role="in")]
    members += [Member(tensor=o, axis=0, role="activation") for layer in graph.layers[:-1] for o in layer.outputs]
    group = Group(id=conv.name, kind="channel", size=32, align=8, members=tuple(members))
    return graph.model_copy(update={"groups": (group,)})


def test_anchor_plans_cover_types_and_keep_to_the_grid() -> None:
    graph = grouped_graph()
    plans = anchor_plans(graph, seed=0, count=12)
    names = {layer.name for layer in graph.compressible}
    assert plans[0] == CompressionPlan()
    assert set(plans[1].layers) == names
    assert any(0 < len(plan.layers) < len(names) for plan in plans)
    assert len({plan.structure_digest for plan in plans}) == len(plans)
    assert len({kept for plan in plans for kept in plan.groups.values()}) > 1
    assert {kept for plan in plans for kept in plan.groups.values()} <= {4, 8, 12, 16, 20, 24, 28}
    assert plans == anchor_plans(graph, seed=0, count=12)


def test_a_quick_profile_prices_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from timing to calibration runs; how exact it is, is for the benchmarks."""
    monkeypatch.setattr(measure, "_SECONDS_EACH", 0.01)
    monkeypatch.setattr(timing, "WINDOW_S", 0.002)
    profile = measure.measure_profile(models=7)
    assert HardwareProfile.load(profile.save(tmp_path / "quick.yaml")) == profile
    assert profile.holdout is not None
    assert profile.holdout.models == 7
    graph = grouped_graph()
    plans = anchor_plans(graph, count=4)
    observations = measure_plans(graph, plans, seconds_each=0.02, block=profile.nchwc_block)
    assert all(observation.kernels for observation in observations)
    skeleton = FittedCostModel(profile).lower(graph)
    skeleton.calibrate(observations)
    table = skeleton.price(plans)
    sizes = np.array([observation.size_bytes for observation in observations])
    assert np.abs(table.size_bytes / sizes - 1).max() < 0.02
    assert (table.latency_ms > 0).all()
