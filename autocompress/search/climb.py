"""The recovery rungs: which structures are trained, for how long, and in which formats they are delivered."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autocompress.graph.blocks import drop_blocks, find_blocks
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.distillation import teach
from autocompress.methods.rounding import FINE_BITS
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Original, Recipe, Student
from autocompress.search.bases import Base, build_student, student_specs
from autocompress.search.context import Context, name_of, priced, prices
from autocompress.search.elastic import ElasticStage, Judged, Structures, shared_weights_of
from autocompress.search.failures import reason_of
from autocompress.search.gains import Outcome
from autocompress.search.ladder import RecipeStudy, RecoveryForecast, without_labels
from autocompress.search.menu import complete, keep_counts
from autocompress.search.quiet import Quiet
from autocompress.search.recover import Climbed, Recovered, Source, Trainer, load_recovered, save_recovered
from autocompress.search.rungs import RungLog, RungRow
from autocompress.search.study import Scored
from autocompress.search.variants import variants

logger = logging.getLogger(__name__)

FIRST_RUNG_SHARE = 0.5
"""Share of recovery that goes to a first, short training of many structures; the rest goes to the best of them."""

FORMATS_SHARE = 0.25
"""Share of a rung's time that trains with number formats simulated."""

TRAINING_SHARE = 0.85
"""Share of a structure's time that trains; the rest exports, scores and times its models."""

SLOT_S = 10.0
"""Seconds of recovery for each structure that enters, both rungs counted."""

MOST_STRUCTURES = 8
STUDENT_SHARE = 0.6
FRESH_MIN_S = 25.0
PROMOTED = 3
ELASTIC_SHARE, ELASTIC_LEAST_S = 0.2, 120.0
"""Share of recovery that trains shared weights, and the seconds below which (and without a time budget) none are."""

JUDGING_SHARE, MOST_JUDGED = 0.3, 300
"""Time for judging structures by shared weights, relative to training them, and how many at most."""

STEPS_FIRST, STEPS_SECOND, STEPS_FORMATS, STRUCTURES = 150, 300, 60, 4
"""Without a time budget: steps at each rung, with formats simulated, and how many structures enter."""

MEASURE_S, FINAL_MEASURE_S = 0.4, 0.8
MAX_STEPS = 10**9


@dataclass
class Structure:
    """A set of widths on its way up the ladder.

    ``divergence`` is that of what training starts from, and ``source`` what that is: stitched from the database, or cut
    from shared weights; None where nothing could be evaluated.
    """

    base: Base
    plan: CompressionPlan
    divergence: float | None
    recovered: Recovered | None = None
    rung: int = 0
    source: Source = "database"

    @property
    def key(self) -> str:
        return self.plan.shape_digest

    @property
    def id(self) -> str:
        """What tables call it."""
        return id_of(self.key)

    @property
    def kind(self) -> str:
        """What it starts from: the original, a student, or one with fresh weights."""
        return "fresh" if self.base.fresh else self.base.spec.kind


def id_of(key: str) -> str:
    """What tables call a structure, of whose key they show the beginning."""
    return f"s{key[:7]}"


@dataclass(frozen=True)
class Done:
    """How many structures this leg of a run has recovered, and how many trainings it has gone on with."""

    entered: int
    promoted: int


class Climber:
    """Recovers the structures of one run.

    Args:
        context: of the run.
        scored: the stitched candidates.
    """

    def __init__(self, context: Context, scored: list[Scored]) -> None:
        self.context, self.scored = context, scored
        self.structures: dict[str, Structure] = {}
        self.forecasts: dict[Source, RecoveryForecast] = {"database": RecoveryForecast(), "shared": RecoveryForecast()}
        self.shared: ElasticStage | None = None
        self.judged: list[Judged] = []
        self.rungs = RungLog(context.run)
        self._bases: dict[Student, Base | None] = {}
        self._harms: dict[str, float] = {}

    def climb(self) -> None:
        """Runs both rungs within the time there is; what an interrupted run had recovered is taken up."""
        context = self.context
        done = self._take_up()
        self.rungs.write()
        if context.timed and context.clock.left < self.reserve() + 5.0:
            return
        teacher = context.dense
        if context.teacher is not context.task.model:
            teacher = build_module(*read_model(context.teacher, context.task.example_inputs))
        taught = teach(teacher, context.task.split("train"), context.task.augmentation.flip, context.progress)
        self.trainer = Trainer(context.task, taught, context.config.seed, repeatable=not context.timed)
        settings = context.space.distillation
        if context.task.split("train").labels is None:
            settings = without_labels(settings)
        self.recipes = RecipeStudy(context.storage, settings, context.config.seed)
        for structure in self.structures.values():
            if not self._time_left():
                return
            self._export(structure, None)
        self._share_weights()
        available = self._available()
        slots = int(np.clip(available / SLOT_S, 3, MOST_STRUCTURES)) if context.timed else STRUCTURES
        slots, promotions = max(0, slots - done.entered), max(0, PROMOTED - done.promoted)
        share = FIRST_RUNG_SHARE if promotions else 1.0
        first_end = context.clock.spent + share * available
        students = self._students(share * available / max(slots, 1) if context.timed else None)
        context.progress.stage("recover", slots + promotions)
        quota = round(slots * STUDENT_SHARE)
        for index in range(slots):
            if not self._time_left():
                break
            if index == slots - 1 and slots > 2 and self._reaches_far:
                entrant = self._cheapest(students)
            elif quota and students and (index % 2 == 1 or index >= slots - 1 - quota):
                # In turn with stitched structures, so that a short run ends with something good either way.
                entrant, quota = students.pop(0), quota - 1
            else:
                entrant = self._next()
            if entrant is None:
                break
            self._recover(entrant, 1, STEPS_FIRST, self._seconds(first_end - context.clock.spent, slots - index))
        for index in range(promotions):
            best = self._promoted() if self._time_left() else None
            if best is None:
                break
            self._recover(best, best.rung + 1, STEPS_SECOND, self._seconds(self._available(), promotions - index))

    def _seconds(self, left: float, remaining: int) -> float | None:
        """Training seconds for the next structure of a rung: its part of the time left, delivery allowed for."""
        if not self.context.timed:
            return None
        return max(1.0, min(TRAINING_SHARE * left / remaining, self._available()))

    def reserve(self) -> float:
        """Seconds the last measurement will take: every model that may stand on the front once more."""
        points, _ = self.context.delivery.select()
        return 2.0 + (FINAL_MEASURE_S + 0.2) * (len(points) + 4)

    def _available(self) -> float:
        return max(0.0, self.context.clock.left - self.reserve())

    def _time_left(self) -> bool:
        return not self.context.timed or self.context.clock.left > self.reserve() + 3.0

    @property
    def _reaches_far(self) -> bool:
        """Whether the front should show how far the model can go: once, and only where quality is traded off."""
        gains = self.context.gains
        return self.context.clock.leg == 1 and gains.quality and bool(gains.axes)

    def _take_up(self) -> Done:
        """Takes up the recoveries that there are; gives how many of them this leg of the run has made."""
        entered = promoted = 0
        folder = self.context.run / ".work" / "recovered"
        for path in sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns):
            stored = load_recovered(path)
            if stored is None:
                path.unlink()
                continue
            recovered, climbed = stored
            base = self._base(climbed.plan.base)
            if base is None:
                continue
            structure = Structure(
                base, climbed.plan, climbed.divergence, recovered, climbed.rung, source=climbed.source
            )
            known = self.structures.get(structure.key)
            if known is None or known.rung <= structure.rung:
                self.structures[structure.key] = structure
            if climbed.leg == self.context.clock.leg:
                entered += climbed.rung == 1
                promoted += climbed.rung > 1
            if climbed.rung == 1 and climbed.divergence is not None:
                self.forecasts[climbed.source].add(climbed.divergence, recovered.error - self.context.error)
        return Done(entered, promoted)

    # ------------------------------------------------------------------------------------------- shared weights

    def _share_weights(self) -> None:
        """Trains weights that all structures share and judges many by them, where there is time and it pays."""
        context = self.context
        if not context.timed:
            return
        seconds = ELASTIC_SHARE * self._available()
        if seconds < ELASTIC_LEAST_S and not shared_weights_of(context.run).is_file():
            return
        blocks = sorted((block.name for block in find_blocks(context.original.graph)), key=self._harm)
        structures = Structures(context, blocks, self._base)
        if not (structures.options or blocks):
            return
        stage = ElasticStage(context, structures, self.trainer)
        try:
            with context.delivery.stages.of("shared weights"):
                context.progress.stage("shared weights")
                stage.train(MAX_STEPS, seconds)
                if not stage.pays():
                    return
                self.judged = stage.search(MOST_JUDGED, JUDGING_SHARE * seconds)
        except ArithmeticError as error:
            context.delivery.fail("shared-weights", error)
            return
        self.shared = stage

    # ------------------------------------------------------------------------------------------- who comes next

    def _base(self, spec: Original | Student) -> Base | None:
        if isinstance(spec, Original):
            return self.context.original
        if spec not in self._bases:
            context = self.context
            try:
                self._bases[spec] = build_student(
                    context.task, context.original, spec, context.cost_model, context.config.seed
                )
            except Exception as error:  # The caller's own factory may do anything.
                self._bases[spec] = None
                context.delivery.fail(f"student-{spec.init}-{spec.width:g}-{spec.depth:g}", error)
        return self._bases[spec]

    def _students(self, seconds: float | None) -> list[Structure]:
        """Shallower and fresh models, in the order they should be tried.

        Fresh weights need more than a short rung to show anything, and one such student tells whether they compete.
        """
        offered = self.context.space.students
        graph = self.context.original.graph
        found = []
        for spec in student_specs(graph, self._harm, offered.widths, offered.depths, offered.init):
            if spec.init == "inherit" and self.shared is not None:
                continue  # shallower structures were judged with all others
            if spec.init == "fresh" and seconds is not None and seconds < FRESH_MIN_S:
                continue
            base = self._base(spec)
            if base is None:
                continue
            groups = {}
            if spec.init == "inherit" and spec.width < 1.0:
                groups = {group.id: keep_counts(group.size, [spec.width])[0] for group in base.graph.groups}
            structure = Structure(base, CompressionPlan(base=spec, groups=groups), None)
            known = structure.key in self.structures or self._has_failed(structure.key, 1)
            if not known and self._variants(structure):
                found.append(structure)
            if spec.init == "fresh":
                break
        return found

    def _harm(self, block: str) -> float:
        """The divergence of the original without one residual block."""
        if block not in self._harms:
            graph = drop_blocks(self.context.original.graph, [block])
            weights = self.context.evaluator.database.weights
            self._harms[block] = self.context.evaluator.divergence_of(build_module(graph, weights))
        return self._harms[block]

    def _next(self) -> Structure | None:
        """The structure with the largest predicted gain in hypervolume after recovery."""
        waiting = self._waiting()
        if not waiting:
            return None
        promised = [Outcome(self._forecast(structure), costs) for structure, costs in waiting]
        gains = self.context.gains
        index, gain = gains.best([self._outcome(s) for s in self.structures.values()], promised)
        if gain <= 0.0 and gains.axes:
            # With quality alone to win, the next best guess is worth a try: forecasts err.
            return None
        return waiting[index][0]

    def _waiting(self) -> list[tuple[Structure, Mapping[str, float]]]:
        """Structures that were judged and not trained yet, with their least predicted costs; each once."""
        found: dict[str, tuple[Structure, Mapping[str, float]]] = {}
        for j in self.judged:
            found[j.plan.shape_digest] = Structure(j.base, j.plan, j.divergence, source="shared"), j.costs
        for s in self.scored:
            structure = Structure(self.context.original, s.plan, s.divergence)
            found.setdefault(f"{structure.key}-{s.number}", (structure, s.costs))
        cut = {structure.key for structure, _ in found.values() if structure.source == "shared"}
        return [
            (structure, costs)
            for structure, costs in found.values()
            if structure.key not in self.structures
            and not self._has_failed(structure.key, 1)
            and (structure.source == "shared" or structure.key not in cut)
        ]

    def _forecast(self, structure: Structure) -> float:
        """The quality a judged structure is expected to lose, once it is recovered."""
        assert structure.divergence is not None
        return float(self.forecasts[structure.source].predict(np.array([structure.divergence]))[0])

    def _has_failed(self, key: str, rung: int) -> bool:
        """Whether the recovery of a structure failed at a rung, in this process or an interrupted one."""
        return f"{id_of(key)}-rung{rung}" in self.context.delivery.failures

    def _cheapest(self, students: list[Structure]) -> Structure | None:
        """The structure that costs least (time, by default): a front should show how far the model can go."""

        def cost(structure: Structure) -> float:
            plans = self._variants(structure) or [structure.plan]
            table = structure.base.skeleton.price([priced(plan) for plan in plans])
            return float(np.min(getattr(table, self.context.costs[0])))

        candidates = [s for s in students if not s.base.fresh]
        waiting = self._waiting()
        if waiting:
            candidates.append(min(waiting, key=lambda item: [item[1][name] for name in self.context.costs])[0])
        return min(candidates, key=cost, default=None)

    def _outcome(self, structure: Structure) -> Outcome:
        assert structure.recovered is not None
        plans = self._variants(structure) or [structure.plan]
        table = structure.base.skeleton.price([priced(plan) for plan in plans])
        costs = {name: float(np.min(getattr(table, name))) for name in self.context.costs}
        return Outcome(structure.recovered.error - self.context.error, costs)

    def _promoted(self) -> Structure | None:
        """The structure whose longer training promises the most.

        Each time that a search is given more time, structures may go one rung further up than before.
        """
        waiting = [
            s
            for s in self.structures.values()
            if 1 <= s.rung <= self.context.clock.leg and not self._has_failed(s.key, s.rung + 1)
        ]
        if not waiting:
            return None
        present = [self._outcome(s) for s in self.structures.values()]
        promised = []
        for structure in waiting:
            outcome = self._outcome(structure)
            promised.append(Outcome(_promised(structure.rung) * outcome.drop, outcome.costs))
        return waiting[self.context.gains.best(present, promised)[0]]

    # -------------------------------------------------------------------------------------------------- training

    def _recover(self, structure: Structure, rung: int, steps: int, seconds: float | None) -> None:
        """Recovers a structure for one rung, then delivers it in its number formats."""
        context = self.context
        trial, recipe = self.recipes.ask() if rung == 1 else (None, self.recipes.best())
        expected = self._expected_error(structure)
        try:
            graph, weights = self._start(structure)
            recovered = self.trainer.float_recovery(
                graph,
                weights,
                recipe,
                fresh=structure.base.fresh,
                steps=steps if seconds is None else MAX_STEPS,
                seconds=None if seconds is None else seconds * (1.0 - FORMATS_SHARE),
                progress=Quiet(context.progress),
                before=structure.recovered,
            )
        except OSError:
            raise
        except Exception as error:
            # Whatever it is, it is this structure's: the others are recovered all the same.
            context.delivery.fail(f"{structure.id}-rung{rung}", error)
            if trial is not None:
                self.recipes.tell(trial, None, structure.key, reason_of(error))
            self.rungs.add(self._row(structure, rung, recipe, expected, None, reason_of(error)))
            context.progress.advance()
            return
        path = context.run / ".work" / "recovered" / f"{structure.key}-{rung}.safetensors"
        climbed = Climbed(structure.plan, structure.divergence, rung, context.clock.leg, structure.source)
        save_recovered(recovered, climbed, path)
        if trial is not None:
            self.recipes.tell(trial, self._open_share(structure, recovered), structure.key)
        if structure.divergence is not None and rung == 1:
            self.forecasts[structure.source].add(structure.divergence, recovered.error - context.error)
        structure.recovered, structure.rung = recovered, rung
        self.structures[structure.key] = structure
        self.rungs.add(self._row(structure, rung, recipe, expected, recovered))
        self._export(structure, None if seconds is None else seconds * FORMATS_SHARE)
        context.progress.advance()
        spec = structure.base.spec
        logger.info(
            "rung %d of %s (%s): %d steps, validation error %.4f (original %.4f)",
            rung, structure.key, spec.kind if spec.kind == "original" else spec, recovered.steps, recovered.error,
            context.error,
        )  # fmt: skip

    def _expected_error(self, structure: Structure) -> float | None:
        """The validation error a structure is chosen for: of a first rung by the forecast, of a second by the first."""
        base = self.context.error
        if structure.recovered is not None:
            return base + _promised(structure.rung) * (structure.recovered.error - base)
        if structure.divergence is None:
            return None
        return base + self._forecast(structure)

    def _row(
        self,
        structure: Structure,
        rung: int,
        recipe: Recipe,
        expected: float | None,
        recovered: Recovered | None,
        failure: str = "",
    ) -> RungRow:
        """What ``ladder.csv`` says of a structure at a rung."""
        plans = self._variants(structure) or [structure.plan]
        table = structure.base.skeleton.price([priced(plan) for plan in plans])
        return RungRow(
            id=structure.id,
            rung=rung,
            base=structure.kind,
            macs=int(np.min(table.macs)),
            latency_ms=float(np.min(table.latency_ms)),
            divergence=structure.divergence,
            forecast_error=expected,
            error=recovered.error if recovered else None,
            steps=recovered.steps if recovered else 0,
            seconds=round(recovered.seconds, 3) if recovered else 0.0,
            alpha=recipe.alpha,
            temperature=recipe.temperature,
            feature_weight=recipe.feature_weight,
            learning_rate=recipe.learning_rate,
            failure=failure,
        )

    def _start(self, structure: Structure) -> tuple[ModelGraph, Mapping[str, torch.Tensor]]:
        """Graph and float weights a recovery begins with."""
        base, original = structure.base, self.context.original
        if structure.source == "shared" and self.shared is not None:
            return self.shared.cut(structure.plan)
        if base.weights is not None and base is not original:
            return base.graph, base.weights
        floats = {layer.name: LayerPlan() for layer in original.graph.compressible}
        plan = CompressionPlan(groups=structure.plan.groups, layers=floats)
        compressed = self.context.evaluator.build(complete(original.graph, plan))
        if isinstance(base.spec, Student):
            graph = drop_blocks(compressed.graph, base.spec.dropped)
            return graph, {name: compressed.weights[name] for name in graph.weight_names()}
        return compressed.graph, compressed.weights

    def _open_share(self, structure: Structure, recovered: Recovered) -> float:
        """The quality gap that stays, against the one expected for this structure: comparable between structures."""
        gap = max(recovered.error - self.context.error, 0.0)
        if structure.divergence is None:
            return gap / 0.02
        return gap / max(self._forecast(structure), 1e-3)

    # -------------------------------------------------------------------------------------------------- delivery

    def _variants(self, structure: Structure) -> list[CompressionPlan]:
        """The format assignments worth delivering, those over budget as predicted left out."""
        graph, skeleton = structure.base.graph, structure.base.skeleton
        default, formats = self.context.menu.formats, self.context.formats
        allowed = {layer.name: formats.get(layer.name, default) for layer in graph.compressible}
        kept = []
        for plan in variants(graph, skeleton, priced(structure.plan), allowed):
            costs = prices(skeleton, plan)
            if all(costs[name] <= limit for name, limit in self.context.hard.items()):
                kept.append(plan.model_copy(update={"base": structure.base.spec}))
        return kept

    def _export(self, structure: Structure, seconds: float | None) -> None:
        """Delivers a recovered structure in each of its number formats; those delivered before are left as they are."""
        context, recovered = self.context, structure.recovered
        assert recovered is not None
        names = []
        plans = self._variants(structure)
        low = max(1, sum(_low_bits(plan) for plan in plans))
        for plan in plans:
            recipe = recovered.recipe.model_copy(update={"steps": recovered.steps})
            plan = plan.model_copy(update={"recipe": recipe})
            name = name_of(plan)
            if name in context.delivery.points or name in context.delivery.failures:
                continue

            def make(plan: CompressionPlan = plan) -> CompressedModel:
                with context.delivery.stages.of("formats"):
                    return self.trainer.to_formats(
                        recovered,
                        plan,
                        steps=STEPS_FORMATS if seconds is None else MAX_STEPS,
                        seconds=None if seconds is None else seconds / low,
                        progress=Quiet(context.progress),
                    )

            if context.delivery.add(name, make, structure.base.skeleton.estimate(priced(plan))):
                names.append(name)
        if names:
            context.delivery.measure(names, MEASURE_S)
            front = context.publish()
            self._learn(names)
            context.progress.note(front=front, hypervolume=front.search.hypervolume)
            context.note_time()

    def _learn(self, names: Sequence[str]) -> None:
        """Prices follow what the delivered models were measured at; students are priced like the original."""
        context = self.context
        if context.learn(names):
            for base in self._bases.values():
                if base is not None:
                    base.skeleton.adopt(context.original.skeleton)
            self.scored = context.repriced(self.scored)


def _low_bits(plan: CompressionPlan) -> bool:
    return any(f.storage.scheme == "affine" and f.storage.bits < FINE_BITS for f in plan.layers.values())


def _promised(rung: int) -> float:
    """The share of its gap that a structure is expected to keep when it goes one rung up: half of it at first."""
    return 1.0 - 0.5 / rung
