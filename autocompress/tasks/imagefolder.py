"""A folder of images as a data set: ``DIR/train/CLASS/*.jpg`` with ``val`` and ``test`` beside, or ``DIR/CLASS/*.jpg``.

Images are decoded once into one array a split in the cache, which is mapped into memory rather than read, so that a
folder larger than memory works.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from autocompress.errors import UsageError, unknown_name
from autocompress.tasks.base import DataRequest, DataSet
from autocompress.tasks.splits import SPLITS, Augmentation, Normalisation, TensorSplit

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
FOLDER_NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
SHARES = {"test": 0.2, "validation": 0.1}
"""What part of the training images stands in for a split that has no folder."""

CALIBRATION_IMAGES = 512
COLOUR = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's, which published networks expect."""
GREY = Normalisation((0.449,), (0.226,))
"""The mean of the three."""


@dataclass(frozen=True)
class _Sample:
    path: Path
    label: int
    digest: str


def image_folder(directory: str, request: DataRequest) -> DataSet:
    """Reads a folder of images.

    Args:
        directory: the folder; relative to ``request.data`` if that is given.
        request: input size (default: the first image's shorter side, at most 224) and normalisation.

    Raises:
        UsageError: the folder does not exist, has fewer than two classes or too few images, or one is unreadable.
    """
    if not directory:
        raise UsageError("imagefolder: needs a directory: imagefolder:DIR")
    root = (request.data / directory) if request.data else Path(directory).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"imagefolder: {str(root)!r} is not a directory; give one with a folder a class, or with train/"
        )
    classes, parts = _read_parts(root)
    splits = _complete(parts, root)
    first = _open(splits["train"][0].path)
    grey = first.mode in ("1", "L", "I", "I;16", "F")
    size = request.input_size or _default_size(min(first.size))
    normalisation = request.normalisation or (GREY if grey else COLOUR)
    tensors = {
        name: _decoded(samples, size, grey, request.cache_dir / "images", normalisation)
        for name, samples in splits.items()
    }
    augmentation = Augmentation(flip=True, shift=max(2, size // 16))
    name = f"imagefolder:{root.resolve().name}"
    return DataSet(name, tensors, len(classes), 1 if grey else 3, size, normalisation, augmentation)


def _default_size(shorter_side: int) -> int:
    """At most 224, and a multiple of 8 so that halving it three times leaves no remainder."""
    return max(8, min(224, shorter_side) // 8 * 8)


def _read_parts(root: Path) -> tuple[list[str], dict[str, list[_Sample]]]:
    """The classes and the samples of each split that has a folder (all of them ``train`` if none has)."""
    folders = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in FOLDER_NAMES.items()
    }
    if folders["train"] is None:
        folders = {"train": root}
    train = folders["train"]
    assert train is not None
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise UsageError(f"{str(train)!r} holds {len(classes)} class folders; at least 2 are needed, one a class")
    parts = {split: _samples(folder, classes) for split, folder in folders.items() if folder is not None}
    return classes, parts


def _samples(folder: Path, classes: Sequence[str]) -> list[_Sample]:
    """The images below a folder, ordered by content, so that names and copying change nothing."""
    paths: list[tuple[Path, int]] = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if entry.name not in classes:
            raise unknown_name(f"class folder in {str(folder)!r}", entry.name, classes)
        label = classes.index(entry.name)
        paths += [(p, label) for p in entry.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
    with _threads() as pool:
        digests = pool.map(lambda item: hashlib.sha256(item[0].read_bytes()).hexdigest(), paths)
        samples = [_Sample(path, label, digest) for (path, label), digest in zip(paths, digests, strict=True)]
    return sorted(samples, key=lambda sample: (sample.digest, sample.label))


def _complete(parts: Mapping[str, list[_Sample]], root: Path) -> dict[str, list[_Sample]]:
    """All four splits: absent ones are taken from ``train``, and no image is in two."""
    splits = dict(parts)
    for name, share in SHARES.items():
        if name not in splits:
            splits["train"], splits[name] = _cut(splits["train"], round(len(parts["train"]) * share))
            log.info("%s has no %s folder: %d of its training images stand in", root, name, len(splits[name]))
    calibration = min(CALIBRATION_IMAGES, len(splits["train"]) // 10)
    splits["train"], splits["calibration"] = _cut(splits["train"], calibration)
    seen: set[str] = set()
    for name in reversed(SPLITS):
        fresh = list({s.digest: s for s in splits[name] if s.digest not in seen}.values())
        if len(fresh) < len(splits[name]):
            log.warning("%d repeated images are left out of %s", len(splits[name]) - len(fresh), name)
        splits[name] = fresh
        seen.update(sample.digest for sample in fresh)
        if not fresh:
            raise UsageError(f"{str(root)!r} has too few images: none are left for {name}; at least 20 are needed")
    return {name: splits[name] for name in SPLITS}


def _cut(samples: Sequence[_Sample], count: int) -> tuple[list[_Sample], list[_Sample]]:
    """Divides samples in two, the second with ``count`` of them, evenly over the classes."""
    by_class: dict[int, int] = {}
    rank: dict[_Sample, float] = {}
    totals: dict[int, int] = {}
    for sample in samples:
        totals[sample.label] = totals.get(sample.label, 0) + 1
    for sample in samples:
        position = by_class[sample.label] = by_class.get(sample.label, 0) + 1
        rank[sample] = position / totals[sample.label]
    ordered = sorted(samples, key=lambda sample: rank[sample])
    chosen = set(ordered[len(ordered) - count :]) if count else set()
    return [s for s in samples if s not in chosen], [s for s in samples if s in chosen]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UsageError(f"image {str(path)!r} is unreadable ({error}); repair or remove it") from error
    return image


def _pixels(path: Path, size: int, grey: bool) -> NDArray[np.uint8]:
    """One image: its shorter side scaled to ``size``, its centre cut out; ``[C, size, size]``."""
    image = _open(path).convert("L" if grey else "RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decoded(
    samples: Sequence[_Sample], size: int, grey: bool, directory: Path, normalisation: Normalisation
) -> TensorSplit:
    """The images of a split as one uint8 array, decoded on first use and mapped from the cache."""
    key = hashlib.sha256("".join([f"{size} {grey} ", *(s.digest for s in samples)]).encode()).hexdigest()
    path = directory / f"{key[:24]}.npy"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f"{key[:24]}.{os.getpid()}.part"
        try:
            _decode_into(temporary, (sample.path for sample in samples), (len(samples), 1 if grey else 3, size, size))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    # Copy-on-write: torch asks for writable memory, and the file must stay as it is.
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    return TensorSplit(images, torch.tensor([s.label for s in samples]), normalisation)


def _decode_into(path: Path, files: Iterable[Path], shape: tuple[int, int, int, int]) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with _threads() as pool:
        decoded = pool.map(lambda file: _pixels(file, shape[-1], shape[1] == 1), files)
        for index, pixels in enumerate(decoded):
            array[index] = pixels
    array.flush()
