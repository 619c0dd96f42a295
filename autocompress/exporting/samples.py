"""Inputs of any model, from whatever a user holds them in: tensors, dicts, loaders, data sets."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import UsageError
from autocompress.tasks.splits import Batch, TensorSplit

LIMIT_BYTES = 4 * 2**30
"""The most that is held in memory of one split."""

TARGETS = ("labels", "label", "targets", "target")
"""What the target of a batch is called where the batch is a dict."""


@dataclass(frozen=True)
class Samples:
    """Inputs of a model in memory: each ``[N, ...]``, with their targets where they have any.

    Attributes:
        inputs: in the order of the model's arguments.
        targets: ``[N, ...]``, or None.
        names: the arguments that the inputs are for, where the user named them.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batch(self, index: slice) -> Batch:
        """The samples at ``index``."""
        return Batch(tuple(i[index] for i in self.inputs), None if self.targets is None else self.targets[index])

    def take(self, index: slice) -> Samples:
        """The samples at ``index``, as samples."""
        batch = self.batch(index)
        return Samples(batch.inputs, batch.target, self.names)


def batches(samples: Samples | TensorSplit, size: int, count: int | None = None) -> Iterator[Batch]:
    """The first ``count`` samples (all of them by default), ``size`` at a time."""
    end = len(samples) if count is None else min(count, len(samples))
    for start in range(0, end, size):
        yield samples.batch(slice(start, min(start + size, end)))


def read_samples(model: nn.Module, given: object, what: str, limit: int | None = None) -> Samples:
    """Reads inputs for a model.

    Args:
        model: its ``forward`` says how many inputs a batch holds: a tuple of as many tensors as it requires is all
            inputs, one more is the target.  In a dict, ``labels`` or ``targets`` are.
        given: a tensor, a dict of tensors, a tuple, a ``Dataset``, or an iterable of batches of those kinds.
        what: how errors name it.
        limit: samples after which no more are read.

    Raises:
        UsageError: a batch is of another kind, batches differ in shape, or there is none.
    """
    if isinstance(given, TensorSplit):
        return Samples((given.inputs,), given.labels)
    if isinstance(given, Dataset):
        given = DataLoader(given, batch_size=64)
    if isinstance(given, (Tensor, Mapping, Batch)) or (isinstance(given, tuple) and _is_batch(given)):
        given = [given]
    if not isinstance(given, Iterable):
        raise UsageError(
            f"{what} is a {type(given).__name__}; give tensors, a dict of tensors, a Dataset, or a DataLoader of those"
        )
    required, most = _arity(model)
    parts: list[tuple[tuple[Tensor, ...], Tensor | None]] = []
    names: tuple[str, ...] | None = None
    count = size = 0
    for item in given:
        named, inputs, target = _batch(item, what, required, most)
        if parts and (len(inputs) != len(parts[0][0]) or named != names):
            raise UsageError(f"the batches of {what} differ: one has other inputs than the first")
        names = named
        parts.append((inputs, target))
        count += len(inputs[0])
        size += sum(value.nbytes for value in inputs)
        if limit is not None and count >= limit:
            break
        if size > LIMIT_BYTES:
            raise UsageError(f"{what} is larger than {LIMIT_BYTES >> 30} GiB; give a part of it")
    if not count:
        raise UsageError(f"{what} has no samples")
    try:
        inputs = tuple(torch.cat(column) for column in zip(*(part[0] for part in parts), strict=True))
        targets = [part[1] for part in parts if part[1] is not None]
        joined = torch.cat(targets) if len(targets) == len(parts) else None
    except RuntimeError as error:
        raise UsageError(f"the batches of {what} differ in shape: {error}; pad them to one shape") from error
    return Samples(inputs, joined, names).take(slice(0, limit))


def _is_batch(given: tuple[object, ...]) -> bool:
    return bool(given) and all(isinstance(part, (Tensor, Mapping)) for part in given)


def _arity(model: nn.Module) -> tuple[int, int]:
    """How many tensors ``forward`` must be given, and how many it can be."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    plain = [p for p in parameters if p.kind in positional]
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = sum(p.default is p.empty for p in plain)
    return max(required, 1), 1 << 10 if open_ended else max(len(plain), 1)


def _batch(
    item: Any, what: str, required: int, most: int
) -> tuple[tuple[str, ...] | None, tuple[Tensor, ...], Tensor | None]:
    """Names (of a dict), inputs and target of one batch, on the CPU."""
    names: tuple[str, ...] | None = None
    target: object = None
    if isinstance(item, Batch):
        item, target = item.inputs, item.target
    elif isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], (tuple, list, Mapping)):
        item, target = item
    elif isinstance(item, (tuple, list)) and len(item) == required + 1:
        item, target = item[:-1], item[-1]
    if isinstance(item, Mapping):
        found = {str(key): value for key, value in item.items() if isinstance(value, Tensor)}
        for key in TARGETS:
            target = found.pop(key, target)
        names, item = tuple(found), tuple(found.values())
    inputs = (item,) if isinstance(item, Tensor) else tuple(item) if isinstance(item, (tuple, list)) else ()
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise UsageError(
            f"a batch of {what} is a {type(item).__name__}; expected tensors, a dict of tensors, or (inputs, target)"
        )
    if names is None and not required <= len(inputs) <= most:
        raise UsageError(f"a batch of {what} has {len(inputs)} tensors, but the model's forward takes {required}")
    every = [*inputs, target] if isinstance(target, Tensor) else list(inputs)
    lengths = {len(value) if value.ndim else 0 for value in every}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(value.shape)) for value in every)
        raise UsageError(f"the tensors of a batch of {what} are {shapes}; the first axis of each must be the batch")
    made = tuple(v.detach().cpu().float() if v.is_floating_point() else v.detach().cpu() for v in inputs)
    return names, made, target.detach().cpu() if isinstance(target, Tensor) else None
