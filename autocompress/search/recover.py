"""Trains candidates against the teacher and turns them into their number formats."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.devices import CPU
from autocompress.graph.executor import GraphModule
from autocompress.methods.compressed import CompressedModel, not_finite
from autocompress.methods.distillation import Schedule, TeacherData, distill, mixed_precision_pays, step_time
from autocompress.methods.recovery import add_norms, fold_norms, quantize_aware, storage_bits
from autocompress.methods.rounding import FINE_BITS
from autocompress.plan import CompressionPlan, ModelGraph, Recipe
from autocompress.progress import Progress
from autocompress.search.scoring import loss_of
from autocompress.tasks.base import Task, quality

logger = logging.getLogger(__name__)

FRESH_LEARNING_RATE = 3.0
"""How much faster fresh weights learn than inherited ones."""

BATCH = 64
"""Samples a training step: in the same time, twice as many steps of 64 reach a lower error than steps of 128 (ResNet-20
at 9% of its MACs on Fashion-MNIST: 10.4 against 10.9% after 25 s, 7.7 against 7.9% after 150 s); 32 gain no more."""

LEAST_BATCH, STEP_BYTES, HELD = 8, 4 * 2**30, 3
"""Large inputs train in smaller batches, so that a step's activations stay within ``STEP_BYTES``: ``HELD`` times what
the layers give (behind a convolution its norm's input and output are held, too, and gradients come on top)."""

FIRST_SCHEDULE, LATER_SCHEDULE = Schedule(rise=0.1, fall=0.3), Schedule(rise=0.03, fall=0.3)
"""Of float recoveries, which are gone on with from their plateau: after 20, 20, 30 and 45 s the error is 10.7, 9.6, 8.2
and 7.6% where whole cosines come to 11.5, 10.0, 8.7 and 7.7% (ResNet-20 at 9% of its MACs on Fashion-MNIST)."""

QAT_LEARNING_RATE = 0.25
"""Learning rate with formats simulated, relative to the recipe's."""


WEIGHTS, PLATEAU = "weights/", "plateau/"
"""What the names of tensors begin with in the file of a recovery."""


@dataclass(frozen=True, eq=False)
class Recovered:
    """A structure's float weights after some training.

    Attributes:
        graph: the graph after pruning.
        weights: its weights, norms folded.
        steps: training steps so far.
        seconds: they took.
        error: on the validation split, as ``loss_of`` has it.
        recipe: of the last training.
        plateau: weights before the learning rate fell, which a longer recovery begins with; None where it never did.
    """

    graph: ModelGraph
    weights: Mapping[str, torch.Tensor]
    steps: int
    seconds: float
    error: float
    recipe: Recipe
    plateau: Mapping[str, torch.Tensor] | None = None


class Trainer:
    """Recovers structures of one task.

    Args:
        task: gives calibration and validation data and the loss.
        teacher: training samples with the teacher's answers.
        seed: of the sample order.
        repeatable: whether the same steps must give the same weights; it rules out choices made by timing.
        batch_size: samples a training step, where memory allows.
        device: where training steps are computed, and float models judged.
    """

    def __init__(
        self,
        task: Task,
        teacher: TeacherData,
        seed: int,
        repeatable: bool = False,
        batch_size: int = BATCH,
        device: torch.device = CPU,
    ) -> None:
        self.task, self.teacher, self.seed = task, teacher, seed
        self.repeatable, self.batch_size, self.device = repeatable, batch_size, device
        calibration = task.split("calibration").inputs
        self.calibration = [(calibration[i : i + 128],) for i in range(0, len(calibration), 128)]

    def float_recovery(
        self,
        graph: ModelGraph,
        weights: Mapping[str, torch.Tensor],
        recipe: Recipe,
        *,
        fresh: bool,
        steps: int,
        seconds: float | None,
        progress: Progress,
        before: Recovered | None = None,
    ) -> Recovered:
        """Distils float weights; ``before`` continues an earlier, shorter recovery.

        Raises:
            FloatingPointError: it diverged: losses, weights or the score are no finite numbers.
        """
        started = time.monotonic()
        module = GraphModule(graph, (before.plateau or before.weights) if before else weights)
        add_norms(module, self.calibration, fresh=fresh and before is None)
        rate = recipe.learning_rate * (FRESH_LEARNING_RATE if fresh else 1.0)
        taken, plateau = 0, None

        def falling() -> None:
            nonlocal plateau
            steady = copy.deepcopy(module)
            fold_norms(steady)
            plateau = steady.weights()

        if steps:
            schedule = LATER_SCHEDULE if before else FIRST_SCHEDULE
            begun = before.steps if before else 0
            taken = self._distill(
                module, recipe, steps, rate, seconds, progress, begun, schedule=schedule, falling=falling
            )
        fold_norms(module)
        module.eval()
        recovered = module.weights()
        # The loss of the last step says nothing of what that step made of the weights.
        broken = not_finite(graph, recovered)
        if broken:
            raise FloatingPointError(f"weights are no finite numbers after {taken} steps, those of {broken[0]} first")
        error = loss_of(self.task.metric, quality(self.task, module.on(self.device)))
        if not math.isfinite(error):
            raise FloatingPointError(f"the score is no finite number after {taken} steps")
        spent = time.monotonic() - started
        return Recovered(
            graph,
            {name: value.contiguous() for name, value in recovered.items()},
            taken + (before.steps if before else 0),
            spent + (before.seconds if before else 0.0),
            error,
            recipe,
            plateau,
        )

    def step_seconds(self, graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> float:
        """How long a training step of a model takes here and now."""
        module = GraphModule(graph, weights)
        add_norms(module, self.calibration[:1])
        return step_time(module, self._sample(batch_for(graph, self.batch_size)), self.device)

    def to_formats(
        self, recovered: Recovered, plan: CompressionPlan, *, steps: int, seconds: float | None, progress: Progress
    ) -> CompressedModel:
        """Rounds recovered weights to a plan's formats, training with them simulated where 4-bit weights need it."""
        recipe = plan.recipe

        def train(module: GraphModule, scales: list[nn.Parameter]) -> None:
            rate = recipe.learning_rate * QAT_LEARNING_RATE
            self._distill(module, recipe, steps, rate, seconds, progress, recovered.steps, scales=scales)

        low_bits = any(storage_bits(plan, layer) < FINE_BITS for layer in recovered.graph.compressible)
        return quantize_aware(
            recovered.graph, recovered.weights, plan, self.calibration, train if steps and low_bits else None
        )

    def _distill(
        self,
        module: GraphModule,
        recipe: Recipe,
        steps: int,
        rate: float,
        seconds: float | None,
        progress: Progress,
        begun: int,
        *,
        scales: list[nn.Parameter] | None = None,
        schedule: Schedule | None = None,
        falling: Callable[[], None] | None = None,
    ) -> int:
        batch_size = batch_for(module.graph, self.batch_size)
        return distill(
            module,
            self.teacher,
            recipe,
            steps=steps,
            learning_rate=rate,
            task_loss=self.task.loss,
            # Samples that a shorter training has not reached come first as often as those it has.
            generator=torch.Generator().manual_seed(self.seed + begun),
            extra_parameters=scales,
            batch_size=batch_size,
            seconds=seconds,
            mixed_precision=not self.repeatable and mixed_precision_pays(module, self._sample(batch_size), self.device),
            schedule=schedule,
            falling=falling,
            device=self.device,
            progress=progress,
        )

    def _sample(self, count: int) -> torch.Tensor:
        return self.teacher.split.batch(slice(0, count)).inputs[0]


def batch_for(graph: ModelGraph, most: int) -> int:
    """Samples a training step of a graph: ``most``, or as many as ``STEP_BYTES`` hold."""
    given = sum(graph.tensors[name].elements for layer in graph.layers for name in layer.outputs if name)
    return min(most, max(LEAST_BATCH, STEP_BYTES // (HELD * 4 * max(given, 1))))


@dataclass(frozen=True)
class Climbed:
    """What a file of a recovery says of itself: enough to go on with it in another process.

    ``leg`` says in which leg of the run it was made: the first, or one that was given more time.
    """

    plan: CompressionPlan
    divergence: float | None
    rung: int
    leg: int = 1


def save_recovered(recovered: Recovered, climbed: Climbed, path: Path) -> None:
    """Keeps a recovery for a resumed run; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "steps": recovered.steps,
        "seconds": recovered.seconds,
        "error": recovered.error,
        "recipe": recovered.recipe.model_dump(),
        "plan": climbed.plan.model_dump(mode="json"),
        "divergence": climbed.divergence,
        "rung": climbed.rung,
        "leg": climbed.leg,
    }
    temporary = path.with_suffix(".part")
    tensors = {WEIGHTS + name: value for name, value in recovered.weights.items()}
    tensors |= {PLATEAU + name: value.contiguous() for name, value in (recovered.plateau or {}).items()}
    save_file(tensors, temporary, {"facts": json.dumps(facts), "graph": recovered.graph.model_dump_json()})
    temporary.replace(path)


def load_recovered(path: Path) -> tuple[Recovered, Climbed] | None:
    """Reads what ``save_recovered`` wrote; None where the file is no use."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        facts, tensors = json.loads(metadata["facts"]), load_file(path)
        weights, plateau = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (WEIGHTS, PLATEAU)
        )
        recovered = Recovered(
            ModelGraph.model_validate_json(metadata["graph"]),
            weights,
            facts["steps"],
            facts["seconds"],
            facts["error"],
            Recipe.model_validate(facts["recipe"]),
            plateau or None,
        )
        plan = CompressionPlan.model_validate(facts["plan"])
        return recovered, Climbed(plan, facts["divergence"], facts["rung"], facts.get("leg", 1))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("%s is unreadable and will be made again (%s)", path, error)
        return None
