"""What a device that is not here means for a search: limits, what counts, and what may be asked for."""

from __future__ import annotations

import pytest

from autocompress.config import RunConfig
from autocompress.errors import UsageError
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import cpu_description
from autocompress.plan import CompressionPlan, Estimate
from autocompress.search.target import (
    check_known,
    counted_costs,
    executed_types,
    is_present,
    limits_of,
    predicted_limits,
)
from tests.fixtures.search import PROVENANCE, make_device, make_graph, make_profile

MARGIN = 1.06
HOST = {"peak_gmacs": 1.0, "gb_per_s": 1.0, "launch_us": 5.0, "link_gb_per_s": 1.0}


def config(**values: object) -> RunConfig:
    return RunConfig.create(task="digits", trials=3, **values)


def dense(**device: object) -> Estimate:
    return cost_model(make_device(**device)).lower(make_graph()).estimate(CompressionPlan())


def test_only_this_machine_or_its_like_is_present() -> None:
    elsewhere = config().model_copy(update={"hardware": "elsewhere.yaml"})
    assert is_present(config(), make_profile())
    assert not is_present(elsewhere, make_profile())
    assert not is_present(elsewhere, make_device())
    here = PROVENANCE.model_copy(update={"cpu": cpu_description()})
    assert is_present(elsewhere, make_profile().model_copy(update={"provenance": here}))


def test_memories_of_the_device_are_limits_and_budgets_may_only_be_tighter() -> None:
    assert limits_of(config(), make_device()) == {"peak_memory_bytes": 512_000, "size_bytes": 2_000_000}
    assert limits_of(config(max_size_mb=1, max_memory_mb=100, max_drop=2), make_device()) == {
        "peak_memory_bytes": 512_000,
        "size_bytes": 1_000_000,
        "drop": 2.0,
    }
    assert limits_of(config(), make_profile()) == {}


def test_predictions_keep_a_budget_with_their_whole_band() -> None:
    limits = {"latency_ms": 1.4, "energy_mj": 1.4, "size_bytes": 100.0, "drop": 1.0}
    hard = predicted_limits(limits, dense(), present=False, margin=MARGIN)
    # 40% either way by the profile.
    assert hard == {"latency_ms": pytest.approx(1.0), "energy_mj": pytest.approx(1.0), "size_bytes": 100.0}
    near = predicted_limits(limits, dense(), present=True, margin=MARGIN)
    assert near == {"latency_ms": pytest.approx(1.4 / MARGIN), "energy_mj": 1.4, "size_bytes": 100.0}


def test_a_limit_that_the_original_keeps_does_not_count() -> None:
    def counted(asked: RunConfig, **device: object) -> list[str]:
        return counted_costs(asked, limits_of(asked, make_device(**device)), dense())

    assert counted(config(objectives="error,latency_ms")) == ["latency_ms"]
    tight = {"ram_bytes": 512_000, "flash_bytes": 20_000}
    assert counted(config(objectives="error,latency_ms"), memory=tight) == ["latency_ms", "size_bytes"]
    assert counted(config(objectives="error,energy_mj", max_size_mb=1.5)) == ["size_bytes", "energy_mj"]


def test_energy_is_refused_where_nothing_is_known_of_it() -> None:
    for asked in (config(max_energy_mj=1.0), config(objectives="error,energy_mj")):
        check_known(asked, make_device())
        with pytest.raises(UsageError, match="energy is not known for made-up: its profile has no figures"):
            check_known(asked, make_profile())


def test_energy_is_refused_where_the_host_would_compute_for_nothing() -> None:
    check_known(config(objectives="error,latency_ms"), make_device(host=HOST))
    with pytest.raises(UsageError, match="its profile has none for the host"):
        check_known(config(objectives="error,energy_mj"), make_device(host=HOST))


def test_what_a_device_executes() -> None:
    assert executed_types(make_profile()) == ("fp32", "int8")
    assert executed_types(make_profile().model_copy(update={"precisions": ("fp32",)})) == ("fp32",)
    integers = {"precisions": ("int8",), "peak_gmacs": {"int8": 4.0}, "channel_step": {}, "energy": None}
    assert executed_types(make_device(**integers)) == ("int8",)
    assert executed_types(make_device(**integers, host=HOST)) == ("fp32", "int8")
