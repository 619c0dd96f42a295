"""Plans judged from where they begin to differ: the same divergences as judged whole, with fewer layers run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autocompress.graph.executor import GraphModule, build_module
from autocompress.graph.groups import find_groups
from autocompress.methods.channel_correction import StatisticsCorrection
from autocompress.methods.database import LayerDatabase
from autocompress.methods.statistics import collect
from autocompress.plan import CompressionPlan, Layer, Metric
from autocompress.progress import SilentProgress
from autocompress.search.evaluate import WORST, StitchedEvaluator
from autocompress.search.menu import Menu
from autocompress.search.prefix import PrefixJudge, first_difference, side_by_side
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import correctness
from autocompress.tasks.splits import TensorSplit
from tests.graphs import resnet


@pytest.fixture(scope="module")
def evaluator() -> StitchedEvaluator:
    graph, weights = resnet((8, 12, 16), blocks=1, size=8)
    groups, _ = find_groups(graph, weights, (torch.zeros(2, 1, 8, 8),))
    graph = graph.model_copy(update={"groups": groups})
    images = torch.randn(160, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = TensorSplit(images, torch.zeros(len(images), dtype=torch.long))
    dense = build_module(graph, weights)
    database = LayerDatabase(graph, weights, collect(dense, [(images[:64],)], seed=0))
    task = SimpleNamespace(metric=Metric(), split=lambda name: split, score=correctness)
    return StitchedEvaluator(database, dense, task, seed=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def menu(evaluator: StitchedEvaluator) -> Menu:
    return Menu(evaluator.database.graph, SearchSpace(keep=(0.25, 0.5, 1.0)))


def near(menu: Menu, base: Sequence[int], count: int) -> list[CompressionPlan]:
    """Plans that differ from the base in one to three knobs."""
    rng = np.random.default_rng(0)
    plans = []
    for _ in range(count):
        choices = list(base)
        for knob in rng.choice(len(menu.knobs), size=rng.integers(1, 4), replace=False):
            choices[knob] = int(rng.integers(len(menu.knobs[knob].options)))
        plans.append(menu.plan(choices))
    return plans


@pytest.mark.parametrize("form", [("fp32", 32), ("int8", 8)])
def test_divergences_are_those_of_plans_judged_whole(
    evaluator: StitchedEvaluator, menu: Menu, form: tuple[str, int]
) -> None:
    base = menu.uniform(1.0, *form)  # type: ignore[arg-type]
    plans = [menu.plan(base), *near(menu, base, 40)]
    found = dict(PrefixJudge(evaluator, menu.plan(base)).judge(plans))
    assert sorted(found) == list(range(len(plans)))
    starts = {first_difference(menu.graph, *(evaluator.database.stitch(p) for p in (plans[0], q))) for q in plans}
    assert len(starts) > 4
    for index, plan in enumerate(plans):
        assert found[index] == pytest.approx(evaluator.quick(plan), rel=1e-5, abs=1e-9)


def position(menu: Menu, layer: str) -> int:
    return [found.name for found in menu.graph.layers].index(layer)


def test_where_a_plan_begins_to_differ(evaluator: StitchedEvaluator, menu: Menu) -> None:
    places = {layer: index for index, knob in enumerate(menu.knobs) for layer in knob.layers}
    base = menu.uniform(1.0, "fp32", 32)

    def start(layer: str, share: float, *form: object) -> int:
        choices = list(base)
        choices[places[layer]] = menu.uniform(share, *form)[places[layer]]  # type: ignore[arg-type]
        return first_difference(menu.graph, *(evaluator.database.stitch(menu.plan(c)) for c in (base, choices)))

    assert start("fc", 1.0, "fp32", 32) == len(menu.graph.layers)
    assert start("fc", 1.0, "fp32", 4) == position(menu, "fc")
    # What an int8 layer reads is rounded for every reader: here the layer itself is the first.
    assert start("layer3.0.conv1", 1.0, "int8", 8) == position(menu, "layer3.0.conv1")
    # Its last member reads the channels late, but its first layer makes them.
    assert start("layer3.0.conv1", 0.5, "fp32", 32) == position(menu, "layer3.0.conv1")
    assert start("conv1", 0.5, "fp32", 32) == 0


def test_a_tensor_that_the_base_rounds_is_made_again(evaluator: StitchedEvaluator, menu: Menu) -> None:
    places = {layer: index for index, knob in enumerate(menu.knobs) for layer in knob.layers}
    base = list(menu.uniform(1.0, "fp32", 32))
    int8 = menu.uniform(1.0, "int8", 8)
    base[places["layer3.0.conv1"]] = int8[places["layer3.0.conv1"]]
    floats = menu.uniform(1.0, "fp32", 32)
    found = first_difference(menu.graph, *(evaluator.database.stitch(menu.plan(c)) for c in (base, floats)))
    read = menu.graph.by_name["layer3.0.conv1"].activations[0]
    assert read in menu.graph.layers[found].outputs
    assert found < position(menu, "layer3.0.conv1")


def test_layers_before_the_first_difference_run_once(
    evaluator: StitchedEvaluator, menu: Menu, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Counter[str] = Counter()
    run = GraphModule._run

    def counted(self: GraphModule, layer: Layer, values: dict[str, torch.Tensor]) -> None:
        runs[layer.name] += 1
        run(self, layer, values)

    monkeypatch.setattr(GraphModule, "_run", counted)
    base = menu.uniform(1.0, "fp32", 32)
    place = next(index for index, knob in enumerate(menu.knobs) if "fc" in knob.layers)
    choices = [(*base[:place], option, *base[place + 1 :]) for option in range(1, len(menu.knobs[place].options))]
    dict(PrefixJudge(evaluator, menu.plan(base)).judge([menu.plan(c) for c in choices]))
    # The base is corrected, run on the samples, and corrected whole for that; each plan has two passes of its own.
    assert runs["conv1"] == runs["layer3.0.conv2"] == 3
    assert runs["fc"] == 1 + 2 * len(choices)


def test_a_swap_that_cannot_be_built_is_the_worst_and_the_others_are_judged(
    evaluator: StitchedEvaluator, menu: Menu, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = menu.plan(menu.uniform(1.0, "fp32", 32))
    plans = near(menu, menu.uniform(1.0, "fp32", 32), 4)
    wanted = dict(PrefixJudge(evaluator, base).judge(plans))
    own = StitchedEvaluator.correction

    def failing(self: StitchedEvaluator, plan: CompressionPlan) -> StatisticsCorrection:
        if plan is plans[1]:
            raise ArithmeticError("no such candidate")
        return own(self, plan)

    monkeypatch.setattr(StitchedEvaluator, "correction", failing)
    assert dict(PrefixJudge(evaluator, base).judge(plans)) == {**wanted, 1: WORST}


def test_halves_judged_side_by_side_are_judged_alike(evaluator: StitchedEvaluator, menu: Menu) -> None:
    base = menu.uniform(1.0, "fp32", 32)
    plans = near(menu, base, 7)
    judge = PrefixJudge(evaluator, menu.plan(base)).judge
    both = dict(side_by_side(judge, SilentProgress())(plans))
    alone = dict(judge(plans))
    assert both == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert sorted(both) == list(range(7))
    assert list(side_by_side(judge, SilentProgress())([])) == []
