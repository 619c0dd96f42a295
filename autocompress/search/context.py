"""What the stages of one run share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autocompress.config import RunConfig
from autocompress.graph.executor import GraphModule
from autocompress.hardware.models import CostModel
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, Front, LayerPlan, Original, Student, digest_of
from autocompress.progress import Progress
from autocompress.search.bases import Base
from autocompress.search.deliver import ORIGINAL, Delivery
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.feedback import Feedback
from autocompress.search.files import Clock
from autocompress.search.gains import WIDEST_DROP, Gains
from autocompress.search.menu import Menu
from autocompress.search.study import Scored
from autocompress.search.target import searched_costs
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Context:
    """A run after set-up.

    Attributes:
        dense: the original as read, running in torch.
        teacher: the caller's module that candidates are distilled from.
        error: the original's, on the validation split.
        hard: budgets that predictions are held to, by cost name.
        reference: the original's predicted costs, by name.
        feedback: what delivered models were measured at corrects the prices; None where nothing is measured.
        publish: brings the run directory up to date and gives the front.
    """

    config: RunConfig
    space: SearchSpace
    task: Task
    run: Path
    clock: Clock
    progress: Progress
    cost_model: CostModel
    original: Base
    dense: GraphModule
    teacher: nn.Module
    evaluator: StitchedEvaluator
    menu: Menu
    delivery: Delivery
    storage: str
    error: float
    hard: Mapping[str, float]
    reference: Mapping[str, float]
    feedback: Feedback | None
    publish: Callable[[], Front]

    @property
    def timed(self) -> bool:
        """Whether time decides how much is done, rather than numbers of trials and steps."""
        return self.config.time_budget is not None

    @property
    def study_prefix(self) -> str:
        """What the names of the run's studies begin with: a storage of the user's may hold those of other runs."""
        return "" if self.config.storage is None else f"{digest_of(str(self.run.resolve()))}-"

    @property
    def formats(self) -> dict[str, Sequence[LayerPlan]]:
        """The number formats each layer may take."""
        return {layer: [o.format for o in knob.options] for knob in self.menu.knobs for layer in knob.layers}

    def learn(self, names: Iterable[str]) -> bool:
        """Feeds the measurements of delivered models back into the original's prices; False where nothing is new."""
        if self.feedback is None:
            return False
        points = self.delivery.points
        if not self.feedback.take([points[name] for name in names if name in points], points[ORIGINAL]):
            return False
        self.feedback.apply()
        return True

    def repriced(self, scored: Sequence[Scored]) -> list[Scored]:
        """Stitched candidates with their costs as they are predicted now."""
        if not scored:
            return []
        table = self.original.skeleton.price([s.plan for s in scored])
        columns = {name: getattr(table, name) for name in self.costs}
        return [
            dataclasses.replace(s, costs={name: float(column[i]) for name, column in columns.items()})
            for i, s in enumerate(scored)
        ]

    @property
    def costs(self) -> tuple[str, ...]:
        """What the study over stitched candidates trades the divergence off against."""
        return searched_costs(self.config)

    @property
    def gains(self) -> Gains:
        """What a candidate would add to the front that was asked for."""
        objectives = self.config.objectives
        axes = tuple(name for name in objectives if name != "error")
        return Gains(axes, "error" in objectives, self.reference, self.delivery.limits.get("drop"))

    @property
    def widest_drop(self) -> float:
        """Points of quality at which a candidate is worth nothing in this run."""
        return min(self.delivery.limits.get("drop", WIDEST_DROP), WIDEST_DROP) or 1.0

    def note_time(self) -> None:
        """Tells the progress how much time is left."""
        if math.isfinite(self.clock.left):
            self.progress.note(seconds_left=max(0.0, self.clock.left))


def prices(skeleton: Skeleton, plan: CompressionPlan) -> dict[str, float]:
    """The predicted costs of one plan of the skeleton's graph, by objective name."""
    table = skeleton.price([priced(plan)])
    found = {
        "latency_ms": float(table.latency_ms[0]),
        "size_bytes": float(table.size_bytes[0]),
        "peak_memory_bytes": float(table.peak_memory_bytes[0]),
        "macs": float(table.macs[0]),
    }
    if table.energy_mj is not None:
        found["energy_mj"] = float(table.energy_mj[0])
    return found


def priced(plan: CompressionPlan) -> CompressionPlan:
    """A plan as its base's own skeleton prices it."""
    return plan.model_copy(update={"base": Original()}) if isinstance(plan.base, Student) else plan


def name_of(plan: CompressionPlan) -> str:
    """The id of the model a plan becomes."""
    return f"p{plan.digest[:7]}"
