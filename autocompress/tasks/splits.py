"""Samples of a split: in memory, batched, augmented, hashed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from autocompress.errors import UsageError

log = logging.getLogger(__name__)

SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """Inputs of a model (each ``[N, ...]``) and what it should answer (``[N]`` class indices for a classifier)."""

    inputs: tuple[Tensor, ...]
    target: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs[0].shape[0]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel of an image whose pixels lie in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Turns uint8 images ``[N, C, H, W]`` into normalised float32."""
        mean = torch.tensor(self.mean).view(-1, 1, 1) * 255.0
        std = torch.tensor(self.std).view(-1, 1, 1) * 255.0
        return images.to(torch.float32).sub_(mean).div_(std)


class TensorSplit:
    """A split in memory.

    Images may be held as uint8 with a normalisation; ``inputs`` and ``batch`` give float32 either way.  ``labels`` is
    None where the samples have no targets: they can be learned from with a teacher, and calibrated on, but not scored.

    >>> split = TensorSplit(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    >>> len(split), tuple(split.batch(slice(0, 2)).inputs[0].shape)
    (3, (2, 1, 8, 8))
    """

    def __init__(self, inputs: Tensor, targets: Tensor | None, normalisation: Normalisation | None = None) -> None:
        if targets is not None and len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        self.stored = inputs
        self.labels = targets
        self.normalisation = normalisation

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def targets(self) -> Tensor:
        """The targets of a split that has them."""
        if self.labels is None:
            raise UsageError("these samples have no targets, so nothing can be scored on them; give (inputs, targets)")
        return self.labels

    @cached_property
    def inputs(self) -> Tensor:
        """All inputs, ``[N, C, H, W]`` float32 and normalised (made on first use, then kept)."""
        return self._prepare(self.stored)

    def batch(self, index: Tensor | slice) -> Batch:
        """The samples at ``index``, normalised."""
        return Batch((self._prepare(self.stored[index]),), None if self.labels is None else self.labels[index])

    def take(self, index: Tensor | slice) -> TensorSplit:
        """A split of the samples at ``index``."""
        labels = None if self.labels is None else self.labels[index]
        return TensorSplit(self.stored[index], labels, self.normalisation)

    def _prepare(self, stored: Tensor) -> Tensor:
        return stored if self.normalisation is None else self.normalisation(stored)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: every sample in order, with its target and normalisation."""
        state = hashlib.sha256(f"{tuple(self.stored.shape)} {self.stored.dtype} {self.normalisation}".encode())
        state.update(self.stored.contiguous().numpy().data)
        if self.labels is not None:
            state.update(self.labels.contiguous().numpy().data)
        return state.hexdigest()

    def sample_digests(self) -> list[bytes]:
        """A digest of each sample's input, to find the same sample in two splits."""
        if not len(self):
            return []
        rows = self.stored.reshape(len(self), -1).contiguous().numpy()
        return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def make_disjoint(splits: Mapping[str, TensorSplit]) -> dict[str, TensorSplit]:
    """Removes inputs that occur in two splits from the less important one: test, then validation, keep theirs.

    Data sets collected from the web repeat images, and a repeated one would let the search see the test split.
    """
    seen: set[bytes] = set()
    kept: dict[str, TensorSplit] = {}
    for name in reversed(SPLITS):
        split = splits[name]
        digests = split.sample_digests()
        fresh = [i for i, digest in enumerate(digests) if digest not in seen]
        if len(fresh) < len(split):
            repeated = len(split) - len(fresh)
            log.warning("%d of %d %s samples repeat another split's and are left out", repeated, len(split), name)
            split = split.take(torch.tensor(fresh, dtype=torch.long))
        kept[name] = split
        seen.update(digests)
    return {name: kept[name] for name in SPLITS}


def augment(inputs: Tensor, generator: torch.Generator, *, flip: bool = False, shift: int = 0) -> Tensor:
    """Flips half of the images left to right and moves each by up to ``shift`` pixels either way, edges repeated.

    Args:
        inputs: images ``[N, C, H, W]``; not changed.
        generator: source of the random choices.
        flip: whether to flip.
        shift: the largest move, in pixels.
    """
    count, _, height, width = inputs.shape
    if flip:
        chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        inputs = torch.where(chosen, inputs.flip(-1), inputs)
    if shift:
        padded = functional.pad(inputs, (shift,) * 4, mode="replicate")
        # Every placement as a view; picking one a sample copies just the result.
        placements = padded.unfold(2, height, 1).unfold(3, width, 1)
        moves = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
        inputs = placements[torch.arange(count), :, moves[0], moves[1]]
    return inputs


@dataclass(frozen=True)
class Augmentation:
    """The settings of ``augment`` that suit a data set: digits and text must not be flipped."""

    flip: bool = False
    shift: int = 0

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return augment(inputs, generator, flip=self.flip, shift=self.shift)


def iterate_batches(
    split: TensorSplit,
    batch_size: int,
    generator: torch.Generator | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Iterator[Batch]:
    """One pass over a split.

    With a generator the order is random, the incomplete last batch is left out (it would disturb batch norms) and
    ``augment`` applies; without one the samples come in order, all of them, unchanged.
    """
    count = len(split)
    if generator is None:
        for start in range(0, count, batch_size):
            yield split.batch(slice(start, start + batch_size))
        return
    order = torch.randperm(count, generator=generator)
    batch_size = min(batch_size, count)
    for start in range(0, count - batch_size + 1, batch_size):
        batch = split.batch(order[start : start + batch_size])
        yield batch if augment is None else Batch((augment(batch.inputs[0], generator),), batch.target)


class Source(Protocol):
    """A split as a task holds it: iterable any number of times, and available as tensors."""

    def __iter__(self) -> Iterator[Batch]: ...

    def tensors(self) -> TensorSplit:
        """The whole split in memory, without augmentation."""


@dataclass(frozen=True)
class TensorSource:
    """Batches of a split in memory; with a generator, shuffled and augmented anew on every pass."""

    split: TensorSplit
    batch_size: int
    generator: torch.Generator | None = None
    augmentation: Augmentation | None = None

    def __iter__(self) -> Iterator[Batch]:
        return iterate_batches(self.split, self.batch_size, self.generator, self.augmentation)

    def __len__(self) -> int:
        count = len(self.split)
        return max(1, count // self.batch_size) if self.generator else -(-count // self.batch_size)

    def tensors(self) -> TensorSplit:
        return self.split
