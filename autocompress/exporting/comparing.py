"""Two models on the same inputs: how often they agree, how much noise one adds, and what that costs in quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.exporting.metrics import Comparison, SplitQuality
from autocompress.exporting.samples import Samples, batches
from autocompress.plan import Metric, ModelGraph
from autocompress.runtime.base import Session
from autocompress.search.scoring import interval, paired_drop
from autocompress.tasks.splits import TensorSplit

ACTIVATION_BYTES = 1 << 26
"""What the largest activation of a batch may take."""

LARGEST_BATCH = 250

Outputs = Sequence[np.ndarray]
Model = Callable[[tuple[Tensor, ...]], Outputs]


def batch_size(graph: ModelGraph) -> int:
    """Samples that are run at once, so that a large image does not fill the memory."""
    stored = set(graph.weight_names())
    activations = (t for name, t in graph.tensors.items() if name not in stored and t.dtype.startswith("float"))
    largest = max(tensor.elements for tensor in activations)
    return max(1, min(LARGEST_BATCH, ACTIVATION_BYTES // (4 * largest)))


def as_model(session: Session) -> Model:
    """A session as a function of a batch's inputs, in the model's own order."""
    names = [given.name for given in session.inputs]

    def run(inputs: tuple[Tensor, ...]) -> Outputs:
        return session.run({name: value.numpy() for name, value in zip(names, inputs, strict=True)})

    return run


def as_simulation(module: nn.Module) -> Model:
    """A torch module as the same."""

    def run(inputs: tuple[Tensor, ...]) -> Outputs:
        with torch.no_grad():
            outputs = module(*inputs)
        return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


@dataclass
class _Difference:
    """Adds up over batches what a ``Comparison`` says."""

    samples: int = 0
    agreed: int = 0
    rows: bool = True
    signal: dict[int, float] = field(default_factory=dict)
    noise: dict[int, float] = field(default_factory=dict)

    def add(self, first: Outputs, second: Outputs) -> None:
        self.samples += len(first[0])
        self.rows = self.rows and first[0].ndim == 2 and first[0].shape[1] > 1
        if self.rows:
            self.agreed += int((first[0].argmax(1) == second[0].argmax(1)).sum())
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            exact = a.astype(np.float64)
            self.signal[place] = self.signal.get(place, 0.0) + float(np.square(exact).sum())
            self.noise[place] = self.noise.get(place, 0.0) + float(np.square(exact - b).sum())

    def comparison(self, data: str) -> Comparison:
        ratios = [self.signal[place] / noise for place, noise in self.noise.items() if noise]
        worst = 10.0 * math.log10(max(min(ratios), 1e-30)) if ratios else None
        agreement = self.agreed / self.samples if self.rows and self.samples else None
        return Comparison(data=data, samples=self.samples, top1_agreement=agreement, signal_to_noise_db=worst)


def compare(
    first: Model, second: Model, samples: Samples | TensorSplit, data: str, size: int, count: int
) -> Comparison:
    """Runs up to ``count`` samples through both models; ``first`` is the signal."""
    found = _Difference()
    for batch in batches(samples, size, count):
        found.add(first(batch.inputs), second(batch.inputs))
    return found.comparison(data)


def score(
    original: Model,
    export: Model,
    samples: Samples | TensorSplit,
    judge: Callable[[Tensor, Tensor], Tensor],
    metric: Metric,
    data: str,
    size: int,
) -> tuple[SplitQuality, Comparison]:
    """The quality of both models on a split with targets, and how their outputs compare there."""
    found = _Difference()
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for batch in batches(samples, size):
        assert batch.target is not None
        outputs = original(batch.inputs), export(batch.inputs)
        found.add(*outputs)
        for taken, given in zip(scores, outputs, strict=True):
            taken.append(judge(torch.from_numpy(given[0]), batch.target).double().numpy())
    first, second = np.concatenate(scores[0]), np.concatenate(scores[1])
    low, high = paired_drop(first, second)
    if not metric.higher_is_better:
        low, high = -high, -low
    drop = float(first.mean() - second.mean())
    quality = SplitQuality(
        samples=len(first),
        original=float(first.mean()),
        export=float(second.mean()),
        export_ci95=interval(second),
        drop=drop if metric.higher_is_better else -drop,
        drop_ci95=(low, high),
    )
    return quality, found.comparison(data)


def mean_score(
    model: Model, samples: Samples | TensorSplit, judge: Callable[[Tensor, Tensor], Tensor], size: int
) -> float:
    """The metric of one model on a split with targets."""
    parts: Iterable[Tensor] = (
        judge(torch.from_numpy(model(batch.inputs)[0]), batch.target).double()
        for batch in batches(samples, size)
        if batch.target is not None
    )
    return float(torch.cat(list(parts)).mean())
