"""What is compressed and how it is judged: a trained model, four splits, a metric and a loss."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.devices import CPU, forward_batch, moved
from autocompress.errors import unknown_name
from autocompress.plan import Metric
from autocompress.tasks.splits import (
    SPLITS,
    Augmentation,
    Batch,
    Normalisation,
    Source,
    TensorSource,
    TensorSplit,
)

ModelFactory = Callable[..., nn.Module]
LossFunction = Callable[[Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]


def correctness(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample's largest logit is its class: 1.0 or 0.0, ``[N]`` from logits ``[N, classes]``."""
    return (outputs.argmax(1) == targets).to(torch.float32)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits ``[N, classes]`` and classes ``[N]``."""
    return functional.cross_entropy(outputs.float(), targets)


@dataclass(frozen=True)
class DataRequest:
    """What a user says about the data.

    Attributes:
        data: the data set's directory, if the user named one.
        cache_dir: where to download to.
        input_size: height and width to resize to; None for the data set's own.
        normalisation: replaces the data set's own.
    """

    data: Path | None
    cache_dir: Path
    input_size: int | None = None
    normalisation: Normalisation | None = None


@dataclass(frozen=True)
class DataSet:
    """Four splits of labelled images and what a network for them must look like."""

    name: str
    splits: Mapping[str, TensorSplit]
    classes: int
    channels: int
    input_size: int
    normalisation: Normalisation
    augmentation: Augmentation = field(default_factory=Augmentation)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content of all four splits."""
        return _fingerprint(self.splits)


def _fingerprint(splits: Mapping[str, TensorSplit]) -> str:
    return hashlib.sha256("".join(splits[name].digest for name in SPLITS).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model with the data and the measure it is judged by.

    Attributes:
        name: the task's name, as given to ``load_task``.
        model_name: the network's name.
        model: the trained original, in evaluation mode.
        sources: the four splits by name; ``train`` and the other attributes give the same.
        metric: the quality; the mean of ``score`` over a split.
        factory: rebuilds the network untrained, with the keywords in ``accepts``; None if that is not known.
        accepts: which of ``width`` and ``depth`` the factory takes.
        loss_function: from outputs and targets to a scalar.
        score_function: from outputs and targets to one number a sample.
        normalisation: what was applied to the images; None where the task brings its own tensors.
        input_size: height and width of the images; None where the inputs are no square images.
        augmentation: what ``train`` does to its images.
    """

    name: str
    model_name: str
    model: nn.Module
    sources: Mapping[str, Source]
    metric: Metric = field(default_factory=Metric)
    factory: ModelFactory | None = None
    accepts: frozenset[str] = frozenset()
    loss_function: LossFunction = cross_entropy
    score_function: ScoreFunction = correctness
    normalisation: Normalisation | None = None
    input_size: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def train(self) -> Source:
        return self.sources["train"]

    @property
    def calibration(self) -> Source:
        return self.sources["calibration"]

    @property
    def validation(self) -> Source:
        return self.sources["validation"]

    @property
    def test(self) -> Source:
        return self.sources["test"]

    def split(self, name: str) -> TensorSplit:
        """A whole split in memory: ``train``, ``calibration``, ``validation`` or ``test``."""
        if name not in self.sources:
            raise unknown_name("split", name, self.sources)
        return self.sources[name].tensors()

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's outputs for a batch."""
        outputs: Tensor = model(*batch.inputs)
        return outputs

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """What training minimises: a scalar."""
        return self.loss_function(outputs, target)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each sample's contribution to the metric, ``[N]``: for a classifier 1.0 where it is right, else 0.0."""
        return self.score_function(outputs, targets)

    @cached_property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Two real samples, for tracing the model; a split of one sample gives it twice."""
        batch = next(iter(self.validation))
        # Of a batch of one, torch would take the batch's size for a constant of the model.
        return tuple(torch.cat([value[:2], value[:1]])[:2] for value in batch.inputs)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The names of the arguments of the model's ``forward``, one for each input."""
        known = [
            parameter.name
            for parameter in inspect.signature(self.model.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        count = len(self.example_inputs)
        return tuple(known[:count]) if len(known) >= count else tuple(f"input_{i}" for i in range(count))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the four splits."""
        return _fingerprint({name: self.split(name) for name in SPLITS})


def sources_of(data: DataSet, seed: int, batch_size: int = 128) -> dict[str, Source]:
    """The splits of a data set as batches; only ``train`` is shuffled, by its own generator, and augmented."""
    sources: dict[str, Source] = {name: TensorSource(data.splits[name], 256) for name in SPLITS}
    generator = torch.Generator().manual_seed(seed)
    sources["train"] = TensorSource(data.splits["train"], batch_size, generator, data.augmentation)
    return sources


def predict(model: nn.Module, split: TensorSplit) -> Tensor:
    """The outputs of a model for a whole split, ``[N, ...]``, on the CPU; the model is left as it was."""
    was_training = model.training
    device = next((parameter.device for parameter in model.parameters()), CPU)
    model.eval()
    try:
        with torch.no_grad():
            size = forward_batch(device)
            batches = (split.batch(slice(start, start + size)) for start in range(0, len(split), size))
            return torch.cat([model(*(moved(value, device) for value in batch.inputs)).cpu() for batch in batches])
    finally:
        model.train(was_training)


def quality(task: Task, model: nn.Module, split: str = "validation") -> float:
    """The task's metric of a model on a split."""
    data = task.split(split)
    return float(task.score(predict(model, data), data.targets).double().mean())
