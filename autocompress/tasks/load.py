"""From names on the command line to a task: data, network, weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import UsageError, unknown_name
from autocompress.tasks.registry import DEFAULT_MODELS, FALLBACK_MODEL, TASKS

if TYPE_CHECKING:
    from torch import nn

    from autocompress.progress import Progress
    from autocompress.tasks.base import DataRequest, DataSet, Task
    from autocompress.tasks.networks import Architecture
    from autocompress.tasks.splits import Normalisation

log = logging.getLogger(__name__)

FOLDER_PREFIX = "imagefolder:"


def load_task(
    task: str,
    model: str | None = None,
    weights: Path | str | None = None,
    data: Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cache_dir: Path | str | None = None,
    *,
    input_size: int | None = None,
    normalisation: Normalisation | None = None,
) -> Task:
    """Loads a task: a trained model with the splits, the metric and the loss it is judged by.

    Args:
        task: a built-in name (``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``), ``imagefolder:DIR``, or
            ``module:function`` (a function that returns a ``Task`` or a mapping; see ``tasks.custom``).
        model: a built-in network, a torchvision classifier or ``module:function``.
        weights: a checkpoint of the model, ``.safetensors`` or ``.pt``.  Without one the model is trained on the
            task's training split, once; the result is cached.
        data: the data set's directory, where it is not in the usual places.
        seed: of training the original, apart from the seed of a search, so that searches share one original.
        progress: is told how a training goes.
        cache_dir: replaces the default cache directory.
        input_size: height and width that images are resized to, in pixels.
        normalisation: replaces the data set's mean and standard deviation.

    Raises:
        UsageError: a name, a file or a data set does not exist or does not fit; the message says what does.
    """
    from autocompress.tasks.base import DataRequest
    from autocompress.tasks.cache import cache_directory

    cache = cache_directory(cache_dir)
    request = DataRequest(Path(data).expanduser() if data is not None else None, cache, input_size, normalisation)
    if input_size is not None and input_size < 8:
        raise UsageError(f"input_size {input_size} is too small; the least is 8 pixels")
    if request.data is not None and not request.data.is_dir():
        raise UsageError(f"data {str(request.data)!r} is not a directory; give the one that holds the data set")
    if task in TASKS:
        return _from_data(TASKS.load(task)(request), model, weights, seed, progress, cache)
    if task.startswith(FOLDER_PREFIX):
        from autocompress.tasks.imagefolder import image_folder

        folder = image_folder(task.removeprefix(FOLDER_PREFIX), request)
        return _from_data(folder, model, weights, seed, progress, cache)
    if ":" in task:
        return _custom(task, model, weights, request, seed)
    raise unknown_name("task", task, [*TASKS, f"{FOLDER_PREFIX}DIR", "module:function"])


def _from_data(
    data: DataSet,
    model: str | None,
    weights: Path | str | None,
    seed: int,
    progress: Progress | None,
    cache: Path,
) -> Task:
    from autocompress.tasks.base import Task, sources_of
    from autocompress.tasks.networks import architecture

    name = model or DEFAULT_MODELS.get(data.name, FALLBACK_MODEL)
    found = architecture(name, data.classes, data.channels)
    network = _trained_network(found, data, weights, seed, progress, cache)
    return Task(
        name=data.name,
        model_name=name,
        model=network.eval(),
        sources=sources_of(data, seed),
        factory=found.build,
        accepts=found.accepts,
        normalisation=data.normalisation,
        input_size=data.input_size,
        augmentation=data.augmentation,
    )


def _trained_network(
    found: Architecture,
    data: DataSet,
    weights: Path | str | None,
    seed: int,
    progress: Progress | None,
    cache: Path,
) -> nn.Module:
    """The network with the caller's weights, with those it was built with, or trained here."""
    from autocompress.tasks.base import correctness, predict
    from autocompress.tasks.networks import check_fit, comes_trained
    from autocompress.tasks.training import trained_once
    from autocompress.tasks.weights import load_weights

    example = data.splits["validation"].batch(slice(0, 2)).inputs[0]
    check_fit(found, example, data.classes)
    if weights is not None:
        network = found.build()
        load_weights(network, Path(weights).expanduser())
    elif found.foreign and comes_trained(found):
        log.info("model %s comes with weights of its own; it is used as it is", found.name)
        network = found.build()
    else:
        return trained_once(found.build, found.name, data, cache_dir=cache, seed=seed, progress=progress)
    sample = data.splits["validation"].take(slice(0, 500))
    accuracy = float(correctness(predict(network, sample), sample.targets).mean())
    if accuracy < 1.5 / data.classes:
        log.warning(
            "model %s is right on %.1f%% of %s, as guessing would be: are its weights, the order of its classes and "
            "the normalisation (%s) those it was trained with?",
            found.name,
            100 * accuracy,
            data.name,
            data.normalisation,
        )
    return network


def _custom(task: str, model: str | None, weights: Path | str | None, request: DataRequest, seed: int) -> Task:
    from autocompress.tasks.custom import custom_task
    from autocompress.tasks.weights import load_weights

    if model is not None:
        raise UsageError(f"task {task!r} brings its own model; leave out model {model!r}")
    if request.input_size is not None or request.normalisation is not None:
        raise UsageError(f"task {task!r} prepares its own inputs; leave out input_size and normalisation")
    loaded = custom_task(task, request.data, seed)
    if weights is not None:
        load_weights(loaded.model, Path(weights).expanduser())
    return loaded
