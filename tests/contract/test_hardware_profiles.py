"""Every shipped profile loads, says where its numbers come from, and prices a model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from autocompress.hardware.analytic_profile import AnalyticProfile
from autocompress.hardware.kernels import KINDS, Work
from autocompress.hardware.models import COST_MODELS, cost_model
from autocompress.hardware.profile import list_hardware, load_hardware
from autocompress.hardware.profile_check import check_profile, profile_schema, unsourced_fields
from autocompress.hardware.synthetic import encoder_net, inverted_net
from autocompress.plan import INT8_WEIGHT, CompressionPlan, Estimate, LayerPlan
from autocompress.resources import resource_dir
from tests.fixtures.search import make_graph

SHIPPED = list_hardware()[1:]
EXPECTED = {
    "raspberry-pi-4", "raspberry-pi-5", "cortex-m7-cmsis-nn", "jetson-orin-nano", "h100", "phone-arm-big-core",
    "bitfusion", "edge-int8-npu",
}  # fmt: skip


def test_the_promised_devices_are_listed() -> None:
    assert set(SHIPPED) >= EXPECTED


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((resource_dir("hardware_profiles") / "schema.json").read_text())
    assert committed == profile_schema(), (
        'write it anew: python -c "import json; from autocompress.hardware.profile_check import profile_schema; '
        'print(json.dumps(profile_schema(), indent=1))" > hardware_profiles/schema.json'
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_profiles_are_sound_and_sourced(name: str) -> None:
    profile = load_hardware(name)
    assert profile.name == name
    assert profile.description
    assert not [check for check in check_profile(resource_dir("hardware_profiles") / f"{name}.yaml") if not check.ok]
    assert type(profile).model_validate_json(profile.model_dump_json()) == profile
    if isinstance(profile, AnalyticProfile):
        assert unsourced_fields(profile) == []
        assert all(len(source) > 8 for key, source in profile.sources.items() if key != "channel_step")
        assert profile.error_band >= 0.3, "nobody knows a device from its data sheet to better than a third"


GRAPHS = {
    "residual": make_graph,
    "inverted": lambda: inverted_net(np.random.default_rng(0), 32, (16, 24)),
    "encoder": lambda: encoder_net(np.random.default_rng(0), 32, (64, 96)),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_device_prices_a_model(name: str, graph: str) -> None:
    model = cost_model(load_hardware(name))
    skeleton = model.lower(GRAPHS[graph]())
    int8 = CompressionPlan(layers=dict.fromkeys(skeleton.layer_names, LayerPlan(compute="int8", storage=INT8_WEIGHT)))
    halved = int8.model_copy(update={"groups": {group.id: group.size // 2 for group in skeleton.graph.groups}})
    table = skeleton.price([int8, halved, CompressionPlan()])
    for costs in (table.latency_ms, table.size_bytes, table.peak_memory_bytes, table.macs):
        assert all(math.isfinite(cost) and cost > 0 for cost in costs)
    assert table.latency_ms[1] <= table.latency_ms[0]
    estimate = skeleton.estimate(int8)
    assert Estimate.model_validate_json(estimate.model_dump_json()) == estimate
    latency = estimate.costs["latency_ms"]
    assert latency.low < latency.value < latency.high
    assert sum(estimate.per_kernel.values()) == pytest.approx(latency.value)
    assert estimate.unmodelled == ()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_device_prices_the_kernels_it_runs(name: str) -> None:
    model = cost_model(load_hardware(name))
    work = Work(macs=1e6, taps=1e5, points=1e4, windows=1e4, read_bytes=1e4, written_bytes=1e4, weight_bytes=1e4)
    for kind in KINDS:
        cost = model.kernel_us(kind, work)
        assert math.isfinite(cost)
        assert cost > 0 or kind == "view"


@pytest.mark.parametrize("name", COST_MODELS)
def test_cost_models_can_be_had(name: str) -> None:
    made = COST_MODELS.load(name)
    assert made.__doc__
    assert {"lower", "kernel_us", "run_us"} <= set(dir(made))


@pytest.mark.slow
def test_predictions_lie_within_their_bands_of_published_latencies() -> None:
    """Small models only; ``benchmarks/published.py`` compares them all."""
    from benchmarks.published import predicted_ms

    compared = 0
    for name in SHIPPED:
        profile = load_hardware(name)
        for figure in profile.published if isinstance(profile, AnalyticProfile) else ():
            if figure.model.startswith(("mobilenet", "resnet18")) and not figure.used:
                ratio = predicted_ms(profile, figure) / figure.latency_ms
                assert max(ratio, 1 / ratio) <= 1 + profile.error_band, (name, figure.model, ratio)
                compared += 1
    assert compared >= 5
