"""Shared weights put to use: trained over depths and widths at once, then asked which structures are worth training.

A structure is how many residual blocks leave (the least harmful first) and how many channels each group keeps.  Once
the shared weights are trained, a structure's quality costs a cut and a forward pass, whatever its depth, and its own
training starts from what is cut.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file, save_file

from autocompress.graph.executor import build_module
from autocompress.methods.elastic import ElasticWeights, train_elastic
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph, Original, Recipe, Student
from autocompress.search.bases import Base
from autocompress.search.context import Context, priced
from autocompress.search.evaluate import Stitched
from autocompress.search.menu import complete
from autocompress.search.quiet import Quiet
from autocompress.search.recover import Trainer
from autocompress.search.study import PLAN, open_storage

logger = logging.getLogger(__name__)

WIDEST = 0.75
"""Networks wider than this are dear to train and keep most of the original's quality anyway."""

POPULATION = 24
CHECKED = 3
"""Structures on which shared weights are compared with the database before they are trusted."""

Bases = Callable[[Original | Student], Base | None]


def shared_weights_of(run: Path) -> Path:
    """Where a run keeps its shared weights, once they are trained."""
    return run / ".work" / "elastic.safetensors"


@dataclass(frozen=True)
class Judged:
    """A structure with the quality of what is cut out for it, and its least predicted cost of each kind."""

    base: Base
    plan: CompressionPlan
    divergence: float
    error: float
    costs: Mapping[str, float]


class Structures:
    """The structures of one model: choices to plans, and a study over them.

    Args:
        context: of the run.
        blocks: residual blocks that may leave, the least harmful first.
        bases: gives the base of the original or of a shallower student.
    """

    def __init__(self, context: Context, blocks: Sequence[str], bases: Bases) -> None:
        self.context, self.blocks, self.bases = context, tuple(blocks), bases
        self.options = {
            knob.group: tuple(sorted({o.keep for o in knob.options if o.keep is not None}))
            for knob in context.menu.knobs
            if knob.group is not None
        }
        self._whole = {group.id: group.size for group in context.original.graph.groups}

    def base(self, depth: int) -> Base | None:
        """The original without its ``depth`` least harmful blocks."""
        if depth == 0:
            return self.context.original
        share = 1.0 - depth / len(self.blocks)
        return self.bases(Student(width=1.0, depth=round(share, 4), dropped=tuple(sorted(self.blocks[:depth]))))

    def plan(self, depth: int, keep: Mapping[str, int]) -> CompressionPlan | None:
        """The plan of a structure; None where there is no such base.  Groups that left with a block do not count."""
        base = self.base(depth)
        if base is None:
            return None
        groups = {group.id: min(keep.get(group.id, group.size), group.size) for group in base.graph.groups}
        return CompressionPlan(base=base.spec, groups=groups)

    def near(self, share: float) -> dict[str, int]:
        """Every group at about a share of its channels."""
        return {g: min(o, key=lambda k, g=g: abs(k - share * self._whole[g])) for g, o in self.options.items()}  # type: ignore[misc]

    def draw(self, generator: torch.Generator) -> CompressionPlan:
        """A structure to train: any depth, one width for all groups with some spread about it."""
        depth = int(torch.randint(len(self.blocks) + 1, (1,), generator=generator))
        least = min((o[0] / self._whole[g] for g, o in self.options.items()), default=1.0)
        low, high = math.log(least), math.log(max(WIDEST, least))
        centre = low + (high - low) * float(torch.rand((), generator=generator))
        keep = {}
        for group, options in self.options.items():
            share = math.exp(centre + 0.35 * float(torch.randn((), generator=generator)))
            keep[group] = min(options, key=lambda k: abs(k - share * self._whole[group]))
        return self.plan(depth, keep) or self.narrowest

    @property
    def narrowest(self) -> CompressionPlan:
        """All blocks that can leave gone, every group at its least."""
        keep = {group: options[0] for group, options in self.options.items()}
        for depth in range(len(self.blocks), -1, -1):
            plan = self.plan(depth, keep)
            if plan is not None:
                return plan
        raise AssertionError("the original is a base")

    def costs(self, plan: CompressionPlan, base: Base) -> dict[str, float]:
        """The least of each predicted cost over the formats that all layers can share."""
        graph, context = base.graph, self.context
        formats = context.menu.formats
        plans = []
        for form in formats:
            layers = {}
            for layer in graph.compressible:
                allowed = context.formats.get(layer.name, formats)
                layers[layer.name] = form if form in allowed else LayerPlan()
            plans.append(complete(graph, priced(plan).model_copy(update={"layers": layers})))
        table = base.skeleton.price(plans)
        return {name: float(getattr(table, name).min()) for name in context.costs}


class ElasticStage:
    """Trains shared weights for a run, judges structures by them and hands out what is cut.

    Args:
        context: of the run.
        structures: that may be drawn.
        trainer: gives the samples with the teacher's answers, and calibration inputs.
    """

    def __init__(self, context: Context, structures: Structures, trainer: Trainer) -> None:
        self.context, self.structures, self.trainer = context, structures, trainer
        database = context.evaluator.database
        self.weights = ElasticWeights(context.original.graph, database.weights, database.orders, trainer.calibration)
        self._path = shared_weights_of(context.run)
        self._judged: dict[str, Stitched] = {}

    @property
    def trained(self) -> bool:
        """Whether an earlier part of this run trained them."""
        return self._path.is_file()

    def train(self, steps: int, seconds: float | None) -> None:
        """Trains the shared weights, or takes up those that an interrupted run had trained."""
        if self.trained:
            self.weights.module.load_state_dict(load_file(self._path))
            return
        recipe, context = Recipe(), self.context
        started = time.monotonic()
        taken = train_elastic(
            self.weights,
            self.trainer.teacher,
            self.structures.draw,
            self.structures.narrowest,
            recipe,
            steps=steps,
            learning_rate=recipe.learning_rate,
            task_loss=context.task.loss,
            generator=torch.Generator().manual_seed(context.config.seed),
            batch_size=self.trainer.batch_size,
            seconds=seconds,
            mixed_precision=not self.trainer.repeatable,
            progress=Quiet(context.progress),
        )
        logger.info("shared weights: %d steps in %.1f s", taken, time.monotonic() - started)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in self.weights.module.state_dict().items()}, partial)
        partial.replace(self._path)

    def cut(self, plan: CompressionPlan) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
        """Graph and float weights of a structure."""
        return self.weights.cut(plan)

    def judge(self, plan: CompressionPlan) -> Stitched:
        """The quality of what is cut for a structure, in float."""
        key = plan.shape_digest
        if key not in self._judged:
            self._judged[key] = self.context.evaluator.judge(build_module(*self.cut(plan)))
        return self._judged[key]

    def pays(self) -> bool:
        """Whether what is cut is nearer to the original than what the database stitches, for half of the widths."""
        context, better = self.context, 0
        for share in (0.75, 0.5, 0.25)[:CHECKED]:
            plan = self.structures.plan(0, self.structures.near(share))
            assert plan is not None
            layers = {layer.name: LayerPlan() for layer in context.original.graph.compressible}
            stitched = context.evaluator(complete(context.original.graph, plan.model_copy(update={"layers": layers})))
            better += self.judge(plan).divergence < stitched.divergence
        logger.info("shared weights are nearer to the original than the database at %d of %d widths", better, CHECKED)
        return 2 * better > CHECKED

    def search(self, trials: int, seconds: float | None) -> list[Judged]:
        """Optuna over structures, each judged by what is cut for it; gives all that were judged."""
        study = self._study()
        end = math.inf if seconds is None else time.monotonic() + seconds
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for number in range(max(0, trials - len(done))):
            if number and time.monotonic() >= end:
                break
            self._step(study)
        found: dict[str, Judged] = {}
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            judged = self._judged_of(trial)
            if judged is not None:
                found.setdefault(judged.plan.shape_digest, judged)
        return list(found.values())

    def _study(self) -> optuna.Study:
        context, structures = self.context, self.structures
        study = optuna.create_study(
            storage=open_storage(context.storage), study_name=f"structures-{context.menu.digest}", load_if_exists=True,
            directions=["minimize"] * (1 + len(context.costs)),
        )  # fmt: skip
        done = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.NSGAIISampler(
            seed=context.config.seed + 7919 * done, population_size=POPULATION
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        depths = sorted({0, len(structures.blocks), (len(structures.blocks) + 1) // 2}, reverse=True)
        for depth in depths:
            for share in (0.5, 0.25, 0.75, 0.125, 1.0):
                study.enqueue_trial({"blocks": depth, **structures.near(share)}, skip_if_exists=True)
        return study

    def _step(self, study: optuna.Study) -> None:
        context, structures = self.context, self.structures
        trial = study.ask()
        depth = trial.suggest_int("blocks", 0, len(structures.blocks))
        keep = {g: int(trial.suggest_categorical(g, list(o))) for g, o in structures.options.items()}
        plan, base = structures.plan(depth, keep), structures.base(depth)
        if plan is None or base is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(PLAN, plan.model_dump_json())
        costs = structures.costs(plan, base)
        over = [costs[name] / limit - 1.0 for name, limit in context.hard.items() if name in costs]
        if any(excess > 0 for excess in over):
            study.tell(trial, state=TrialState.PRUNED)
            return
        result = self.judge(plan)
        trial.set_user_attr("error", result.error)
        study.tell(trial, [float(f"{result.divergence:.3g}"), *(costs[name] for name in context.costs)])

    def _judged_of(self, trial: FrozenTrial) -> Judged | None:
        plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
        base = self.structures.bases(plan.base) if isinstance(plan.base, Student) else self.context.original
        if base is None:
            return None
        costs = dict(zip(self.context.costs, trial.values[1:], strict=True))
        return Judged(base, plan, trial.values[0], trial.user_attrs["error"], costs)
