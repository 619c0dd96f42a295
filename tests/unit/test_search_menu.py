"""The menu: channel counts, plans and back, what is frozen, ruled out or left out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.hardware.grid import NARROWEST
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Student
from autocompress.search.menu import Menu, format_of, formats_of, keep_counts
from autocompress.spaces import SearchSpace
from tests.fixtures.search import make_graph, make_menu
from tests.graphs import GraphMaker

MENU = make_menu()
choices_of_the_menu = st.tuples(*(st.integers(0, len(knob.options) - 1) for knob in MENU.knobs))


@given(st.integers(1, 2048), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8))
def test_keep_counts_lie_on_the_grid(size: int, shares: list[float]) -> None:
    counts = keep_counts(size, shares)
    assert counts == tuple(sorted(set(counts), reverse=True))
    assert 1 <= counts[-1] <= counts[0] <= size
    step = 8 if size > 32 else 4
    assert all(count in (size, *NARROWEST) or count % step == 0 for count in counts)
    assert counts[0] >= math.floor(size * max(shares))


def test_a_group_of_one_channel_stays_whole() -> None:
    assert keep_counts(1, [1.0, 0.5, 0.1]) == (1,)
    assert keep_counts(3, [1.0, 0.9]) == (3,)


def test_knobs_are_groups_with_their_producers_and_the_layers_left() -> None:
    found = {knob.name: (knob.group, knob.layers) for knob in MENU.knobs}
    assert found == {
        "fc": (None, ("fc",)),
        "stem": ("stem", ("stem", "block.conv2")),
        "block.conv1": ("block.conv1", ("block.conv1",)),
        "wide": ("wide", ("wide",)),
    }


def test_labels_of_a_knob_are_distinct() -> None:
    for knob in MENU.knobs:
        labels = [option.label for option in knob.options]
        assert len(set(labels)) == len(labels)
    assert "8ch-int8-w4" in [option.label for option in MENU.knobs[1].options]


@given(choices_of_the_menu)
def test_a_plan_and_back(choices: tuple[int, ...]) -> None:
    plan = MENU.plan(choices)
    assert MENU.choices(plan) == choices
    assert plan.groups.keys() == {"stem", "block.conv1", "wide"}
    assert plan.layers.keys() == {layer.name for layer in make_graph().compressible}
    assert plan.layers["stem"] == plan.layers["block.conv2"]
    # What an int8 layer reads is held in 8 bits, the model's output never.
    assert "flat" in plan.activations or plan.layers["fc"].compute == "fp32"
    assert "logits" not in plan.activations


def test_a_plan_off_the_menu_takes_the_nearest_option() -> None:
    plan = CompressionPlan(groups={"stem": 9, "wide": 47}, layers={"stem": format_of("int8", 8)})
    near = MENU.plan(MENU.choices(plan))
    assert near.groups == {"stem": 8, "block.conv1": 24, "wide": 48}
    assert near.layers["stem"] == format_of("int8", 8)
    assert near.layers["wide"] == LayerPlan()


def test_uniform_plans() -> None:
    dense = MENU.plan(MENU.uniform(1.0, "fp32", 32))
    assert dense.groups == {"stem": 16, "block.conv1": 24, "wide": 48}
    assert set(dense.layers.values()) == {LayerPlan()}
    assert dense.activations == {}
    half = MENU.plan(MENU.uniform(0.5, "int8", 4))
    assert half.groups == {"stem": 8, "block.conv1": 12, "wide": 24}
    assert set(half.layers.values()) == {format_of("int8", 4)}


def test_a_students_plan_keeps_its_base() -> None:
    base = Student(width=0.5)
    assert MENU.plan(MENU.uniform(1.0, "fp32", 32), base).base == base


def test_formats_leave_out_float_weights_in_integer_kernels() -> None:
    formats = formats_of(SearchSpace())
    assert format_of("int8", 8) in formats
    assert format_of("int8", 32) not in formats
    assert len(formats) == 5


# ------------------------------------------------------------------------------------------------- freezing, rules


def widths(menu: Menu, knob: str) -> set[int | None]:
    return {option.keep for k in menu.knobs if k.name == knob for option in k.options}


def formats(menu: Menu, knob: str) -> set[LayerPlan]:
    return {option.format for k in menu.knobs if k.name == knob for option in k.options}


def test_a_frozen_layer_keeps_its_channels_and_floats() -> None:
    menu = make_menu(["block.*"])
    assert menu.dropped == {"block.conv1": "frozen", "block.conv2": "frozen"}
    assert [(k.name, len(k.options)) for k in menu.knobs if k.name in ("stem", "block.conv1")] == [
        ("stem", 1),
        ("block.conv1", 1),
    ]
    assert formats(menu, "stem") == {LayerPlan()}
    assert len(widths(menu, "wide")) > 1


def test_what_a_frozen_layer_reads_keeps_its_channels_but_not_its_format() -> None:
    menu = make_menu(["fc"])
    assert widths(menu, "wide") == {48}
    assert len(formats(menu, "wide")) == 5
    assert formats(menu, "fc") == {LayerPlan()}


def test_the_spaces_own_freezing_counts_as_well() -> None:
    menu = make_menu(["fc"], freeze=["re:wid."])
    assert menu.dropped == {"fc": "frozen", "wide": "frozen"}


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("block.conv3", "block.conv"), ("stam", "stem"), ("wide.*.conv", "wide")]
)
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"--freeze: pattern .* matches no layer; nearest: '{nearest}"):
        make_menu([pattern])


def test_rules_narrow_some_layers() -> None:
    menu = make_menu(rules=[{"layers": "wide", "keep": [0.5]}, {"layers": "fc", "compute": ["fp32"]}])
    assert widths(menu, "wide") == {48, 24}
    assert {form.compute for form in formats(menu, "fc")} == {"fp32"}
    assert len(formats(menu, "wide")) == 5


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"rules\[0\].layers: pattern 'fd' matches no layer; nearest: 'fc'"):
        make_menu(rules=[{"layers": "fd", "keep": [0.5]}])


def test_a_convolution_at_the_end_computes_in_floats() -> None:
    maker = GraphMaker()
    maker.conv(maker.relu(maker.conv(maker.input("image", (1, 8, 8)), 8, "first")), 4, "last")
    menu = Menu(maker.build(("image",), ("last_out",)), SearchSpace())
    assert {form.compute for form in formats(menu, "last")} == {"fp32"}
    assert "int8 left out" in menu.dropped["last"]
    assert "first" not in menu.dropped


def test_a_model_without_weights_is_an_error() -> None:
    maker = GraphMaker()
    maker.relu(maker.input("image", (1, 8, 8)))
    with pytest.raises(UsageError, match="nothing to compress"):
        Menu(maker.build(("image",), ("image_relu",)), SearchSpace())


# ---------------------------------------------------------------------------------------------------- description


def test_the_description_and_its_digest_tell_menus_apart() -> None:
    graph: ModelGraph = make_graph()
    text = MENU.describe()
    assert text["layers"] == [layer.name for layer in graph.compressible]
    assert text["groups"] == {"stem": 16, "block.conv1": 24, "wide": 48}
    assert make_menu().digest == MENU.digest
    assert make_menu(["fc"]).digest != MENU.digest
    assert make_menu(keep=[1.0, 0.5]).digest != MENU.digest
