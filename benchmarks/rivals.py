"""The simpler ways to search, with everything but the search taken from the engine.

Each rival reads and prices the model as the engine does, starts every candidate from the same database of compressed
layers, trains with the same distillation (in its default recipe), and delivers through the same exporter and the same
measurements.  What differs is what is tried next and how long it is trained:

- ``nsga2``, ``tpe``, ``random``: Optuna proposes complete plans (an option a knob, and how many residual blocks leave);
  each is trained for a fixed number of steps, exported, and told back as measured.  They begin with uniform plans and
  with plans by dynamic programming, at full and at the least depth, as many as NSGA-II's population.
- ``quantize``: the same with NSGA-II over number formats alone.
- ``sequence``: prune to a uniform width, train, then quantize: several widths, the time shared equally.

``python -m benchmarks.rivals nsga2 --steps 60 --task fashion-mnist --model resnet20 --time-budget 10m --out DIR``
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import torch

from autocompress.config import RunConfig
from autocompress.devices import resolve_device
from autocompress.environment import environment_facts
from autocompress.front import error_of, latency_of
from autocompress.graph.blocks import drop_blocks, find_blocks
from autocompress.graph.executor import build_module
from autocompress.hardware.profile import load_hardware
from autocompress.methods.distillation import teach
from autocompress.methods.rounding import FINE_BITS
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Original, Recipe, Student
from autocompress.progress import SilentProgress
from autocompress.rundir import open_run_directory
from autocompress.search.bases import Base, build_student, on_base
from autocompress.search.climb import LESSONS_FIRST_S, LESSONS_SHARE, MEASURE_S
from autocompress.search.context import Context, name_of, priced
from autocompress.search.engine import Engine
from autocompress.search.files import Clock, write_text
from autocompress.search.menu import Menu, complete
from autocompress.search.prepared import teacher_of
from autocompress.search.pricing import NamedPrices
from autocompress.search.recover import BATCH, Recovered, Trainer
from autocompress.search.seeds import dp_surface
from autocompress.search.variants import variants
from autocompress.spaces import load_space
from autocompress.tasks import load_task

logger = logging.getLogger(__name__)

METHODS = ("nsga2", "tpe", "random", "quantize", "sequence")
COUNTED_BATCH = 128
"""Samples a training step where each trial has a fixed number of steps."""

FORMAT_STEPS = 0.25
"""Steps with low-bit formats simulated, as a share of a trial's."""

SEQUENCE_WIDTHS = (0.75, 0.5, 0.375, 0.25, 0.125)
POPULATION = 8
"""Of NSGA-II, and how many seeds all of Optuna's start with: a few dozen trials are all that ten minutes hold."""

BLOCKS = "blocks"
SEED_WIDTHS = (1.0, 0.5)


class Rival(Engine):
    """One run of a simpler way; ``prepare`` makes it, ``compete`` runs it until its time is over.

    Attributes:
        method: one of ``METHODS``.
        steps: training steps of each trial.
    """

    method: str
    steps: int

    def compete(self) -> None:
        """Tries candidates until the time is over; the front on disk follows each of them."""
        self.context = context = self._set_up()
        teacher = build_module(context.original.graph, context.original.weights or {})
        device = resolve_device(self.config.device)
        flip = self.task.augmentation.flip
        taught = teach(teacher, self.task.split("train"), flip, self.progress, LESSONS_FIRST_S, device)
        # A count of steps gets further with more samples each; against the clock smaller batches do.
        batch_size = BATCH if self.method == "sequence" else COUNTED_BATCH
        self.trainer = Trainer(self.task, taught, self.config.seed, batch_size=batch_size, device=device)
        self.blocks = [b.name for b in find_blocks(context.original.graph)]
        if self.blocks:
            self.blocks.sort(key=self._harm)
        self.bases: dict[int, Base] = {0: context.original}
        if self.method == "sequence":
            self._prune_then_quantize()
        else:
            self._optimise()
        self._publish("complete")

    # ------------------------------------------------------------------------------------------------ Optuna

    def _optimise(self) -> None:
        menu = self._menu()
        sampler: optuna.samplers.BaseSampler
        if self.method == "tpe":
            sampler = optuna.samplers.TPESampler(
                seed=self.config.seed, multivariate=True, constant_liar=False, n_startup_trials=POPULATION
            )
        elif self.method == "random":
            sampler = optuna.samplers.RandomSampler(seed=self.config.seed)
        else:
            sampler = optuna.samplers.NSGAIISampler(seed=self.config.seed, population_size=POPULATION)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        for labels in self._seeds(menu):
            study.enqueue_trial(labels, skip_if_exists=True)
        known: dict[str, list[float]] = {}
        taken: list[float] = []
        while self.clock.left > (np.median(taken[-5:]) if taken else 0.0):
            started = time.monotonic()
            trial = study.ask()
            if isinstance(sampler, optuna.samplers.NSGAIISampler):
                # A trial whose parameters are all given is never shown to the sampler, which would not breed from it.
                sampler.get_trial_generation(study, study.trials[trial.number])
            choices = [
                [o.label for o in k.options].index(trial.suggest_categorical(k.name, [o.label for o in k.options]))
                for k in menu.knobs
            ]
            depth = trial.suggest_int(BLOCKS, 0, 0 if self.method == "quantize" else len(self.blocks))
            plan = self._plan(menu.plan(choices), depth)
            values = known.get(plan.digest)
            try:
                values = values or self._try(plan, depth)
            except (ArithmeticError, RuntimeError, ValueError) as error:
                logger.warning("trial %d failed: %s", trial.number, error)
            if values is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                known[plan.digest] = values
                study.tell(trial, values)
            self.trials += 1
            taken.append(time.monotonic() - started)
            self._publish("running")

    def _menu(self) -> Menu:
        """All the engine may choose; for ``quantize`` the widths stay whole."""
        menu = self.context.menu
        if self.method != "quantize":
            return menu
        whole = {k.name: [o for o in k.options if o.keep == max(p.keep or 0 for p in k.options) or o.keep is None]
                 for k in menu.knobs}  # fmt: skip
        return menu.reduced(whole, {})

    def _seeds(self, menu: Menu) -> list[dict[str, object]]:
        """Uniform int8 plans, and some of the engine's by dynamic programming, at full and at the least depth."""
        context = self.context
        uniform = [menu.uniform(width, "int8", 8) for width in SEED_WIDTHS]
        if self.method == "quantize":
            pairs = [(menu.uniform(1.0, "int8", bits), 0) for bits in (8, 4)]
        else:
            price = NamedPrices(menu, context.original.skeleton, context.costs)
            found = dp_surface(menu, self._sensitivity(context), price)
            found = [found[place] for place in price(np.array(found))[:, 0].argsort()]
            places = np.linspace(0, len(found) - 1, POPULATION // 2 - len(uniform) + 2)[1:-1]
            spread = [found[round(place)] for place in places]
            pairs = [(choices, depth) for choices in [*uniform, *spread] for depth in (0, len(self.blocks))]
        return [
            {**{k.name: k.options[c].label for k, c in zip(menu.knobs, choices, strict=True)}, BLOCKS: depth}
            for choices, depth in pairs
        ]

    # ------------------------------------------------------------------------------------- one candidate

    def _plan(self, plan: CompressionPlan, depth: int) -> CompressionPlan:
        base = self._base(depth)
        if base is self.context.original:
            return plan
        return on_base(plan, base)

    def _base(self, depth: int) -> Base:
        """The original without its ``depth`` least harmful blocks."""
        if depth not in self.bases:
            spec = Student(width=1.0, depth=1.0 - depth / len(self.blocks), dropped=tuple(sorted(self.blocks[:depth])))
            context = self.context
            base = build_student(self.task, context.original, spec, context.cost_model, self.config.seed)
            assert base is not None
            self.bases[depth] = base
        return self.bases[depth]

    def _harm(self, block: str) -> float:
        evaluator = self.context.evaluator
        graph = drop_blocks(self.context.original.graph, [block])
        return evaluator.divergence_of(build_module(graph, evaluator.database.weights))

    def _start(self, plan: CompressionPlan, depth: int) -> tuple[ModelGraph, Mapping[str, torch.Tensor]]:
        """Graph and float weights a training begins with: pruned by the database, its statistics corrected."""
        original = self.context.original.graph
        floats = {layer.name: LayerPlan() for layer in original.compressible}
        whole = {g.id: plan.groups.get(g.id, g.size) for g in original.groups}
        made = self.context.evaluator.build(complete(original, CompressionPlan(groups=whole, layers=floats)))
        graph = drop_blocks(made.graph, self.blocks[:depth])
        return graph, {name: made.weights[name] for name in graph.weight_names()}

    def _train(self, plan: CompressionPlan, depth: int, steps: int, seconds: float | None = None) -> Recovered:
        if not self.trainer.teacher.complete:
            self.trainer.teacher.extend(LESSONS_FIRST_S if seconds is None else LESSONS_SHARE * seconds)
        graph, weights = self._start(plan, depth)
        return self.trainer.float_recovery(
            graph, weights, Recipe(), fresh=False, steps=steps, seconds=seconds, progress=SilentProgress()
        )

    def _try(self, plan: CompressionPlan, depth: int) -> list[float] | None:
        """Trains, exports and measures one plan; gives its validation error, time and size."""
        context = self.context
        if self.steps == 0 and depth == 0:
            compressed = context.evaluator.build(plan)
        else:
            recovered = self._train(plan, depth, self.steps)
            compressed = self.trainer.to_formats(
                recovered, plan, steps=round(FORMAT_STEPS * self.steps), seconds=None, progress=SilentProgress()
            )
        name = name_of(plan)
        if not self.delivery.add(name, lambda: compressed, self._base(depth).skeleton.estimate(priced(plan))):
            return None
        self.delivery.measure([name], MEASURE_S)
        point = self.delivery.points[name]
        return [error_of(self.task.metric, point.quality.validation), latency_of(point) or np.inf, point.size_bytes]

    # ------------------------------------------------------------------------------------- in sequence

    def _prune_then_quantize(self) -> None:
        context = self.context
        menu, original = context.menu, context.original
        for place, width in enumerate(SEQUENCE_WIDTHS):
            share = self.clock.left / (len(SEQUENCE_WIDTHS) - place)
            plan = menu.plan(menu.uniform(width, "fp32", 32))
            recovered = self._train(plan, 0, 10**9, seconds=0.65 * share)
            plans = variants(original.graph, original.skeleton, plan, context.formats)
            low = max(1, sum(any(f.storage.bits < FINE_BITS for f in p.layers.values()) for p in plans))
            for made in plans:
                recipe = recovered.recipe.model_copy(update={"steps": recovered.steps})
                made = made.model_copy(update={"recipe": recipe, "base": Original()})
                make = partial(
                    self.trainer.to_formats,
                    recovered, made, steps=10**9, seconds=0.2 * share / low, progress=SilentProgress(),
                )  # fmt: skip
                if self.delivery.add(name_of(made), make, original.skeleton.estimate(made)):
                    self.delivery.measure([name_of(made)], MEASURE_S)
                self.trials += 1
            self._publish("running")

    context: Context
    trainer: Trainer


def prepare(method: str, steps: int, config: RunConfig) -> Rival:
    """A rival over a new run directory."""
    progress = SilentProgress()
    task = load_task(config.task, config.model, progress=progress)
    profile = load_hardware(config.hardware, config.threads, config.batch, runtime=config.runtime, progress=progress)
    run, _ = open_run_directory(config)
    write_text(run / "environment.json", json.dumps(environment_facts(), indent=1))
    clock = Clock(run / ".work" / "spent.json", config.time_budget)
    teacher = teacher_of(config, task, progress)
    rival = Rival(config, load_space(config.space), task, teacher, profile, run, clock, progress)
    rival.method, rival.steps = method, steps
    return rival


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each trial")
    for name, default in (("task", "fashion-mnist"), ("model", "resnet20"), ("time-budget", "10m")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config = RunConfig.create(
        task=given.task, model=given.model, time_budget=given.time_budget, seed=given.seed, out=given.out
    )
    prepare(given.method, given.steps, config).compete()


if __name__ == "__main__":
    main()
