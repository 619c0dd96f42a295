"""Which options leave the menu on a device, which stay, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from autocompress.hardware.kernels import KINDS
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import FittedProfile, HardwareProfile, KernelCost
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import LayerPlan
from autocompress.progress import SilentProgress
from autocompress.search.menu import Menu, Option, format_of
from autocompress.search.pruning import at_least_as_good, prune
from autocompress.search.seeds import measure_sensitivity
from autocompress.search.wording import EVERYWHERE
from tests.fixtures.search import make_device, make_graph, make_menu, make_profile

BOTH = ("latency_ms", "size_bytes")
FLOAT_ONLY = {"compute": ["fp32"], "weight_bits": [32]}
INT8_24 = Option(24, format_of("int8", 8)).label
FORMATS_ONLY = {"keep": [1.0], "compute": ["fp32", "int8"], "weight_bits": [32, 8]}


def made(int8: float = 2.0, boundary: float = 20.0, band: float = 0.15) -> FittedProfile:
    """The profile of ``make_profile`` with other costs: of a million int8 products, of a MB across a boundary (us)."""
    base = make_profile()
    kernels = dict(base.kernels)
    for kind, family in KINDS.items():
        if family == "int8":
            kernels[kind] = KernelCost(fixed_us=1.0, per_mmac_us=int8)
        if family == "boundary":
            kernels[kind] = KernelCost(fixed_us=0.0, per_read_mb_us=boundary)
    return base.model_copy(update={"kernels": kernels, "error_band": band, "holdout": None})


def lower(profile: HardwareProfile) -> Skeleton:
    return cost_model(profile).lower(make_graph())


def pruned(menu: Menu, profile: HardwareProfile, costs: Sequence[str] = ("latency_ms",)) -> Menu:
    return prune(menu, lower(profile), costs)


def options(menu: Menu, knob: str) -> list[str]:
    return next([option.label for option in k.options] for k in menu.knobs if k.name == knob)


# ------------------------------------------------------------------------------------------------------ what leaves


def test_fewer_stored_bits_leave_where_only_latency_counts_and_stay_where_size_does() -> None:
    menu = make_menu()
    fast = pruned(menu, make_profile())
    assert {option.format for knob in fast.knobs for option in knob.options} <= {LayerPlan(), format_of("int8", 8)}
    assert "int8 with 4-bit weights: no faster than int8 on made-up" in fast.dropped[EVERYWHERE]
    small = pruned(menu, make_profile(), BOTH)
    assert set(small.formats) == set(menu.formats)


def test_widths_that_are_padded_to_the_same_kernels_leave() -> None:
    menu = make_menu(keep=[1.0, 0.875, 0.75, 0.5], **FLOAT_ONLY)
    assert options(menu, "block.conv1") == ["24ch-fp32-w32", "20ch-fp32-w32", "12ch-fp32-w32"]
    fast = pruned(menu, make_profile())
    # The runtime packs 16 channels together: 20 run as 32, like 24.
    assert options(fast, "block.conv1") == ["24ch-fp32-w32", "12ch-fp32-w32"]
    assert fast.dropped["block.conv1"].startswith("keep 20: no faster than 24 on made-up (")
    assert fast.dropped["block.conv1"].endswith(" ms both)")
    assert options(pruned(menu, make_profile(), BOTH), "block.conv1") == options(menu, "block.conv1")


def test_a_type_that_is_slower_next_to_anything_leaves() -> None:
    menu = make_menu(**FORMATS_ONLY)
    slow = pruned(menu, made(int8=40.0, boundary=0.0))
    assert options(slow, "block.conv1") == ["24ch-fp32-w32"]
    assert "int8: no faster than fp32" in slow.dropped[EVERYWHERE]


def test_a_type_that_is_slower_only_next_to_another_type_stays() -> None:
    """As fast as fp32 but for the boundaries: alone it pays for two of them, among its like it saves them."""
    menu = make_menu(**FORMATS_ONLY)
    profile = made(int8=8.0, boundary=500.0)
    skeleton = lower(profile)
    place = [knob.name for knob in menu.knobs].index("block.conv1")
    for compute, bits, better in (("fp32", 32, "fp32"), ("int8", 8, "int8")):
        base = list(menu.uniform(1.0, compute, bits))  # type: ignore[arg-type]
        labels = [option.format.compute for option in menu.knobs[place].options]
        plans = [menu.plan([*base[:place], i, *base[place + 1 :]]) for i in range(len(labels))]
        assert labels[int(np.argmin(skeleton.price(plans).latency_ms))] == better
    assert INT8_24 in options(prune(menu, skeleton, ["latency_ms"]), "block.conv1")


@pytest.mark.parametrize(("int8", "stays"), [(8.2, True), (8.6, True), (16.0, False)])
def test_near_ties_stay(int8: float, stays: bool) -> None:
    """A little slower by the model, and the model may be wrong by 15% of what the layer decides."""
    kept = pruned(make_menu(keep=[0.25, 1.0], weight_bits=[32, 8]), made(int8=int8, boundary=0.0), BOTH)
    assert (INT8_24 in options(kept, "block.conv1")) == stays


def test_no_option_that_leaves_ever_pays() -> None:
    """Against neighbours that the rule never looked at, some option that stays is at least as good and as cheap."""
    rng = np.random.default_rng(1)
    for profile in (make_profile(), made(int8=16.0, boundary=100.0), made(int8=40.0, boundary=0.0), make_device()):
        for costs in (("latency_ms",), BOTH, ("latency_ms", "peak_memory_bytes")):
            menu, skeleton = make_menu(), lower(profile)
            small = prune(menu, skeleton, costs)
            assert len(small.formats) >= 1
            for place, knob in enumerate(menu.knobs):
                staying = small.knobs[place].options
                lost = [option for option in knob.options if option not in staying]
                for _ in range(15):
                    others = [k.options[int(rng.integers(len(k.options)))] for k in menu.knobs]
                    every = [*staying, *lost]
                    plans = [menu.plan_of([*others[:place], option, *others[place + 1 :]]) for option in every]
                    table = skeleton.price(plans)
                    rows = np.stack([np.asarray(getattr(table, name), dtype=float) for name in costs], axis=1)
                    for i, option in enumerate(lost, start=len(staying)):
                        good = [j for j, other in enumerate(staying) if at_least_as_good(other, option)]
                        assert (rows[good] <= rows[i] * (1 + 1e-9)).all(axis=1).any(), (knob.name, option.label, costs)


# ------------------------------------------------------------------------------------------------------- what stays


def test_the_original_always_stays() -> None:
    for profile in (make_profile(), made(int8=0.1, boundary=0.0)):
        for knob in pruned(make_menu(), profile).knobs:
            assert knob.options[0].format == LayerPlan()
            assert knob.group is None or knob.options[0].keep == {"stem": 16, "block.conv1": 24, "wide": 48}[knob.group]


def test_what_a_rule_names_for_a_layer_stays() -> None:
    rule = {"layers": "block.conv1", "keep": [1.0, 0.8], "weight_bits": [32, 4]}
    menu = make_menu(keep=[1.0, 0.8], **{**FLOAT_ONLY, "weight_bits": [32, 8]}, rules=[rule])
    kept = pruned(menu, make_profile())
    assert options(kept, "block.conv1") == ["24ch-fp32-w32", "24ch-fp32-w4", "20ch-fp32-w32", "20ch-fp32-w4"]
    assert options(kept, "wide") == ["48ch-fp32-w32"]


def test_what_cannot_be_priced_stays() -> None:
    """Without int8 convolutions in the profile their time is a guess, and nothing is left out on a guess."""
    profile = made(int8=40.0, boundary=0.0)
    blind = profile.model_copy(update={"kernels": {k: v for k, v in profile.kernels.items() if "conv_int8" not in k}})
    kept = pruned(make_menu(**FORMATS_ONLY), blind)
    assert INT8_24 in options(kept, "block.conv1")
    assert "int8: no faster than fp32" in kept.dropped["fc"]


def test_types_that_the_device_does_not_execute_leave_whatever_counts() -> None:
    small = prune(make_menu(), lower(make_profile()), BOTH, executed=("fp32",))
    assert {option.format.compute for knob in small.knobs for option in knob.options} == {"fp32"}
    assert small.dropped["wide"].startswith("int8: not executed on made-up, which computes in fp32")


# ----------------------------------------------------------------------------------------------------- after pruning


def test_better_by_construction() -> None:
    dense, narrow = Option(24, LayerPlan()), Option(20, LayerPlan())
    int8, int4 = Option(24, format_of("int8", 8)), Option(24, format_of("int8", 4))
    stored = Option(24, format_of("fp32", 4))
    assert at_least_as_good(dense, narrow)
    assert not at_least_as_good(narrow, dense)
    assert at_least_as_good(int8, int4)
    assert not at_least_as_good(int4, int8)
    assert at_least_as_good(stored, int4)
    assert not at_least_as_good(stored, int8)
    assert not at_least_as_good(narrow, int8)


def test_a_pruned_menu_is_searched_like_any_other() -> None:
    """Sensitivities are of a width and of a format each on its own, though the menu may no longer offer them so."""
    menu = make_menu()
    knob = menu.knobs[1]
    rest = [option for option in knob.options if option.keep == 24 or option.format.compute == "int8"]
    small = menu.reduced({knob.name: rest[1:]}, {knob.name: "for a test"})
    assert small.digest != menu.digest
    table = measure_sensitivity(
        small, lambda plans: ((i, float(p.groups["block.conv1"])) for i, p in enumerate(plans)), SilentProgress()
    )
    assert [len(row) for row in table.divergence] == [len(k.options) for k in small.knobs]
    assert np.isfinite(np.concatenate(table.divergence)).all()
    assert small.plan(small.uniform(0.5, "fp32", 32)).groups["block.conv1"] == 12
    assert small.describe()["dropped"][knob.name] == "for a test"
