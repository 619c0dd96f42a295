"""How well, and how fast, divergences are estimated: ``python -m benchmarks.estimate``, about two minutes.

Random stitches of a trained network, half of them to learn from and the others held out.  Interactions of neighbouring
knobs (CLADO, 2307.05657), which the search leaves out, are measured here by joint swaps, so that the choice can be
checked on another network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import kendalltau, spearmanr

from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.methods.database import LayerDatabase
from autocompress.methods.statistics import collect
from autocompress.plan import CompressionPlan
from autocompress.progress import SilentProgress
from autocompress.search.estimate import FLOOR, POWER, DivergenceEstimate
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.menu import Menu, Option
from autocompress.search.prefix import PrefixJudge
from autocompress.search.seeds import Sensitivity, base_options, measure_sensitivity
from autocompress.spaces import load_space
from autocompress.tasks import load_task

Array = npt.NDArray[np.float64]
Edge = tuple[int, int]

LEARNED, HELD_OUT = (10, 40), 80


class PairedEstimate(DivergenceEstimate):
    """Adds to the sum of swaps, for each edge, a coefficient times the root of the product of its two swaps."""

    def __init__(self, sensitivity: Sensitivity, coefficients: Mapping[Edge, float]) -> None:
        super().__init__(sensitivity)
        self._coefficients = coefficients

    def _level(self, chosen: npt.NDArray[np.int64]) -> Array:
        single = self._power[self._knobs, chosen] ** (1 / POWER)
        joint = sum(g * np.sqrt(single[:, a] * single[:, b]) for (a, b), g in self._coefficients.items())
        return np.asarray(np.maximum(single.sum(axis=1) + joint, 0.3 * single.sum(axis=1)))


def edges_of(menu: Menu) -> list[Edge]:
    """Pairs of knobs of which one's layer reads, past layers without weights, what the other's makes."""
    owner = {layer: place for place, knob in enumerate(menu.knobs) for layer in knob.layers}
    made: dict[str, set[int]] = {}
    found: set[Edge] = set()
    for layer in menu.graph.layers:
        sources = set().union(*(made.get(name, set()) for name in layer.activations))
        own = owner.get(layer.name)
        if own is not None:
            found |= {(min(own, source), max(own, source)) for source in sources if source != own}
            sources = {own}
        made |= dict.fromkeys(layer.outputs, sources)
    return sorted(found)


def coefficients(menu: Menu, judge: PrefixJudge, sensitivity: Sensitivity) -> tuple[dict[Edge, float], int]:
    """The mean interaction of each edge over four joint swaps: half the channels, or int8 with the fewest bits."""
    base = base_options(menu)
    swaps: list[tuple[Edge, Edge]] = []
    for edge in edges_of(menu):
        narrow, coarse = (
            [_representative(menu.knobs[knob].options, base[knob], kind) for knob in edge] for kind in (0, 1)
        )
        swaps += [(edge, (a, b)) for a in (narrow[0], coarse[0]) for b in (narrow[1], coarse[1]) if a >= 0 and b >= 0]
    plans: list[CompressionPlan] = []
    for edge, chosen in swaps:
        options = list(base)
        for knob, option in zip(edge, chosen, strict=True):
            options[knob] = menu.knobs[knob].options[option]
        plans.append(menu.plan_of(options))
    found: dict[Edge, list[float]] = {}
    for place, joint in judge.judge(plans):
        (a, b), (i, j) = swaps[place]
        first, second = sensitivity.divergence[a][i], sensitivity.divergence[b][j]
        if min(first, second) > 0:
            found.setdefault((a, b), []).append((joint - first - second) / np.sqrt(first * second))
    return {edge: float(np.clip(np.mean(values), -0.8, 1.5)) for edge, values in found.items()}, len(plans)


def _representative(options: Sequence[Option], whole: Option, kind: int) -> int:
    """The option with about half the channels, or that with the coarsest integer format; -1 where there is none."""
    if kind == 0:
        alike = [i for i, o in enumerate(options) if o.format == whole.format and o != whole]
        return min(alike, key=lambda i: abs(2 * (options[i].keep or 0) - (whole.keep or 0)), default=-1)
    alike = [i for i, o in enumerate(options) if o.keep == whole.keep and o.format.compute == "int8"]
    return min(alike, key=lambda i: options[i].format.storage.bits, default=-1)


def draw(menu: Menu, count: int, seed: int) -> list[tuple[int, ...]]:
    """Random choices from mild to drastic: widths about a common share, formats at random."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        share, spread = 1.0 - 0.95 * rng.random(), rng.choice([0.05, 0.2, 0.5])
        choices = []
        for knob in menu.knobs:
            widths = sorted({option.keep or 0 for option in knob.options})
            place = int(np.clip(share + rng.normal(0.0, spread), 0.0, 1.0) * (len(widths) - 1) + 0.5)
            alike = [i for i, option in enumerate(knob.options) if (option.keep or 0) == widths[place]]
            choices.append(int(rng.choice(alike)))
        drawn.append(tuple(choices))
    return drawn


def scores(estimated: Array, true: Array) -> dict[str, str]:
    """Agreement in rank, and the typical factor between the two where both can be told from 0."""
    told = (true > FLOOR) & (estimated > FLOOR)
    logs = np.abs(np.log(estimated[told] / true[told]))
    return {
        "spearman": f"{spearmanr(estimated, true)[0]:.4f}",
        "kendall": f"{kendalltau(estimated, true)[0]:.4f}",
        "mean |log ratio|": f"{logs.mean():.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="digits")
    parser.add_argument("--model", default="resnet8")
    arguments = parser.parse_args()
    task = load_task(arguments.task, arguments.model)
    graph, weights = read_model(task.model, task.example_inputs)
    calibration, dense = task.split("calibration"), build_module(graph, weights)
    batches = [(calibration.batch(slice(i, i + 128)).inputs[0],) for i in range(0, len(calibration), 128)]
    evaluator = StitchedEvaluator(LayerDatabase(graph, weights, collect(dense, batches, 0)), dense, task, seed=0)
    menu = Menu(graph, load_space("default"))
    judge = PrefixJudge(evaluator, menu.plan_of(base_options(menu)))

    def whole(plans: Sequence[CompressionPlan]) -> enumerate[float]:
        return enumerate([evaluator.quick(plan) for plan in plans])

    measure_sensitivity(menu, judge.judge, SilentProgress())  # fills the database, which both ways share
    seconds = []
    for way in (whole, judge.judge):
        started = time.monotonic()
        sensitivity = measure_sensitivity(menu, way, SilentProgress())
        seconds.append(time.monotonic() - started)
    started = time.monotonic()
    found, joint = coefficients(menu, judge, sensitivity)
    print(f"{arguments.task}/{arguments.model}: {len(menu.knobs)} knobs, {len(found)} edges")
    print(f"single swaps: {seconds[0]:.2f} s whole, {seconds[1]:.2f} s from the first difference")
    print(f"{joint} joint swaps: {time.monotonic() - started:.2f} s")

    choices = np.array(draw(menu, max(LEARNED) + HELD_OUT, seed=1))
    true = np.array([evaluator(menu.plan(row)).divergence for row in choices])
    tested, truth = choices[max(LEARNED) :], true[max(LEARNED) :]
    summed = np.array([sensitivity.estimate(row) for row in tested])
    rows = [{"estimate": "sum of swaps", "plans learned from": "0", **scores(summed, truth)}]
    for name, estimate in (
        ("power mean", DivergenceEstimate(sensitivity)),
        ("sum with pairs", PairedEstimate(sensitivity, found)),
    ):
        for count in (0, *LEARNED):
            estimate.learn(choices[:count], true[:count].tolist())
            rows.append({"estimate": name, "plans learned from": str(count), **scores(estimate(tested), truth)})
    print(pd.DataFrame(rows).to_string(index=False))
    many = np.array(draw(menu, 4000, seed=2))
    estimate = DivergenceEstimate(sensitivity)
    for count in (0, max(LEARNED)):
        estimate.learn(choices[:count], true[:count].tolist())
        started = time.monotonic()
        estimate(many)
        print(f"{len(many) / (time.monotonic() - started):,.0f} plans/s after learning from {count}")


if __name__ == "__main__":
    main()
