"""A search from beginning to end: read, profile, stitch, recover, deliver."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from autocompress.config import RunConfig
from autocompress.errors import InfeasibleError, UsageError
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.hardware.cost import FittedCostModel, Skeleton
from autocompress.hardware.profile import HardwareProfile
from autocompress.methods.database import LayerDatabase
from autocompress.methods.distillation import teach
from autocompress.methods.statistics import collect
from autocompress.plan import (
    FLOAT32,
    CompressionPlan,
    Estimate,
    Front,
    LayerPlan,
    Original,
    Student,
    Target,
)
from autocompress.progress import Progress
from autocompress.search.anchoring import calibrate
from autocompress.search.bases import Base, build_student, student_specs
from autocompress.search.deliver import ORIGINAL, UNIFORM_INT8, Delivery
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.files import Clock, read_json, write_text
from autocompress.search.ladder import RecipeStudy, RecoveryForecast, best_gain, box
from autocompress.search.menu import Menu, complete, format_of, formats_of
from autocompress.search.recover import Climbed, Recovered, Trainer, load_recovered, save_recovered
from autocompress.search.seeds import FORMATS, Sensitivity, dp_front, measure_sensitivity, uniform_seeds
from autocompress.search.study import PlanStudy, Scored
from autocompress.search.variants import variants
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import Task, quality

logger = logging.getLogger(__name__)

SEARCH_SHARE = 0.2
"""Share of the time after set-up that goes to stitched candidates; the rest recovers and delivers the best."""

FIRST_RUNG_SHARE = 0.5
"""Share of recovery that goes to a first, short training of many structures; the rest goes to the best of them."""

PROMOTED = 3
SLOT_S = 12.0
FORMATS_SHARE = 0.25
"""Share of a rung's time that trains with number formats simulated."""
STEPS_FIRST, STEPS_SECOND, STEPS_FORMATS, STRUCTURES = 150, 300, 60, 4
"""Without a time budget: steps at each rung, with formats simulated, and how many structures enter."""

PREDICTION_MARGIN = 1.06
WIDEST_DROP = 30.0
MEASURE_S, FINAL_MEASURE_S = 0.4, 0.8
FRESH_MIN_S = 25.0
MAX_STEPS = 10**9


@dataclass
class Structure:
    """A set of widths on its way up the ladder."""

    base: Base
    plan: CompressionPlan
    divergence: float | None
    recovered: Recovered | None = None
    rung: int = 0

    @property
    def key(self) -> str:
        return self.plan.shape_digest


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
        self.config, self.space, self.task, self.run = config, space, task, run
        self.teacher = teacher
        self.profile, self.clock, self.progress = profile, clock, progress
        self.cost_model = FittedCostModel(profile)
        self.limits = config.budgets
        self.stages: dict[str, float] = {}
        self.storage = config.storage or f"sqlite:///{run / 'study.db'}"
        target = Target(
            hardware=config.hardware,
            runtime=config.runtime,
            version=profile.runtime_version,
            threads=config.threads,
            batch=config.batch,
        )
        self.delivery = Delivery(run, task, target, config.objectives, self.limits, config.seed)
        self.structures: dict[str, Structure] = {}
        self.bases: dict[Student, Base | None] = {}
        self.forecast = RecoveryForecast()
        self.trials = 0
        # Predictions err by a few percent: plans are held to a little less than the budget.
        self.hard = {name: limit for name, limit in self.limits.items() if name != "drop"}
        if "latency_ms" in self.hard:
            self.hard["latency_ms"] /= PREDICTION_MARGIN

    # -------------------------------------------------------------------------------------------------- stages

    def execute(self) -> Front:
        """Runs all stages; what is already done in the run directory is not done again."""
        with self._stage("read"):
            self._read()
        with self._stage("calibrate"):
            observed = calibrate(self.original, self.evaluator, self.profile, self.config, self.run, self.progress)
            logger.info("cost model calibrated on %d artifacts", observed)
        self._check_reachable()
        with self._stage("baselines"):
            self._deliver_baselines()
        with self._stage("search"):
            self._search()
        with self._stage("first points"):
            self._deliver_stitched()
        with self._stage("recover"):
            self._recover()
        with self._stage("measure"):
            self._finish()
        front = self._publish("complete")
        self.delivery.require_feasible(front)
        return front

    def _stage(self, name: str) -> _Stage:
        return _Stage(self, name)

    def _read(self) -> None:
        self.progress.stage("read")
        graph, weights = read_model(self.task.model, self.task.example_inputs)
        self.dense = build_module(graph, weights)
        calibration = self.task.split("calibration").inputs
        batches = [(calibration[i : i + 128],) for i in range(0, len(calibration), 128)]
        statistics = collect(self.dense, batches, self.config.seed)
        self.database = LayerDatabase(graph, weights, statistics)
        skeleton = self.cost_model.lower(graph)
        self.original = Base(Original(), graph, weights, skeleton, stitched=True)
        self.evaluator = StitchedEvaluator(self.database, self.dense, self.task, self.config.seed)
        self.menu = Menu(graph, self.space, self.config.freeze, self.config.origin("freeze"))
        self.formats = {layer: [o.format for o in knob.options] for knob in self.menu.knobs for layer in knob.layers}
        write_text(self.run / "space.json", json.dumps(self.menu.describe(), indent=1))
        self.error = 1.0 - quality(self.task, self.dense)
        self.cost_names = tuple(name for name in self.config.objectives if name != "error")

    def _check_reachable(self) -> None:
        """Ends early where even the cheapest plan is far over budget as predicted."""
        cheap = [self.menu.plan(self.menu.uniform(0.0, compute, bits)) for compute, bits in FORMATS]
        costs = [self._price(plan) for plan in cheap]
        for name, limit in self.limits.items():
            if name == "drop":
                continue
            best = min(cost[name] for cost in costs)
            if best > 1.25 * limit:
                raise InfeasibleError(
                    f"no plan of this space can reach {name} <= {limit:g}: the nearest is predicted at {best:g} "
                    f"(every width at its least); raise the budget or allow more with --space"
                )

    def _price(self, plan: CompressionPlan) -> dict[str, float]:
        return prices(self.original.skeleton, plan)

    def _deliver_baselines(self) -> None:
        dense = complete(self.original.graph, CompressionPlan())
        int8 = format_of("int8", 8)
        layers = {layer.name: int8 for layer in self.original.graph.compressible}
        uniform = complete(self.original.graph, CompressionPlan(layers=layers))
        for name, plan in ((ORIGINAL, dense), (UNIFORM_INT8, uniform)):
            if name not in self.delivery.points:
                self.delivery.add(name, self.database.stitch(plan), self._estimate(self.original, plan))
        self.delivery.measure([UNIFORM_INT8], MEASURE_S)
        if ORIGINAL not in self.delivery.points:
            raise UsageError(f"the original does not run as exported: {self.delivery.failures[ORIGINAL]}")
        reference = self.delivery.points[ORIGINAL]
        assert reference.latency_ms.measured is not None
        self.reference = (reference.latency_ms.measured, float(reference.size_bytes))
        self._publish("running")

    # -------------------------------------------------------------------------------------------------- search

    def _search(self) -> None:
        study = PlanStudy(self.storage, self.menu, self.cost_names, self.hard, self.config.seed)
        self.study = study
        if read_json(self.run / ".work" / "search-done.json"):
            self.trials = study.trials
            return
        if study.trials == 0:
            sensitivity = self._sensitivity()
            study.enqueue(uniform_seeds(self.menu))
            for name in self.cost_names:
                if name in ("latency_ms", "size_bytes", "macs", "peak_memory_bytes"):
                    price = lambda plans, name=name: getattr(self.original.skeleton.price(plans), name).astype(float)  # noqa: E731
                    study.enqueue(dp_front(self.menu, sensitivity, price))
        total = self.config.trials
        deadline = self.clock.spent + SEARCH_SHARE * self.clock.left if math.isfinite(self.clock.left) else math.inf
        self.progress.stage("search", total)
        while (total is None or study.trials < total) and self.clock.spent < deadline:
            study.step(self._price, self.evaluator)
            self.trials = study.trials
            self.progress.advance()
            if self.trials % 20 == 0:
                self._note_time()
                self.clock.save()
        write_text(self.run / "trials.csv", study.table().to_csv(index=False))
        write_text(self.run / ".work" / "search-done.json", json.dumps(self.trials))

    def _sensitivity(self) -> Sensitivity:
        path = self.run / ".work" / "sensitivity.json"
        stored = read_json(path)
        if stored is not None and [len(row) for row in stored] == [len(k.options) for k in self.menu.knobs]:
            return Sensitivity(tuple(np.array(row) for row in stored))
        found = measure_sensitivity(self.menu, lambda plan: self.evaluator(plan).divergence, self.progress)
        write_text(path, json.dumps([row.tolist() for row in found.divergence]))
        return found

    def _deliver_stitched(self) -> None:
        """The first front, before any recovery: the best stitched candidates as they are."""
        scored = self.study.scored()
        present: list[list[float]] = []
        chosen: list[Scored] = []
        rows = [self._box(s.error - self._stitched_error(), s.costs) for s in scored]
        for _ in range(min(6, len(scored))):
            index, gain = best_gain(present, rows)
            if gain <= 1e-4:
                break
            present.append(rows[index])
            chosen.append(scored[index])
        for item in chosen:
            self._deliver(self.original, item.plan, self.evaluator.build(item.plan))
        self.delivery.measure([self._name(item.plan) for item in chosen], MEASURE_S)
        self._publish("running")

    def _stitched_error(self) -> float:
        return self.evaluator(self.menu.plan(self.menu.uniform(1.0, "fp32", 32))).error

    def _box(self, drop: float, costs: Mapping[str, float]) -> list[float]:
        """A point for comparing gains; the drop counts by its root, so that the cheap end of a front counts too."""
        span = min(self.limits.get("drop", WIDEST_DROP), WIDEST_DROP) or 1.0
        drop = math.sqrt(max(drop, 0.0) * 100.0 / span) * span / 100.0
        latency = costs.get("latency_ms", self.reference[0])
        return box(drop, latency, costs.get("size_bytes", self.reference[1]), self.reference, span)

    # ------------------------------------------------------------------------------------------------- recovery

    def _recover(self) -> None:
        timed = self.config.time_budget is not None
        done = self._resume_structures()
        if timed and self.clock.left < self._reserve() + 5.0:
            return
        teacher = self.dense
        if self.teacher is not self.task.model:
            teacher = build_module(*read_model(self.teacher, self.task.example_inputs))
        taught = teach(teacher, self.task.split("train"), self.task.augmentation.flip, self.progress)
        self.trainer = Trainer(self.task, taught, self.config.seed, repeatable=not timed)
        self.recipes = RecipeStudy(self.storage, self.space.distillation, self.config.seed)
        for structure in self.structures.values():
            self._export(structure, None)
        available = max(0.0, self.clock.left - self._reserve()) if timed else math.inf
        slots = STRUCTURES if not timed else int(np.clip(available / SLOT_S, 3, 9))
        slots, promotions = max(0, slots - done[1]), max(0, PROMOTED - done[2])
        first_share = FIRST_RUNG_SHARE if promotions else 1.0
        first_s = first_share * available / max(slots, 1) if timed else None
        students = self._students(first_s)
        self.progress.stage("recover", slots + promotions)
        for index in range(slots):
            if timed and self.clock.left < self._reserve() + 3.0:
                break
            # Students come after the first stitched structures: a short run ends with something good either way.
            take = students and index >= min(2, slots - len(students))
            entrant = students.pop(0) if take else self._next_structure()
            if entrant is None:
                break
            self._climb(entrant, rung=1, steps=STEPS_FIRST, seconds=first_s)
        available = max(0.0, self.clock.left - self._reserve()) if timed else math.inf
        second_s = available / max(promotions, 1) if timed else None
        for _ in range(promotions):
            if timed and self.clock.left < self._reserve() + 3.0:
                break
            best = self._promoted()
            if best is None:
                break
            self._climb(best, rung=2, steps=STEPS_SECOND, seconds=second_s)

    def _resume_structures(self) -> dict[int, int]:
        """Takes up the recoveries of an interrupted run; gives how many there were at each rung."""
        count = {1: 0, 2: 0}
        files = sorted((self.run / ".work" / "recovered").glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
        for path in files:
            stored = load_recovered(path)
            if stored is None:
                path.unlink()
                continue
            recovered, climbed = stored
            base = self._base(climbed.plan.base)
            if base is None:
                continue
            structure = Structure(base, climbed.plan, climbed.divergence, recovered, climbed.rung)
            self.structures[structure.key] = structure
            count[climbed.rung] += 1
            if climbed.rung == 1 and climbed.divergence is not None:
                self.forecast.add(climbed.divergence, recovered.error - self.error)
        return count

    def _base(self, spec: Original | Student) -> Base | None:
        if isinstance(spec, Original):
            return self.original
        if spec not in self.bases:
            base = build_student(self.task, self.original, spec, self.cost_model, self.config.seed)
            if base is not None:
                base.skeleton.calibration = self.original.skeleton.calibration
            self.bases[spec] = base
        return self.bases[spec]

    def _students(self, seconds: float | None) -> list[Structure]:
        """Students that cannot be stitched: they have to be trained to be judged.

        Fresh weights need more than a short rung to show anything, and one such student tells whether they compete.
        """
        students = self.space.students
        found = []
        for spec in student_specs(self.task, students.widths, students.depths, students.init):
            if spec.init == "fresh" and seconds is not None and seconds < FRESH_MIN_S:
                continue
            base = self._base(spec)
            if base is None:
                continue
            structure = Structure(base, CompressionPlan(base=spec), None)
            if structure.key not in self.structures and self._variants(structure):
                found.append(structure)
            if spec.init == "fresh":
                break
        return found

    def _next_structure(self) -> Structure | None:
        """The stitched structure with the largest predicted gain in hypervolume after recovery."""
        known = set(self.structures)
        scored = [s for s in self.study.scored() if s.plan.shape_digest not in known]
        if not scored:
            return None
        predicted = self.forecast.predict(np.array([s.divergence for s in scored]))
        rows = [self._box(float(p), s.costs) for p, s in zip(predicted, scored, strict=True)]
        present = [self._box(*self._outcome(s)) for s in self.structures.values()]
        index, gain = best_gain(present, rows)
        if gain <= 0.0:
            return None
        chosen = scored[index]
        return Structure(self.original, chosen.plan, chosen.divergence)

    def _outcome(self, structure: Structure) -> tuple[float, dict[str, float]]:
        assert structure.recovered is not None
        plans = self._variants(structure) or [structure.plan]
        table = structure.base.skeleton.price([_priced(plan) for plan in plans])
        costs = {"latency_ms": float(table.latency_ms.min()), "size_bytes": float(table.size_bytes.min())}
        return structure.recovered.error - self.error, costs

    def _promoted(self) -> Structure | None:
        """The structure whose longer training promises the most: half of its remaining gap closed."""
        waiting = [s for s in self.structures.values() if s.rung == 1]
        if not waiting:
            return None
        present = [self._box(*self._outcome(s)) for s in self.structures.values()]
        rows = []
        for structure in waiting:
            gap, costs = self._outcome(structure)
            rows.append(self._box(0.5 * gap, costs))
        return waiting[best_gain(present, rows)[0]]

    def _variants(self, structure: Structure) -> list[CompressionPlan]:
        """The format assignments worth delivering, those over budget as predicted left out."""
        graph, skeleton = structure.base.graph, structure.base.skeleton
        default = formats_of(self.space)
        allowed = {layer.name: self.formats.get(layer.name, default) for layer in graph.compressible}
        found = variants(graph, skeleton, _priced(structure.plan), allowed)
        kept = []
        for plan in found:
            costs = prices(skeleton, plan)
            if all(costs[name] <= limit for name, limit in self.hard.items()):
                kept.append(plan.model_copy(update={"base": structure.base.spec}))
        return kept

    def _climb(self, structure: Structure, rung: int, steps: int, seconds: float | None) -> None:
        """Recovers a structure for one rung, then exports it in its number formats."""
        trial, recipe = self.recipes.ask() if rung == 1 else (None, self.recipes.best())
        graph, weights = self._start(structure)
        try:
            recovered = self.trainer.float_recovery(
                graph,
                weights,
                recipe,
                fresh=structure.base.fresh,
                steps=steps if seconds is None else MAX_STEPS,
                seconds=None if seconds is None else seconds * (1.0 - FORMATS_SHARE),
                progress=_Quiet(self.progress),
                before=structure.recovered,
            )
        except (FloatingPointError, RuntimeError) as error:
            logger.warning("recovery of %s failed: %s", structure.key, error)
            structure.rung = rung
            if trial is not None:
                self.recipes.tell(trial, None, structure.key)
            self.progress.advance()
            return
        path = self.run / ".work" / "recovered" / f"{structure.key}-{rung}.safetensors"
        save_recovered(recovered, Climbed(structure.plan, structure.divergence, rung), path)
        if trial is not None:
            self.recipes.tell(trial, self._open_share(structure, recovered), structure.key)
        if structure.divergence is not None and rung == 1:
            self.forecast.add(structure.divergence, recovered.error - self.error)
        structure.recovered, structure.rung = recovered, rung
        self.structures[structure.key] = structure
        self._export(structure, None if seconds is None else seconds * FORMATS_SHARE)
        self.progress.advance()
        logger.info(
            "rung %d of %s (%s): %d steps, validation error %.4f (original %.4f)",
            rung, structure.key, structure.base.spec.kind, recovered.steps, recovered.error, self.error,
        )  # fmt: skip

    def _export(self, structure: Structure, seconds: float | None) -> None:
        """Delivers a recovered structure in each of its number formats; those delivered before are left as they are."""
        recovered = structure.recovered
        assert recovered is not None
        timed = self.config.time_budget is not None
        names = []
        plans = self._variants(structure)
        low = max(1, sum(_low_bits(plan) for plan in plans))
        for plan in plans:
            recipe = recovered.recipe.model_copy(update={"steps": recovered.steps})
            plan = plan.model_copy(update={"recipe": recipe})
            name = self._name(plan)
            if name in self.delivery.points or name in self.delivery.failures:
                continue
            compressed = self.trainer.to_formats(
                recovered,
                plan,
                steps=MAX_STEPS if timed and seconds is not None else STEPS_FORMATS,
                seconds=seconds / low if seconds is not None else None,
                progress=_Quiet(self.progress),
            )
            self._deliver(structure.base, plan, compressed)
            names.append(name)
        if names:
            self.delivery.measure(names, MEASURE_S)
            front = self._publish("running")
            self.progress.note(front=front, hypervolume=front.search.hypervolume)
            self._note_time()

    def _open_share(self, structure: Structure, recovered: Recovered) -> float:
        """The quality gap that stays, against the one expected for this structure: comparable between structures."""
        gap = max(recovered.error - self.error, 0.0)
        if structure.divergence is None:
            return gap / 0.02
        expected = float(self.forecast.predict(np.array([structure.divergence]))[0])
        return gap / max(expected, 1e-3)

    def _start(self, structure: Structure) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """Graph and float weights a recovery begins with."""
        if not structure.base.stitched:
            return structure.base.graph, structure.base.weights
        floats = {layer.name: LayerPlan(storage=FLOAT32) for layer in self.original.graph.compressible}
        plan = CompressionPlan(groups=structure.plan.groups, layers=floats)
        compressed = self.evaluator.build(complete(self.original.graph, plan))
        return compressed.graph, compressed.weights

    # ------------------------------------------------------------------------------------------------- delivery

    def _deliver(self, base: Base, plan: CompressionPlan, compressed: Any) -> None:
        self.delivery.add(self._name(plan), compressed, self._estimate(base, plan))

    def _estimate(self, base: Base, plan: CompressionPlan) -> Estimate:
        return base.skeleton.estimate(_priced(plan))

    def _name(self, plan: CompressionPlan) -> str:
        return f"p{plan.digest[:7]}"

    def _reserve(self) -> float:
        """Seconds the last measurement will take: every model that may stand on the front once more."""
        points, _ = self.delivery.select()
        return 2.0 + (FINAL_MEASURE_S + 0.2) * (len(points) + 4)

    def _finish(self) -> None:
        """Times all that could stand on the front together, so that the figures of one table are comparable."""
        points, _ = self.delivery.select()
        self.delivery.measure([*(p.id for p in points), UNIFORM_INT8], FINAL_MEASURE_S, self.progress)

    def _note_time(self) -> None:
        if math.isfinite(self.clock.left):
            self.progress.note(seconds_left=max(0.0, self.clock.left))

    def _publish(self, status: Literal["running", "complete"]) -> Front:
        self.clock.save()
        return self.delivery.publish(status, self.trials, self.clock.spent, self.stages)


class _Stage:
    """Adds the time of a stage to the run's account."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        stages = self.engine.stages
        stages[self.name] = stages.get(self.name, 0.0) + time.monotonic() - self.started
        self.engine.clock.save()


class _Quiet:
    """Lets training steps pass without moving the bar of the stage they belong to."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, total: int | None = None) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        return None

    def note(self, **values: object) -> None:
        self._progress.note(**values)


def prices(skeleton: Skeleton, plan: CompressionPlan) -> dict[str, float]:
    """The predicted costs of one plan of the skeleton's graph, by objective name."""
    table = skeleton.price([plan])
    return {
        "latency_ms": float(table.latency_ms[0]),
        "size_bytes": float(table.size_bytes[0]),
        "peak_memory_bytes": float(table.peak_memory_bytes[0]),
        "macs": float(table.macs[0]),
    }


def _low_bits(plan: CompressionPlan) -> bool:
    return any(f.storage.scheme == "affine" and f.storage.bits < 8 for f in plan.layers.values())


def _priced(plan: CompressionPlan) -> CompressionPlan:
    """A plan as its base's own skeleton prices it."""
    return plan.model_copy(update={"base": Original()}) if isinstance(plan.base, Student) else plan
