"""Judges a candidate stitched from the database of compressed layers: the cost is about a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autocompress.graph.executor import GraphModule
from autocompress.methods.channel_correction import StatisticsCorrection
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.database import LayerDatabase
from autocompress.methods.simulation import build_compressed
from autocompress.plan import CompressionPlan
from autocompress.search.scoring import loss_of
from autocompress.tasks.base import Task, predict
from autocompress.tasks.splits import TensorSplit

CORRECTION_SAMPLES = 128
RANKING_SAMPLES = 512
QUICK_SAMPLES = 128

WORST = 1e3
"""The divergence, in nats, of a candidate that gives no numbers."""


@dataclass(frozen=True)
class Stitched:
    """How far a stitched candidate lies from the original.

    Attributes:
        divergence: mean KL(original || candidate) in nats over the ranking samples.
        error: on the same samples, as ``loss_of`` has it.
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
        self.correction_inputs = task.split("calibration").batch(slice(0, CORRECTION_SAMPLES)).inputs[0]
        self._score, self._metric = task.score, task.metric
        self._teacher = F.log_softmax(self._run(dense), dim=-1)
        self._seen: dict[str, Stitched] = {}

    def build(self, plan: CompressionPlan) -> CompressedModel:
        """The candidate: stitched, then its channel statistics corrected."""
        correction = self.correction(plan)
        with torch.no_grad():
            correction.module(self.correction_inputs)
        return correction.result()

    def correction(self, plan: CompressionPlan) -> StatisticsCorrection:
        """The candidate as stitched, its correction still to be done by a pass over ``correction_inputs``."""
        return self.database.correction(plan)

    def __call__(self, plan: CompressionPlan) -> Stitched:
        key = plan.structure_digest
        if key not in self._seen:
            self._seen[key] = self.judge(build_compressed(self.build(plan)))
        return self._seen[key]

    def judge(self, module: GraphModule) -> Stitched:
        """Any module with the original's inputs and outputs, on all ranking samples."""
        outputs = self._run(module)
        score = self._score(outputs, self._samples.targets)
        return Stitched(self.divergence(outputs), loss_of(self._metric, float(score.float().mean())))

    def divergence_of(self, module: GraphModule) -> float:
        """The divergence of any module with the original's inputs and outputs, on the quick samples."""
        return self.divergence(self._run(module, QUICK_SAMPLES))

    def quick(self, plan: CompressionPlan) -> float:
        """The divergence on a quarter of the samples: enough to tell which single change hurts."""
        return self.divergence_of(build_compressed(self.build(plan)))

    @property
    def quick_inputs(self) -> torch.Tensor:
        """The quick samples, ``[n, ...]``."""
        return self._samples.batch(slice(0, QUICK_SAMPLES)).inputs[0]

    def divergence(self, outputs: torch.Tensor) -> float:
        """Mean KL(original || candidate) of outputs on the first ranking samples, in nats.

        A model driven to infinities is as bad as can be, not unknown.
        """
        teacher = self._teacher[: len(outputs)]
        divergence = F.kl_div(F.log_softmax(outputs, -1), teacher, reduction="none", log_target=True)
        return min(float(divergence.flatten(1).sum(1).nan_to_num(WORST, posinf=WORST).mean()), WORST)

    def _run(self, module: GraphModule, count: int | None = None) -> torch.Tensor:
        return predict(module, self._samples.take(slice(0, count))).float()
