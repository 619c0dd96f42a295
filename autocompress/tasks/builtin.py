"""Built-in data sets: digits, Fashion-MNIST, CIFAR-10 and CIFAR-100.

Splits are fixed, whatever the seed of a search: the test split is the published one, validation the last part of the
training images, calibration the 512 before those, and training what is left.  Digits has no published split and is
divided once, evenly over its classes.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autocompress.errors import UsageError
from autocompress.tasks.base import DataRequest, DataSet
from autocompress.tasks.splits import Augmentation, Normalisation, TensorSplit, make_disjoint
from autocompress.tasks.vision import import_torchvision

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 512
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs."""


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images ``[N, C, H, W]`` at ``size x size``, bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    scaled = [
        functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        for part in torch.split(images, 4096)
    ]
    return torch.cat(scaled).round_().clamp_(0, 255).to(torch.uint8)


def _data_set(
    name: str,
    parts: dict[str, tuple[Tensor, Tensor]],
    classes: int,
    normalisation: Normalisation,
    augmentation: Augmentation,
    request: DataRequest,
) -> DataSet:
    """Assembles uint8 images and classes of the four splits, resized and normalised as requested."""
    normalisation = request.normalisation or normalisation
    size = request.input_size or parts["test"][0].shape[-1]
    splits = {
        split: TensorSplit(resized(images, size), targets.to(torch.int64), normalisation)
        for split, (images, targets) in parts.items()
    }
    channels = parts["test"][0].shape[1]
    return DataSet(name, make_disjoint(splits), classes, channels, size, normalisation, augmentation)


def digits(request: DataRequest) -> DataSet:
    """scikit-learn's 1,797 handwritten digits, 8x8 scaled up to 32x32: 999 / 128 / 300 / 370 images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.from_numpy(np.asarray(source.images, dtype=np.float32)).unsqueeze(1) * (255.0 / 16.0)
    targets = torch.from_numpy(np.asarray(source.target, dtype=np.int64))
    rest: NDArray[Any] = np.arange(len(targets))
    index: dict[str, NDArray[Any]] = {}
    for split, size in (("test", 370), ("validation", 300), ("calibration", 128)):
        rest, index[split] = train_test_split(rest, test_size=size, stratify=targets.numpy()[rest], random_state=0)
    index["train"] = rest
    size = request.input_size or 32
    scaled = functional.interpolate(images, size=(size, size), mode="bilinear").round_().to(torch.uint8)
    parts = {split: (scaled[chosen], targets[chosen]) for split, chosen in index.items()}
    return _data_set("digits", parts, 10, Normalisation((0.3056,), (0.3236,)), Augmentation(shift=2), request)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes, gzipped or not (the format of MNIST)."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UsageError(f"{path} is not an IDX file of bytes; remove it, or give another directory as data")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", content[3], 4))
    if len(content) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise UsageError(f"{path} is incomplete (its header promises {shape}); remove it to download it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _find_idx(directory: Path) -> list[Path] | None:
    """The four files of Fashion-MNIST in a directory or in torchvision's layout below it."""
    for place in (directory, directory / "FashionMNIST" / "raw"):
        found = [next((p for p in (place / name, place / f"{name}.gz") if p.is_file()), None) for name in _IDX_FILES]
        if all(found):
            return [path for path in found if path is not None]
    return None


def fashion_mnist(request: DataRequest) -> DataSet:
    """Fashion-MNIST, 28x28 grey images of 10 kinds of clothes: 54,488 / 512 / 5,000 / 10,000 images."""
    download = request.cache_dir / "data"
    places = [request.data] if request.data else [download, Path("data"), DEBIAN_FASHION_MNIST]
    files = next((found for place in places if (found := _find_idx(place))), None)
    if files is None:
        if request.data is not None:
            raise UsageError(
                f"no Fashion-MNIST in {request.data}: expected {_IDX_FILES[0]}[.gz] and its three siblings there "
                "or in FashionMNIST/raw below it; correct the directory, or leave data out to download it"
            )
        _download(lambda: import_torchvision().datasets.FashionMNIST(download, download=True), "Fashion-MNIST", places)
        files = _find_idx(download)
        assert files is not None
    train, train_classes, test, test_classes = (torch.from_numpy(_read_idx(path).copy()) for path in files)
    parts = _published(train.unsqueeze(1), train_classes, test.unsqueeze(1), test_classes, validation=5000)
    augmentation = Augmentation(flip=True, shift=2)
    return _data_set("fashion-mnist", parts, 10, Normalisation((0.2860,), (0.3530,)), augmentation, request)


def _published(
    train_images: Tensor, train_classes: Tensor, test_images: Tensor, test_classes: Tensor, validation: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cuts validation and calibration off the end of the published training images."""
    last = len(train_images) - validation
    first = last - CALIBRATION_IMAGES
    return {
        "train": (train_images[:first], train_classes[:first]),
        "calibration": (train_images[first:last], train_classes[first:last]),
        "validation": (train_images[last:], train_classes[last:]),
        "test": (test_images, test_classes),
    }


def cifar10(request: DataRequest) -> DataSet:
    """CIFAR-10, 32x32 colour images of 10 classes: 44,488 / 512 / 5,000 / 10,000 images."""
    normalisation = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return _cifar("cifar10", "CIFAR10", 10, normalisation, request)


def cifar100(request: DataRequest) -> DataSet:
    """CIFAR-100, 32x32 colour images of 100 classes: 44,488 / 512 / 5,000 / 10,000 images."""
    normalisation = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return _cifar("cifar100", "CIFAR100", 100, normalisation, request)


def _cifar(name: str, kind: str, classes: int, normalisation: Normalisation, request: DataRequest) -> DataSet:
    # torchvision checks the files against published hashes before it unpickles them.
    reader: Callable[..., Any] = getattr(import_torchvision().datasets, kind)
    download = request.cache_dir / "data"
    places = [request.data] if request.data else [download, Path("data")]
    for place in places:
        try:
            train, test = (reader(str(place), train=part) for part in (True, False))
            break
        except RuntimeError:
            log.debug("no %s in %s", kind, place)
    else:
        if request.data is not None:
            raise UsageError(
                f"no {kind} in {request.data}: expected torchvision's folder {reader.base_folder!r} there, whole; "  # type: ignore[attr-defined]
                "correct the directory, or leave data out to download it"
            )
        train = _download(lambda: reader(str(download), train=True, download=True), kind, places)
        test = reader(str(download), train=False)
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    targets = [torch.tensor(part.targets) for part in (train, test)]
    parts = _published(images[0], targets[0], images[1], targets[1], validation=5000)
    return _data_set(name, parts, classes, normalisation, Augmentation(flip=True, shift=2), request)


def _download(fetch: Callable[[], Any], what: str, places: list[Path]) -> Any:
    """Downloads, or says in one sentence what is missing and what to do."""
    log.info("downloading %s", what)
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision raises RuntimeError last
        looked = ", ".join(str(place) for place in places)
        raise UsageError(
            f"{what} is not in {looked}, and downloading it failed ({type(error).__name__}: {error}); "
            "connect to the network, or give the directory that holds it as data"
        ) from error
