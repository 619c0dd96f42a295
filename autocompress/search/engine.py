"""A search from beginning to end: read, price, stitch, recover, deliver."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from autocompress.config import RunConfig
from autocompress.errors import InfeasibleError, UsageError
from autocompress.graph.blocks import find_blocks
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import HardwareProfile
from autocompress.methods.database import LayerDatabase
from autocompress.methods.quantization import gives_float
from autocompress.methods.statistics import collect
from autocompress.plan import CompressionPlan, Front, LayerPlan, Original
from autocompress.progress import Progress
from autocompress.search.adoption import best_of, known_elsewhere, note_study
from autocompress.search.anchoring import calibrate
from autocompress.search.bases import Base, build_student, on_base, shallow_specs
from autocompress.search.climb import FINAL_MEASURE_S, MEASURE_S, Climber
from autocompress.search.context import Context, name_of, priced, prices
from autocompress.search.deliver import ORIGINAL, UNIFORM_INT8, Delivery
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.files import Clock, read_json, write_text
from autocompress.search.gains import Outcome
from autocompress.search.legs import mark_done
from autocompress.search.menu import Menu, complete, format_of
from autocompress.search.prefix import PrefixJudge, side_by_side
from autocompress.search.pricing import ChoicePricer
from autocompress.search.proposing import make_proposals
from autocompress.search.pruning import prune
from autocompress.search.publishing import publish, require_feasible
from autocompress.search.repair import Repair, structural_harm
from autocompress.search.samplers import make_sampler
from autocompress.search.scoring import loss_of
from autocompress.search.seeds import (
    FORMATS,
    Judge,
    Sensitivity,
    base_options,
    measure_sensitivity,
    single_swaps,
    uniform_seeds,
)
from autocompress.search.stages import Stages
from autocompress.search.study import PlanStudy, Scored, sampler_settings
from autocompress.search.target import (
    counted_costs,
    executed_types,
    is_present,
    knows_energy,
    limits_of,
    predicted_limits,
    searched_costs,
    target_of,
)
from autocompress.search.variants import variants
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import Task, quality

logger = logging.getLogger(__name__)

SEARCH_SHARE, SEARCH_MOST, LEAST_TRIALS = 0.01, 0.05, 24
"""Share of the time after set-up that goes to stitched candidates: more, up to a limit, until so many were evaluated.
The rest recovers and delivers the best."""

PREDICTION_MARGIN = 1.06
"""Predictions err by a few percent: plans are held to a little less than a latency budget."""

TIMING_ROUNDS = 3
TIMING_OVERHEAD_S, LEAST_MEASURE_S = 0.2, 0.2
SAMPLER_TURN = 2
"""Every so many trials, once the seeds are evaluated, Optuna's sampler chooses the plan; else expected gain does."""

SEED_SHARES = (1.0, 0.5)
"""Widths of the uniform plans that are evaluated whatever they promise; the others are in the pool of proposals."""

SENSITIVITY_MOST = 0.1
"""Share of the time left that measuring single changes may take; beyond, what they take away stands in for it."""

SWAP_PASSES = 0.5
"""What judging a single change costs, in passes over the whole network: what lies before the change is shared."""

STITCHED_DELIVERED = 3
NOTED_EVERY = 20


class Engine:
    """One run.

    Args:
        config: what was asked for.
        space: the search space it names.
        task: model and data.
        teacher: the model that candidates are distilled from.
        profile: the target device.
        run: the run directory.
        clock: of the time budget.
        progress: told what happens.
    """

    def __init__(
        self,
        config: RunConfig,
        space: SearchSpace,
        task: Task,
        teacher: nn.Module,
        profile: HardwareProfile,
        run: Path,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.config, self.space, self.task, self.teacher = config, space, task, teacher
        self.profile, self.run, self.clock, self.progress = profile, run, clock, progress
        before = read_json(run / "front.json")
        # A run that goes on accounts for all of its time; a new one that started from another begins at nothing.
        self.stages = Stages(spent={} if before is None else before["search"]["stages"])
        self.trials = 0 if before is None else int(before["search"]["trials"])
        self.present = is_present(config, profile)
        self.limits = limits_of(config, profile)
        target = target_of(config, profile)
        self.delivery = Delivery(
            run, task, target, config.objectives, self.limits, config.seed, self.present, knows_energy(profile),
            stages=self.stages,
        )  # fmt: skip

    def execute(self) -> Front:
        """Runs all stages; what is already done in the run directory is not done again.

        Raises:
            InfeasibleError: no model keeps the budgets.
        """
        if ORIGINAL in self.delivery.points:
            # What is known already is a front, before anything is read.
            if self.config.time_budget == 0:
                return self._complete()
            self._publish("running")
        context = self._set_up()
        with self._stage("search"):
            scored = self._search(context)
        if self.clock.leg == 1 or self.clock.left > 0:
            with self._stage("first points"):
                self._deliver_stitched(context, scored)
        with self._stage("recover"):
            Climber(context, context.repriced(scored)).climb()
        with self._stage("measure"):
            self._measure_front()
        return self._complete()

    def _measure_front(self) -> None:
        """Times what is shown once more, together, so that the figures of one table are comparable.

        A point whose new time is worse may give way to models that were timed before: these are then timed, too.
        """
        timed: set[str] = set()
        for _ in range(TIMING_ROUNDS):
            names = {UNIFORM_INT8, *(point.id for point in self.delivery.select()[0])} - timed
            if timed and not names:
                break
            self.delivery.measure(sorted(names), self._final_seconds(len(names) + 1), self.progress)
            timed |= names

    def _final_seconds(self, count: int) -> float:
        """Seconds for each model that is timed at the end: fewer where a small addition to a run leaves no more."""
        if self.clock.leg == 1:
            return FINAL_MEASURE_S
        return float(np.clip(self.clock.left / count - TIMING_OVERHEAD_S, LEAST_MEASURE_S, FINAL_MEASURE_S))

    def _complete(self) -> Front:
        with self._stage("test"):
            self.delivery.score_front()
        front = self._publish("complete")
        mark_done(self.run)
        require_feasible(self.delivery, front)
        return front

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Adds the time of a stage to the run's account."""
        try:
            with self.stages.of(name):
                yield
        finally:
            self.clock.save()

    # --------------------------------------------------------------------------------------------------- set-up

    def _set_up(self) -> Context:
        config, task = self.config, self.task
        with self._stage("read"):
            self.progress.stage("read")
            graph, weights = read_model(task.model, task.example_inputs)
            menu = Menu(graph, self.space, config.freeze, config.origin("freeze"))
            menu.check_choice(config.origin("space"))
            dense = build_module(graph, weights)
            calibration = task.split("calibration")
            batches = [(calibration.batch(slice(i, i + 128)).inputs[0],) for i in range(0, len(calibration), 128)]
            database = LayerDatabase(graph, weights, collect(dense, batches, config.seed))
            evaluator = StitchedEvaluator(database, dense, task, config.seed)
            pricer = cost_model(self.profile)
            original = Base(Original(), graph, weights, pricer.lower(graph))
            error = loss_of(task.metric, quality(task, dense))
        with self._stage("calibrate"):
            feedback = None
            if self.present:
                feedback = calibrate(original, evaluator, menu, self.profile, config, self.run, self.progress)
            estimate = original.skeleton.estimate(CompressionPlan())
            counted = counted_costs(config, self.limits, estimate)
            menu = prune(menu, original.skeleton, counted, executed_types(self.profile))
            write_text(self.run / "space.json", json.dumps(menu.describe(), indent=1))
            hard = predicted_limits(self.limits, estimate, self.present, PREDICTION_MARGIN)
            with config.citing("sampler"):
                # Found unfit now rather than after the baselines.
                make_sampler(config.sampler, sampler_settings(menu, len(searched_costs(config))))
            self._check_reachable(menu, original)
        with self._stage("baselines"):
            reference = self._deliver_baselines(original, database)
        return Context(
            config=config,
            space=self.space,
            task=task,
            run=self.run,
            clock=self.clock,
            progress=self.progress,
            cost_model=pricer,
            original=original,
            dense=dense,
            teacher=self.teacher,
            evaluator=evaluator,
            menu=menu,
            delivery=self.delivery,
            storage=config.storage or f"sqlite:///{self.run / 'study.db'}",
            error=error,
            hard=hard,
            reference=reference,
            feedback=feedback,
            publish=lambda: self._publish("running"),
        )

    def _check_reachable(self, menu: Menu, original: Base) -> None:
        """Ends early where even the cheapest plan is far over budget as predicted."""
        cheap = [menu.plan(menu.uniform(0.0, compute, bits)) for compute, bits in FORMATS]
        costs = [prices(original.skeleton, plan) for plan in cheap]
        offered, blocks = self.space.students, [block.name for block in find_blocks(original.graph)]
        if "inherit" in offered.init and offered.depths and blocks:
            shallowest = shallow_specs(blocks, offered.depths)[0]
            base = build_student(self.task, original, shallowest, cost_model(self.profile), self.config.seed)
            assert base is not None
            costs += [prices(base.skeleton, on_base(plan, base)) for plan in cheap]
        for name, limit in self.limits.items():
            if name == "drop":
                continue
            best = min(cost[name] for cost in costs)
            if best > 1.25 * limit:
                raise InfeasibleError(
                    f"no plan of this space can reach {name} <= {limit:g}: the nearest is predicted at {best:g} "
                    f"(every width and the depth at their least); raise the budget or allow more with --space"
                )

    def _deliver_baselines(self, original: Base, database: LayerDatabase) -> dict[str, float]:
        """Exports and measures the original and its uniform int8 form; gives the original's predicted costs."""
        dense = complete(original.graph, CompressionPlan())
        int8 = LayerPlan(compute="int8", storage=format_of("int8", 8).storage)
        layers = {layer.name: int8 for layer in original.graph.compressible if not gives_float(original.graph, layer)}
        uniform = complete(original.graph, CompressionPlan(layers=layers))
        for name, plan in ((ORIGINAL, dense), (UNIFORM_INT8, uniform)):
            if plan == dense and name != ORIGINAL:
                continue  # No layer can compute in integers: there is no such model.
            self.delivery.add(name, partial(database.stitch, plan), original.skeleton.estimate(plan))
        if ORIGINAL not in self.delivery.points:
            raise UsageError(f"the original does not run as exported: {self.delivery.failures[ORIGINAL]}")
        self.delivery.measure([UNIFORM_INT8], MEASURE_S)
        self._publish("running")
        # As predicted: what it is compared with is predicted too, and another measurement would give other choices.
        return prices(original.skeleton, dense)

    # --------------------------------------------------------------------------------------------------- search

    def _search(self, context: Context) -> list[Scored]:
        """Optuna over stitched candidates, from the seeds on; gives every distinct plan that was evaluated.

        Its own sampler takes turns with plans proposed by expected gain, which are enqueued in the same study.
        """
        costs = context.costs
        # Once: what stands in for it is not kept, and estimating what measuring would take costs a pass.
        sensitivity = self._sensitivity(context) if context.hard or not self._searched() else None
        repair, sampler = self._repair(context, sensitivity), self.config.sampler
        study = PlanStudy(
            context.storage, context.menu, costs, context.hard, self.config.seed, sampler=sampler, repair=repair,
            prefix=context.study_prefix,
        )  # fmt: skip
        if sensitivity is not None and not self._searched():
            proposals = make_proposals(context, sensitivity)
            if study.trials == 0:
                known = known_elsewhere(study, context.storage, self.run, self.config.seed, context.original.skeleton)
                study.enqueue(item.choices for item in best_of(known, costs))
                study.enqueue(uniform_seeds(context.menu, SEED_SHARES))
                study.adopt(known)
            note_study(self.run, study.name, self.config.seed)
            others = self._taken_over(study)
            total = None if self.config.trials is None else self.config.trials + others
            limited = math.isfinite(self.clock.left)
            started, left = self.clock.spent, self.clock.left
            self.progress.stage("search", total)
            batch: list[tuple[int, ...]] = []
            while (total is None or study.trials < total) and not study.exhausted:
                few = study.trials - others < LEAST_TRIALS
                if limited and self.clock.spent - started >= (SEARCH_MOST if few else SEARCH_SHARE) * left:
                    break
                if not study.waiting and study.trials % SAMPLER_TURN:
                    # What the sampler came upon meanwhile is not evaluated again.
                    batch = [choices for choices in batch if choices not in study.tried]
                    batch = batch or proposals.batch(study.evaluated, study.tried)
                    study.enqueue(batch[:1])
                study.step(lambda plan: prices(context.original.skeleton, plan), context.evaluator)
                self.progress.advance()
                if study.trials % NOTED_EVERY == 0:
                    context.note_time()
                    self.clock.save()
            write_text(self.run / "trials.csv", study.table().to_csv(index=False))
            if study.trials:
                write_text(self._search_done, json.dumps({"leg": self.clock.leg, "trials": study.trials}))
        self.trials = study.trials
        return study.scored()

    def _taken_over(self, study: PlanStudy) -> int:
        """Trials that another run has made: adopted, or of this very study, which a run under other time began with."""
        if self.clock.leg == 1 or self.clock.began_s:
            return study.adopted
        path = self.run / ".work" / "taken-over.json"
        noted: dict[str, int] = read_json(path) or {}
        if study.name not in noted:
            noted[study.name] = study.trials
            write_text(path, json.dumps(noted))
        return noted[study.name]

    @property
    def _search_done(self) -> Path:
        return self.run / ".work" / "search-done.json"

    def _searched(self) -> bool:
        """Whether this leg of the run has had its share of stitched candidates."""
        done = read_json(self._search_done)
        return done is not None and bool(done["leg"] >= self.clock.leg)

    def _repair(self, context: Context, sensitivity: Sensitivity | None) -> Repair | None:
        """What makes plans over budget into others that keep it; None where there are no budgets."""
        if not context.hard:
            return None
        pricer = ChoicePricer(context.menu, context.original.skeleton)
        return Repair(context.menu, pricer, context.hard, sensitivity)

    def _sensitivity(self, context: Context) -> Sensitivity:
        path, knobs = self.run / ".work" / "sensitivity.json", context.menu.knobs
        stored = read_json(path)
        labels = {knob.name: [option.label for option in knob.options] for knob in knobs}
        # By label: a run may have started from one whose menu held other options.
        if isinstance(stored, dict) and all(set(own) <= stored.get(name, {}).keys() for name, own in labels.items()):
            return Sensitivity(tuple(np.array([stored[name][label] for label in own]) for name, own in labels.items()))
        base = context.menu.plan_of(base_options(context.menu))
        judge: Judge = PrefixJudge(context.evaluator, base).judge
        if context.timed:
            swaps, before = len(single_swaps(context.menu)), self.clock.spent
            context.evaluator.quick(base)
            seconds = SWAP_PASSES * swaps * (self.clock.spent - before)
            if seconds > SENSITIVITY_MOST * self.clock.left:
                told = "measuring %d single changes would take about %.0f s: how much each takes away stands in for it"
                logger.info(told, swaps, seconds)
                return Sensitivity(tuple(structural_harm(context.menu)))
            judge = side_by_side(judge, self.progress)
        found = measure_sensitivity(context.menu, judge, self.progress)
        rows = zip(labels.items(), found.divergence, strict=True)
        write_text(path, json.dumps({name: dict(zip(own, row.tolist(), strict=True)) for (name, own), row in rows}))
        return found

    # ------------------------------------------------------------------------------------------------- delivery

    def _deliver_stitched(self, context: Context, scored: list[Scored]) -> None:
        """The first front, before any recovery: the original in its best formats, and the best stitched candidates."""
        original = context.original
        dense = complete(original.graph, CompressionPlan(layers={name: f[0] for name, f in context.formats.items()}))
        plans = [plan for plan in variants(original.graph, original.skeleton, dense, context.formats) if plan != dense]
        base_error = context.evaluator(context.menu.plan(context.menu.uniform(1.0, "fp32", 32))).error
        outcomes = [Outcome(s.error - base_error, s.costs) for s in scored]
        present: list[Outcome] = []
        for _ in range(min(STITCHED_DELIVERED, len(scored))):
            index, gain = context.gains.best(present, outcomes)
            if gain <= 1e-4:
                break
            present.append(outcomes[index])
            plans.append(scored[index].plan)
        names = []
        for plan in plans:
            costs = prices(original.skeleton, plan)
            known = name_of(plan) in self.delivery.points
            if not known and all(costs[name] <= limit for name, limit in context.hard.items()):
                names.append(name_of(plan))
                make = partial(context.evaluator.build, plan)
                self.delivery.add(names[-1], make, original.skeleton.estimate(priced(plan)))
        if names:
            self.delivery.measure(names, MEASURE_S)
            self._publish("running")
        # From here on, and from each structure that is recovered, prices follow what was measured.  The study before
        # saw the anchors alone: its values would not be comparable otherwise.
        if context.feedback is not None:
            context.feedback.apply()
        context.learn([UNIFORM_INT8, *(name_of(plan) for plan in plans)])

    def _publish(self, status: Literal["running", "complete"]) -> Front:
        self.clock.save()
        with self.stages.of("publish"):
            return publish(self.delivery, status, self.trials, self.clock.spent, self.stages.seconds)
