"""The number formats delivered for a set of widths, and recoveries kept for a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autocompress.plan import CompressionPlan, LayerPlan, Recipe
from autocompress.search.menu import Knob, format_of, formats_of
from autocompress.search.recover import Climbed, Recovered, load_recovered, save_recovered
from autocompress.search.variants import fastest_compute, variants
from autocompress.spaces import SearchSpace
from tests.fixtures.search import make_graph, make_menu, make_skeleton

GRAPH = make_graph()
NAMES = [layer.name for layer in GRAPH.compressible]
EVERY = {name: formats_of(SearchSpace()) for name in NAMES}
WIDTHS = {"stem": 8, "block.conv1": 12, "wide": 24}


def latency(plan: CompressionPlan) -> float:
    return float(make_skeleton().price([plan]).latency_ms[0])


def test_no_single_flip_of_a_compute_type_is_faster() -> None:
    skeleton = make_skeleton()
    plan = CompressionPlan(groups=WIDTHS, layers=dict.fromkeys(NAMES, format_of("int8", 8)))
    best = fastest_compute(GRAPH, skeleton, plan, EVERY)
    assert best.groups == WIDTHS
    for start in ("int8", "fp32"):
        uniform = plan.model_copy(update={"layers": dict.fromkeys(NAMES, format_of(start, 8))})
        assert latency(best) <= latency(uniform) * 1.0001
    for name, form in best.layers.items():
        other = format_of("fp32" if form.compute == "int8" else "int8", form.storage.bits)
        flipped = best.model_copy(update={"layers": {**best.layers, name: other}})
        assert latency(flipped) >= latency(best) * 0.998


def test_variants_try_both_weight_sizes_and_keep_the_plans_own_formats() -> None:
    own = CompressionPlan(groups=WIDTHS, layers=dict.fromkeys(NAMES, format_of("fp32", 4)))
    found = variants(GRAPH, make_skeleton(), own, EVERY)
    assert len(found) >= 2
    assert len({plan.structure_digest for plan in found}) == len(found)
    assert all(plan.groups == WIDTHS and plan.layers.keys() == set(NAMES) for plan in found)
    bits = [{form.storage.bits for form in plan.layers.values()} for plan in found]
    assert {4} in bits
    # The activations follow from the layers, they are never left to chance.
    for plan in found:
        assert bool(plan.activations) == any(form.compute == "int8" for form in plan.layers.values())


def test_variants_keep_to_what_each_layer_allows() -> None:
    allowed = {**EVERY, "fc": [LayerPlan()], "stem": [format_of("fp32", 8)]}
    plan = CompressionPlan(groups=WIDTHS)
    for found in variants(GRAPH, make_skeleton(), plan, allowed):
        assert found.layers["fc"] == LayerPlan()
        assert found.layers["stem"] == format_of("fp32", 8)


def test_frozen_layers_leave_one_format_to_choose() -> None:
    frozen = next(knob for knob in make_menu(["fc"]).knobs if knob.name == "fc")
    assert isinstance(frozen, Knob)
    assert [option.format for option in frozen.options] == [LayerPlan()]


# -------------------------------------------------------------------------------------------------- kept recoveries


def recovery(fell: bool = True) -> tuple[Recovered, Climbed]:
    torch.manual_seed(0)
    weights, plateau = (
        {name: torch.rand(GRAPH.tensors[name].shape) for name in GRAPH.weight_names()} for _ in range(2)
    )
    recovered = Recovered(GRAPH, weights, 150, 2.5, 0.03, Recipe(alpha=0.5), plateau if fell else None)
    return recovered, Climbed(CompressionPlan(groups=WIDTHS), 0.12, rung=1)


@pytest.mark.parametrize("fell", [True, False])
def test_a_recovery_is_taken_up_as_it_was_kept(tmp_path: Path, fell: bool) -> None:
    recovered, climbed = recovery(fell)
    path = tmp_path / "recovered" / "abc-1.safetensors"
    save_recovered(recovered, climbed, path)
    stored = load_recovered(path)
    assert stored is not None
    assert stored[1] == climbed
    assert (stored[0].graph, stored[0].recipe, stored[0].steps) == (GRAPH, Recipe(alpha=0.5), 150)
    assert stored[0].weights.keys() == recovered.weights.keys()
    assert all(torch.equal(stored[0].weights[name], value) for name, value in recovered.weights.items())
    if recovered.plateau is None:
        assert stored[0].plateau is None
    else:
        assert stored[0].plateau is not None
        assert all(torch.equal(stored[0].plateau[name], value) for name, value in recovered.plateau.items())
    assert [file.name for file in path.parent.iterdir()] == ["abc-1.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_a_recovery_that_cannot_be_read_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "abc-1.safetensors"
    save_recovered(*recovery(), path)
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    assert load_recovered(path) is None
