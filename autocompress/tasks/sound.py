"""Whether a user's numbers can be worked with: what is not finite or out of range shows itself here, in plain words.

Found later, the same mistakes would end in a factorization that fails or in losses that are no numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.errors import UsageError
from autocompress.tasks.base import Task, correctness, cross_entropy
from autocompress.tasks.splits import SPLITS, TensorSplit

SAMPLES_AT_ONCE = 4096
IGNORED = -100
"""The target that torch's cross-entropy passes over."""


def check_sound(task: Task, outputs: Tensor, score: Tensor, loss: Tensor) -> None:
    """Refuses data and models whose numbers cannot be used.

    Args:
        task: of the user.
        outputs: the model's, on the first validation samples.
        score: of the outputs.
        loss: of the outputs.

    Raises:
        UsageError: inputs are not finite, targets name no class, or the model's outputs are not numbers.
    """
    for name in SPLITS:
        split = task.split(name)
        if not len(split):
            raise UsageError(f"task {task.name!r}: the {name} split is empty; give it at least one sample")
        broken = samples_not_finite(split)
        if broken:
            raise UsageError(
                f"task {task.name!r}: {broken} of {len(split)} {name} samples hold values that are not finite "
                "(nan or inf); leave them out or repair them"
            )
        if outputs.ndim == 2 and _names_classes(task, name):
            _check_classes(task, name, split.targets, outputs.shape[1])
    if outputs.isnan().any():
        raise UsageError(
            f"task {task.name!r}: the model's outputs are not numbers (nan) on validation samples; "
            "check its weights and how the inputs are normalised"
        )
    for what, value in (("score", score), ("loss", loss)):
        if not torch.isfinite(value).all():
            raise UsageError(f"task {task.name!r}: {what} gives {value.flatten().tolist()} for the model's own outputs")


def samples_not_finite(split: TensorSplit) -> int:
    """How many samples hold a value that is no finite number."""
    if not split.stored.is_floating_point():
        return 0
    count = 0
    for start in range(0, len(split), SAMPLES_AT_ONCE):
        part = split.stored[start : start + SAMPLES_AT_ONCE]
        count += int((~torch.isfinite(part.reshape(len(part), -1)).all(1)).sum())
    return count


def _names_classes(task: Task, name: str) -> bool:
    """Whether the targets of a split are used as classes: where accuracy is scored, or cross-entropy trained."""
    if task.split(name).labels is None or name == "calibration":
        return False
    if name == "train":
        return task.loss_function is cross_entropy and not task.split(name).targets.is_floating_point()
    return task.score_function is correctness


def _check_classes(task: Task, name: str, targets: Tensor, classes: int) -> None:
    counted = targets[targets != IGNORED] if name == "train" else targets
    if not counted.numel():
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"task {task.name!r}: the targets of {name} run from {low} to {high}, but the model gives {classes} "
            f"outputs, for the classes 0 to {classes - 1}; number the classes from 0, or give a model with an output "
            "for each"
        )
