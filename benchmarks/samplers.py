"""Which sampler finds the best stitched front in as many evaluations, and what repair does under a tight budget.

``python -m benchmarks.samplers`` searches digits/resnet8 with every sampler and several seeds, priced by a shipped
profile so that no timing enters, and writes ``results/samplers``.  What is already in ``runs.csv`` there is not run
again; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version

import pandas as pd
import torch
from optuna.storages import InMemoryStorage

from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import cpu_description, load_hardware
from autocompress.hardware.skeleton import Skeleton
from autocompress.methods.database import LayerDatabase
from autocompress.methods.statistics import collect
from autocompress.pareto import hypervolume
from autocompress.plan import CompressionPlan
from autocompress.progress import SilentProgress
from autocompress.search.context import prices
from autocompress.search.evaluate import Stitched, StitchedEvaluator
from autocompress.search.menu import Menu
from autocompress.search.prefix import PrefixJudge
from autocompress.search.pricing import ChoicePricer, NamedPrices
from autocompress.search.pruning import prune
from autocompress.search.repair import Repair
from autocompress.search.samplers import SAMPLERS
from autocompress.search.seeds import FORMATS, Sensitivity, base_options, dp_surface, measure_sensitivity, uniform_seeds
from autocompress.search.study import PlanStudy, Scored
from autocompress.search.target import executed_types
from autocompress.spaces import load_space
from autocompress.tasks import load_task
from benchmarks.fronts import RESULTS, markdown

FOLDER = RESULTS / "samplers"
HARDWARE = "raspberry-pi-5"
COSTS = ("latency_ms", "size_bytes")
SEEDS = range(8)
SLOW = ("gp",)
"""Samplers that take minutes a search: the first seed only."""

EVALUATIONS, TRIALS = 150, 200
WORST = 1.0
"""Divergence in nats that is worth nothing."""


@dataclass(frozen=True)
class Case:
    """One search: a sampler, a seed, and under a budget with or without repair."""

    budget: str
    sampler: str
    repair: bool
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a search came to; ``hypervolume`` is of the unit box, ``sampler_s`` all time but that of evaluations."""

    trials: int
    evaluated: int
    repeated: int
    over_budget: int
    hypervolume: float
    sampler_s: float


class Judge:
    """Judges plans on the quick samples; what another search has judged is looked up and counts all the same."""

    def __init__(self, evaluator: StitchedEvaluator, known: dict[str, float]) -> None:
        self.evaluator, self.known = evaluator, known
        self.count, self.seconds = 0, 0.0

    def __call__(self, plan: CompressionPlan) -> Stitched:
        started = time.monotonic()
        key = plan.structure_digest
        if key not in self.known:
            self.known[key] = self.evaluator.quick(plan)
        found = Stitched(self.known[key], error=0.0)
        self.seconds += time.monotonic() - started
        self.count += 1
        return found


class Bench:
    """digits/resnet8, read and priced once."""

    def __init__(self) -> None:
        task = load_task("digits", "resnet8")
        graph, weights = read_model(task.model, task.example_inputs)
        dense = build_module(graph, weights)
        calibration = task.split("calibration")
        batches = [(calibration.batch(slice(i, i + 128)).inputs[0],) for i in range(0, len(calibration), 128)]
        self.evaluator = StitchedEvaluator(LayerDatabase(graph, weights, collect(dense, batches, 0)), dense, task, 0)
        self.known: dict[str, float] = {}
        profile = load_hardware(HARDWARE)
        self.skeleton: Skeleton = cost_model(profile).lower(graph)
        self.menu = prune(Menu(graph, load_space("default")), self.skeleton, COSTS, executed_types(profile))
        self.dense = prices(self.skeleton, CompressionPlan())
        judge = PrefixJudge(self.evaluator, self.menu.plan_of(base_options(self.menu)))
        self.sensitivity: Sensitivity = measure_sensitivity(self.menu, judge.judge, SilentProgress())
        narrow = [prices(self.skeleton, self.menu.plan(self.menu.uniform(0.0, *form))) for form in FORMATS]
        self.least = {name: min(costs[name] for costs in narrow) * 0.9 for name in COSTS}
        price = NamedPrices(self.menu, self.skeleton, COSTS)
        self.seeds = [*uniform_seeds(self.menu), *dp_surface(self.menu, self.sensitivity, price)]

    def run(self, case: Case) -> Outcome:
        """One search: to so many evaluations, or under a budget to so many trials."""
        limits = {"latency_ms": self.dense["latency_ms"] / 3} if case.budget != "none" else {}
        pricer = ChoicePricer(self.menu, self.skeleton)
        repair = Repair(self.menu, pricer, limits, self.sensitivity) if case.repair else None
        judge, started = Judge(self.evaluator, self.known), time.monotonic()
        study = PlanStudy(InMemoryStorage(), self.menu, COSTS, limits, case.seed, sampler=case.sampler, repair=repair)
        study.enqueue(self.seeds)
        most = TRIALS if limits else 3 * EVALUATIONS
        while study.trials < most and (limits or judge.count < EVALUATIONS):
            study.step(lambda plan: prices(self.skeleton, plan), judge)
        table = study.table()
        return Outcome(
            trials=study.trials,
            evaluated=judge.count,
            repeated=int(table["same_as"].notna().sum()),
            over_budget=int((table["state"] == "PRUNED").sum()),
            hypervolume=round(self._volume(study.scored()), 4),
            sampler_s=round(time.monotonic() - started - judge.seconds, 1),
        )

    def _volume(self, scored: Sequence[Scored]) -> float:
        """Of the root of the divergence, which counts the faithful end too, and the logarithms of latency and size.

        The box ends at ``WORST`` and the original on one side, at the least that the menu can cost on the other.
        """
        rows = [
            [math.sqrt(min(max(s.divergence, 0.0), WORST) / WORST), *(self._share(n, s.costs[n]) for n in COSTS)]
            for s in scored
        ]
        return hypervolume(rows, [1.0, 1.0, 1.0])

    def _share(self, name: str, cost: float) -> float:
        return math.log(cost / self.least[name]) / math.log(self.dense[name] / self.least[name])


def cases() -> list[Case]:
    """Every sampler without a budget; under one a genetic sampler and a model with repair and without, and chance."""
    held = (("nsga2", False), ("nsga2", True), ("tpe", False), ("tpe", True), ("random", True))
    found = []
    for seed in SEEDS:
        found += [Case("none", name, False, seed) for name in SAMPLERS if seed == SEEDS[0] or name not in SLOW]
        found += [Case("latency/3", name, repair, seed) for name, repair in held]
    return found


def done() -> dict[Case, Outcome]:
    """What ``runs.csv`` holds."""
    path = FOLDER / "runs.csv"
    if not path.is_file():
        return {}
    found = {}
    for row in pd.read_csv(path, keep_default_na=False).to_dict("records"):
        case = Case(**{f.name: row[f.name] for f in fields(Case)})
        found[case] = Outcome(**{f.name: row[f.name] for f in fields(Outcome)})
    return found


def report(found: dict[Case, Outcome]) -> str:
    """The tables, means over seeds."""
    rows = pd.DataFrame([{**asdict(case), **asdict(outcome)} for case, outcome in found.items()])
    parts = []
    for budget, title in (("none", f"{EVALUATIONS} evaluations, no budget"), ("latency/3", f"{TRIALS} trials")):
        part = rows[rows["budget"] == budget]
        if part.empty:
            continue
        grouped = part.groupby(["sampler", "repair"], sort=False)
        table = grouped[["trials", "evaluated", "repeated", "over_budget", "sampler_s"]].mean().round(1)
        low, high = grouped["hypervolume"].min(), grouped["hypervolume"].max()
        table.insert(0, "hypervolume", grouped["hypervolume"].mean().map("{:.4f}".format))
        table.insert(1, "lowest to highest", [f"{a:.4f} to {b:.4f}" for a, b in zip(low, high, strict=True)])
        if budget == "none":
            table = table.droplevel("repair")
        else:
            title += ", predicted latency at most a third of the original's"
            table["share evaluated"] = (table["evaluated"] / table["trials"]).map("{:.0%}".format)
        parts.append(f"## {title}\n\n{markdown(table.sort_values('hypervolume', ascending=False).reset_index())}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("autocompress", "optuna", "torch", "numpy"))
    return (
        f"# Samplers at the stitched stage\n\n`make bench-samplers`: digits, resnet8, priced by {HARDWARE}, "
        f"means over {len(SEEDS)} seeds ({', '.join(SLOW)}: one); {cpu_description()}; {packages}; "
        f"{datetime.now(UTC):%Y-%m-%d}.\n\n"
        f"Hypervolume of the evaluated plans within budget over the root of the divergence (worth nothing from "
        f"{WORST:g} nat), log latency and log size; the usual seeds come first, and each search counts every plan it "
        f"evaluates. `sampler_s` is what a whole search takes beside its evaluations.\n\n" + "\n".join(parts)
    )


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget what was run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no search after so long")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found = {} if given.fresh else done()
    missing = [case for case in cases() if case not in found]
    bench = Bench() if missing else None
    for case in missing:
        if bench is None or time.monotonic() - started > given.seconds:
            break
        found[case] = bench.run(case)
        print(case, found[case], flush=True)
        with (FOLDER / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in (*fields(Case), *fields(Outcome))], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**asdict(c), **asdict(o)} for c, o in found.items())
    text = report(found)
    (FOLDER / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
