"""Judges a candidate stitched from the database of compressed layers: the cost is about a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autocompress.graph.executor import GraphModule
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.database import LayerDatabase
from autocompress.methods.recovery import correct_statistics
from autocompress.methods.simulation import build_compressed
from autocompress.plan import CompressionPlan
from autocompress.tasks.base import Task
from autocompress.tasks.splits import TensorSplit

CORRECTION_SAMPLES = 128
RANKING_SAMPLES = 512


@dataclass(frozen=True)
class Stitched:
    """How far a stitched candidate lies from the original.

    Attributes:
        divergence: mean KL(original || candidate) in nats over the ranking samples.
        error: one minus the task's score on the same samples.
    """

    divergence: float
    error: float


class StitchedEvaluator:
    """Evaluates plans of one model on a fixed sample of the validation split.

    Args:
        database: of the model's compressed layers.
        dense: the original.
        task: gives the samples and the score.
        seed: of the choice of samples.
    """

    def __init__(self, database: LayerDatabase, dense: GraphModule, task: Task, seed: int) -> None:
        self.database = database
        validation = task.split("validation")
        chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(seed))[:RANKING_SAMPLES]
        self._samples: TensorSplit = validation.take(chosen)
        self._correction = task.split("calibration").batch(slice(0, CORRECTION_SAMPLES)).inputs[0]
        self._score = task.score
        self._teacher = F.log_softmax(self._run(dense), dim=-1)
        self._seen: dict[str, Stitched] = {}

    def build(self, plan: CompressionPlan) -> CompressedModel:
        """The candidate: stitched, then its channel statistics corrected."""
        compressed = self.database.stitch(plan)
        statistics = self.database.statistics
        rows = self.database.kept_outputs(plan)
        means = {name: value[rows[name]] for name, value in statistics.means.items() if name in rows}
        deviations = {name: value[rows[name]] for name, value in statistics.deviations.items() if name in rows}
        return correct_statistics(compressed, [(self._correction,)], means, deviations)

    def __call__(self, plan: CompressionPlan) -> Stitched:
        key = plan.structure_digest
        if key not in self._seen:
            outputs = self._run(build_compressed(self.build(plan)))
            divergence = F.kl_div(F.log_softmax(outputs, -1), self._teacher, reduction="none", log_target=True)
            score = self._score(outputs, self._samples.targets)
            # A model driven to infinities is as bad as can be, not unknown.
            value = float(divergence.flatten(1).sum(1).nan_to_num(1e3, posinf=1e3).mean())
            self._seen[key] = Stitched(min(value, 1e3), 1.0 - float(score.float().mean()))
        return self._seen[key]

    def _run(self, module: GraphModule) -> torch.Tensor:
        with torch.no_grad():
            parts = [
                module(self._samples.batch(slice(i, i + 256)).inputs[0]) for i in range(0, len(self._samples), 256)
            ]
        return torch.cat(parts).float()
