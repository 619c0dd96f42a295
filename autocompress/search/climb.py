"""The recovery rungs: structures are trained turn by turn, and delivered in their number formats."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

import numpy as np
import optuna
import torch

from autocompress.devices import CPU, resolve_device
from autocompress.errors import UsageError
from autocompress.graph.blocks import drop_blocks
from autocompress.graph.executor import GraphModule, build_module
from autocompress.graph.read import read_model
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.distillation import TeacherData, teach
from autocompress.methods.rounding import FINE_BITS
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Recipe
from autocompress.progress import Progress
from autocompress.search.context import Context, name_of, priced, prices
from autocompress.search.deliver import ORIGINAL
from autocompress.search.failures import reason_of
from autocompress.search.menu import complete
from autocompress.search.narrowing import narrowed
from autocompress.search.quiet import Quiet
from autocompress.search.recipes import FormatsStudy, RecipeStudy, without_labels
from autocompress.search.recover import Climbed, Recovered, Trainer, load_recovered, save_recovered
from autocompress.search.rungs import RungLog, RungRow
from autocompress.search.structures import Bases, Structure, fresh_students, reprice, stitched, structures_of, students
from autocompress.search.study import Scored
from autocompress.search.together import at_once, together
from autocompress.search.turns import ENTRANTS, PROMOTED, Turn, Turns
from autocompress.search.variants import variants
from autocompress.tasks.splits import TensorSplit

logger = logging.getLogger(__name__)

FIRST_RUNGS, TYPICAL_WORK = 60, 0.3
"""A first rung of a structure whose steps take ``TYPICAL_WORK`` of the original's takes this part of recovery; every
further one takes ``turns.GROWTH`` times as long as the one before it."""

FIRST_LEAST, FIRST_ENOUGH, FIRST_MOST = 120, 300, 2000
"""Steps of a first rung.  With fewer than ``FIRST_ENOUGH`` chance tells structures apart, so a rung takes as many where
that is at most ``LARGEST_FIRST`` times its part of recovery."""

LARGEST_FIRST = 4.0

FORMATS_SHARE = 0.25
"""Share of a rung's time that trains with number formats simulated, where there are formats that need it."""

LOW_BITS, FINE_FIRST = 2, True
"""Such formats that a structure is delivered in, at most; in timed runs none after a first rung, unless all within
budget are such."""

LESSONS_FIRST_S, LESSONS_SHARE = 3.0, 0.1
"""Seconds for the teacher's first answers, and its share of a rung's time until it has answered for all samples."""

FRESH_LEAST = 500
"""Steps of a first rung below which fresh weights would show nothing."""

STEPS_FIRST, STEPS_SECOND, STEPS_FORMATS = 150, 300, 60
"""Without a time budget: steps of a first rung, of a later one and with formats simulated."""

MEASURE_S, FINAL_MEASURE_S = 0.25, 0.8
MAX_STEPS = 10**9


@dataclass(frozen=True)
class Model:
    """A structure in the formats of a plan, or why it could not be made."""

    structure: Structure
    plan: CompressionPlan
    made: CompressedModel | Exception

    def get(self) -> CompressedModel:
        """The model; raises what was raised when it was made."""
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


@dataclass(frozen=True)
class Trained:
    """What a turn came to: float weights, and the model (or why there is none) of each format that is delivered."""

    recovered: Recovered
    models: Sequence[Model]


@dataclass(frozen=True)
class Asked:
    """What Optuna chose for a turn: a recipe, and whether low-bit formats are simulated; with the trials to be told."""

    recipe: Recipe
    qat: bool
    recipe_trial: optuna.Trial | None
    qat_trial: optuna.Trial | None


class Climber:
    """Recovers the structures of one run.

    Each turn is the one that promises the most hypervolume for its time: a structure that was judged as stitched, a
    shallower student that was not, or a longer training of what was recovered (successive halving without rounds, as
    in 1810.05934).

    Args:
        context: of the run.
        scored: the stitched candidates.
    """

    def __init__(self, context: Context, scored: list[Scored]) -> None:
        self.context = context
        self.turns, self.bases = Turns(context), Bases(context)
        self.rungs = RungLog(context.run)
        self.turns.waiting = stitched(context, scored)

    def climb(self) -> None:
        """Takes turns within the time there is; what an interrupted run had recovered is taken up."""
        context, turns = self.context, self.turns
        self._take_up()
        self.rungs.write()
        if context.timed and context.clock.left < self.reserve() + 5.0:
            return
        self._prepare()
        formats, quiet = context.space.distillation, Quiet(context.progress)
        for structure in turns.recovered.values():
            if not self._time_left():
                return
            self._deliver(self._models(structure, True in formats.qat, self._formats_seconds(structure), quiet))
        count = 1
        if context.timed:
            weights = context.evaluator.database.weights
            count, seconds = at_once(lambda: self.trainer.step_seconds(context.dense.graph, weights))
            turns.step_s.append(seconds)
        turns.waiting += students(context, self.bases)
        first = self._first_steps()
        if first >= FRESH_LEAST or not context.timed:
            # One tells whether they compete.
            turns.waiting += fresh_students(context, self.bases)[:1]
        forms = (form for options in context.formats.values() for form in options)
        share = FORMATS_SHARE if True in formats.qat and any(_few_bits(form) for form in forms) else 0.0
        context.progress.stage("recover", None if context.timed else ENTRANTS + PROMOTED)
        while self._time_left():
            chosen = turns.next(first, count, self._available(), share)
            if not chosen:
                break
            self._take(chosen)

    def _first_steps(self) -> int:
        """Steps of a first rung."""
        if not self.context.timed:
            return STEPS_FIRST
        steps = self._available() / FIRST_RUNGS / (TYPICAL_WORK * self.turns.step_s[0])
        return int(np.clip(max(steps, min(FIRST_ENOUGH, LARGEST_FIRST * steps)), FIRST_LEAST, FIRST_MOST))

    def _prepare(self) -> None:
        """The teacher's answers and the study of recipes."""
        context = self.context
        teacher = context.dense
        if context.teacher is not context.task.model:
            teacher = build_module(*read_model(context.teacher, context.task.example_inputs))
        train = context.task.split("train")
        device = resolve_device(context.config.device, repeatable=not context.timed)
        try:
            taught = self._taught(teacher, train, device)
        except RuntimeError as error:
            if device == CPU:
                raise
            if context.config.device != "auto":
                raise UsageError(
                    f"{context.config.origin('device')}: recovery fails on {device} ({reason_of(error)}); use cpu"
                ) from error
            logger.warning("recovery trains on the CPU, for it fails on %s: %s", device, reason_of(error))
            device = CPU
            taught = self._taught(teacher, train, device)
        self.trainer = Trainer(context.task, taught, context.config.seed, repeatable=not context.timed, device=device)
        settings = context.space.distillation
        if train.labels is None:
            settings = without_labels(settings)
        self.recipes = RecipeStudy(context.storage, settings, context.config.seed, context.study_prefix)
        self.formats = FormatsStudy(context.storage, settings, context.config.seed, context.study_prefix)

    def _taught(self, teacher: GraphModule, train: TensorSplit, device: torch.device) -> TeacherData:
        """The teacher's first answers, or all where steps are counted; shows, too, that the loss computes there."""
        task, timed = self.context.task, self.context.timed
        seconds = LESSONS_FIRST_S if timed else None
        taught = teach(teacher, train, task.augmentation.flip, self.context.progress, seconds, device)
        if train.labels is not None and device != CPU:
            task.loss(taught.logits[:2].to(device), train.labels[:2].to(device))
        return taught

    def reserve(self) -> float:
        """Seconds for the end: what may stand on the front is timed once more and scored on the test split."""
        delivery = self.context.delivery
        names = [ORIGINAL, *(point.id for point in delivery.select()[0])]
        return 2.0 + (FINAL_MEASURE_S + 0.2) * (len(names) + 3) + delivery.scoring_seconds(names)

    def _available(self) -> float:
        return max(0.0, self.context.clock.left - self.reserve())

    def _formats_seconds(self, structure: Structure) -> float | None:
        """Seconds for training what was taken up with formats simulated; None where steps are counted."""
        if not self.context.timed or structure.recovered is None:
            return None
        return min(FORMATS_SHARE * structure.recovered.seconds, 0.25 * self._available())

    def _time_left(self) -> bool:
        return not self.context.timed or self.context.clock.left > self.reserve() + 3.0

    def _take_up(self) -> None:
        """Takes up the recoveries that there are, and notes how many of them this leg of the run has made."""
        folder = self.context.run / ".work" / "recovered"
        for path in sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns):
            stored = load_recovered(path)
            if stored is None:
                continue
            recovered, climbed = stored
            base = self.bases(climbed.plan.base)
            if base is None:
                continue
            (structure,) = structures_of(self.context, base, [climbed.plan])
            structure.divergence, structure.recovered, structure.rung = climbed.divergence, recovered, climbed.rung
            known = self.turns.recovered.get(structure.key)
            if known is None or known.rung <= structure.rung:
                self.turns.recovered[structure.key] = structure
            if climbed.leg == self.context.clock.leg:
                self.turns.entered += climbed.rung == 1
                self.turns.promoted += climbed.rung > 1
            self.turns.observe(structure, recovered, climbed.rung)

    # -------------------------------------------------------------------------------------------------- training

    def _take(self, turns: Sequence[Turn]) -> None:
        """Recovers structures for one rung, side by side, then delivers each in its number formats."""
        context, began = self.context, monotonic()
        seconds = None
        if context.timed:
            seconds = min(max(turn.seconds or 0.0 for turn in turns), self._available())
            with context.delivery.stages.of("teacher"):
                self.trainer.teacher.extend(LESSONS_SHARE * seconds)
            seconds = min(seconds, self._available())
        asked = [self._ask(turn) for turn in turns]
        jobs = [partial(self._train, turn, given, seconds) for turn, given in zip(turns, asked, strict=True)]
        results = together(jobs, context.progress)
        models: list[Model] = []
        for turn, given, result in zip(turns, asked, results, strict=True):
            models += self._note(turn, given, result)
        self._deliver(models)
        for turn, given in zip(turns, asked, strict=True):
            if given.qat_trial is not None:
                names = [name_of(m.plan) for m in models if m.structure.key == turn.structure.key and _low_bits(m.plan)]
                self.formats.tell(given.qat_trial, self._open_after(turn, names), turn.structure.key)
        self.turns.delivery_s.append(monotonic() - began - (seconds or 0.0))

    def _ask(self, turn: Turn) -> Asked:
        trial, recipe = self.recipes.ask() if turn.rung == 1 else (None, self.recipes.best())
        low_bits = [_low_bits(plan) for plan in self._variants(turn.structure)]
        fine_first = FINE_FIRST and self.context.timed and turn.rung == 1
        if not low_bits or not (all(low_bits) if fine_first else any(low_bits)):
            return Asked(recipe, False, trial, None)
        qat_trial, qat = self.formats.ask()
        return Asked(recipe, qat, trial, qat_trial)

    def _train(self, turn: Turn, asked: Asked, seconds: float | None, progress: Progress) -> Trained:
        structure = turn.structure
        simulated = FORMATS_SHARE if asked.qat else 0.0
        graph, weights = self._start(structure)
        recovered = self.trainer.float_recovery(
            graph,
            weights,
            asked.recipe,
            fresh=structure.base.fresh,
            steps=(STEPS_FIRST if turn.rung == 1 else STEPS_SECOND) if seconds is None else MAX_STEPS,
            seconds=None if seconds is None else seconds * (1.0 - simulated),
            progress=progress,
            before=structure.recovered,
        )
        before = structure.recovered
        if before is not None and before.error <= recovered.error:
            # Going on from the peak of the learning rate can lose more than a rung wins.  What there was is delivered.
            return Trained(
                dataclasses.replace(recovered, weights=before.weights, error=before.error, recipe=before.recipe), ()
            )
        trained = dataclasses.replace(structure, recovered=recovered, rung=turn.rung)
        left = None if seconds is None else seconds * simulated
        return Trained(recovered, self._models(trained, asked.qat, left, progress))

    def _note(self, turn: Turn, asked: Asked, result: Trained | Exception) -> list[Model]:
        """Keeps what a turn came to and lets the forecasts learn from it; gives the models to deliver."""
        context, structure, rung = self.context, turn.structure, turn.rung
        expected = None if structure.divergence is None and rung == 1 else context.error + turn.drop
        if rung == 1:
            self.turns.entered += 1
        else:
            self.turns.promoted += 1
        if isinstance(result, Exception):
            # Whatever it is, it is this structure's: the others are recovered all the same.
            context.delivery.fail(f"{structure.id}-rung{rung}", result)
            if asked.recipe_trial is not None:
                self.recipes.tell(asked.recipe_trial, None, structure.key, reason_of(result))
            self.rungs.add(self._row(structure, rung, asked, expected, None, reason_of(result)))
            context.progress.advance()
            return []
        recovered, before = result.recovered, structure.recovered
        path = context.run / ".work" / "recovered" / f"{structure.key}-{rung}.safetensors"
        save_recovered(recovered, Climbed(structure.plan, structure.divergence, rung, context.clock.leg), path)
        if asked.recipe_trial is not None:
            self.recipes.tell(asked.recipe_trial, _open_share(turn, recovered.error - context.error), structure.key)
        steps, taken = (
            (recovered.steps, recovered.seconds)
            if before is None
            else (recovered.steps - before.steps, recovered.seconds - before.seconds)
        )
        if steps:
            self.turns.step_s.append(taken / steps / structure.work)
        self.turns.observe(structure, recovered, rung)
        structure.recovered, structure.rung = recovered, rung
        self.turns.recovered[structure.key] = structure
        self.rungs.add(self._row(structure, rung, asked, expected, recovered))
        logger.info(
            "rung %d of %s (%.3f of the MACs, %.3f of the parameters, %d blocks fewer): %d steps, validation error "
            "%.4f, %.4f expected (original %.4f)",
            rung, structure.id, structure.macs, structure.parameters, len(structure.dropped), recovered.steps,
            recovered.error, context.error + turn.drop, context.error,
        )  # fmt: skip
        context.progress.advance()
        return list(result.models)

    def _row(
        self,
        structure: Structure,
        rung: int,
        asked: Asked,
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
            alpha=asked.recipe.alpha,
            temperature=asked.recipe.temperature,
            feature_weight=asked.recipe.feature_weight,
            learning_rate=asked.recipe.learning_rate,
            qat=asked.qat,
            failure=failure,
        )

    def _start(self, structure: Structure) -> tuple[ModelGraph, Mapping[str, torch.Tensor]]:
        """Graph and float weights a recovery begins with."""
        if structure.recovered is not None:
            return structure.recovered.graph, structure.recovered.weights
        base, original = structure.base, self.context.original
        if base.weights is not None and base is not original:
            return base.graph, base.weights
        parent = self._parent(structure)
        if parent is not None and parent.recovered is not None:
            keep = {g.id: structure.plan.groups.get(g.id, g.size) for g in base.graph.groups}
            recovered = parent.recovered
            return narrowed(
                recovered.graph, recovered.weights, keep, structure.dropped - parent.dropped, self.trainer.calibration
            )
        floats = {layer.name: LayerPlan() for layer in original.graph.compressible}
        plan = CompressionPlan(groups=structure.plan.groups, layers=floats)
        compressed = self.context.evaluator.build(complete(original.graph, plan))
        graph = drop_blocks(compressed.graph, structure.dropped)
        return graph, {name: compressed.weights[name] for name in graph.weight_names()}

    def _parent(self, structure: Structure) -> Structure | None:
        """The smallest recovered structure that contains this one: what it has learned is kept."""
        parents = [s for s in self.turns.recovered.values() if s.key != structure.key and s.contains(structure)]
        return min(parents, key=lambda s: (s.macs, s.parameters), default=None)

    def _open_after(self, turn: Turn, names: Sequence[str]) -> float | None:
        """The open share of the best of a turn's models; None where none of them was delivered."""
        delivery = self.context.delivery
        drops = [delivery.drop_of(delivery.points[name]) / 100.0 for name in names if name in delivery.points]
        return _open_share(turn, min(drops)) if drops else None

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

    def _models(self, structure: Structure, qat: bool, seconds: float | None, progress: Progress) -> list[Model]:
        """A recovered structure in each of the number formats that it is worth delivering in and was not yet.

        Args:
            structure: that was recovered.
            qat: whether to train with formats simulated that need it.
            seconds: for training with formats simulated; None where steps are counted.
            progress: advanced at every step.
        """
        context, recovered = self.context, structure.recovered
        assert recovered is not None
        plans = self._variants(structure)
        if context.timed:
            fine = [plan for plan in plans if not _low_bits(plan)]
            if FINE_FIRST and fine and structure.rung == 1:
                plans = fine
            plans = self.turns.promising(structure, plans)
            fine = [plan for plan in plans if not _low_bits(plan)]
            plans = [*fine, *[plan for plan in plans if _low_bits(plan)][:LOW_BITS]]
        low = max(1, sum(_low_bits(plan) for plan in plans))
        found = []
        for plan in plans:
            recipe = recovered.recipe.model_copy(update={"steps": recovered.steps})
            plan = plan.model_copy(update={"recipe": recipe})
            name = name_of(plan)
            if name in context.delivery.points or name in context.delivery.failures:
                continue
            try:
                model = self.trainer.to_formats(
                    recovered,
                    plan,
                    steps=0 if not qat else STEPS_FORMATS if seconds is None else MAX_STEPS,
                    seconds=None if seconds is None else seconds / low,
                    progress=progress,
                )
            except OSError:
                raise
            except Exception as error:
                found.append(Model(structure, plan, error))
            else:
                found.append(Model(structure, plan, model))
        return found

    def _deliver(self, models: Sequence[Model]) -> None:
        """Exports and times models, and publishes the front that they give."""
        context = self.context
        names = []
        for model in models:
            name = name_of(model.plan)
            estimate = model.structure.base.skeleton.estimate(priced(model.plan))
            if context.delivery.add(name, model.get, estimate):
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
            for base in self.bases.made:
                base.skeleton.adopt(context.original.skeleton)
            reprice(context, [*self.turns.recovered.values(), *self.turns.waiting])


def _open_share(turn: Turn, drop: float) -> float:
    """The loss of quality against the one expected of this structure: comparable between structures."""
    return max(drop, 0.0) / max(turn.drop, 1e-3)


def _low_bits(plan: CompressionPlan) -> bool:
    return any(_few_bits(form) for form in plan.layers.values())


def _few_bits(form: LayerPlan) -> bool:
    return form.storage.scheme == "affine" and form.storage.bits < FINE_BITS
