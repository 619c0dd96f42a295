"""Trains an original network once, where a task comes without weights, and keeps the result in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.devices import autocast_context
from autocompress.layout import laid_out, training_layout_of
from autocompress.progress import Progress, SilentProgress
from autocompress.tasks.base import DataSet, correctness, cross_entropy, predict
from autocompress.tasks.splits import TensorSplit, augment, iterate_batches

__all__ = ["RECIPES", "Recipe", "augment", "iterate_batches", "recipe_for", "train", "trained_once"]

log = logging.getLogger(__name__)

RECIPE_VERSION = 1
"""Part of every cache key: raise it when training changes in a way that ``Recipe`` doesn't show."""


@dataclass(frozen=True)
class Recipe:
    """How an original is trained: SGD with Nesterov momentum, a linear warm-up and a cosine descent.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: the peak.
        weight_decay: applied to weight matrices only.
        warmup: the part of all steps before the peak.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    warmup: float = 0.2


RECIPES: Mapping[str, Recipe] = {
    "digits": Recipe(epochs=24, batch_size=64, learning_rate=0.1),
    "fashion-mnist": Recipe(epochs=8),
    "cifar10": Recipe(epochs=20),
    "cifar100": Recipe(epochs=25),
}


def recipe_for(data: DataSet) -> Recipe:
    """The recipe of a built-in data set, or one that suits folders of images."""
    return RECIPES.get(data.name, Recipe(epochs=20, batch_size=32, learning_rate=0.05))


def train(
    model: nn.Module,
    split: TensorSplit,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augmentation: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Trains a classifier in place and leaves it in evaluation mode.

    Args:
        model: the network; its weights are the starting point.
        split: the only samples it will see.
        recipe: the settings.
        generator: source of the order and the augmentation.
        augmentation: changes each batch of images.
        progress: is told of every step and of each epoch's loss.
    """
    progress = progress or SilentProgress()
    layout = training_layout_of(model)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
    )
    steps_per_epoch = max(1, len(split) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.learning_rate,
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    progress.stage("training the original", recipe.epochs * steps_per_epoch)
    model.train()
    for epoch in range(recipe.epochs):
        total = 0.0
        for batch in iterate_batches(split, recipe.batch_size, generator, augmentation):
            assert batch.target is not None
            images = laid_out(batch.inputs[0], layout)
            with autocast_context():
                outputs = model(images)
            loss = cross_entropy(outputs, batch.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            progress.advance()
        log.info("epoch %d of %d: loss %.4f", epoch + 1, recipe.epochs, total / steps_per_epoch)
        progress.note(epoch=epoch + 1, epochs=recipe.epochs, loss=total / steps_per_epoch)
    model.eval()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def trained_once(
    build: Callable[[], nn.Module],
    model_name: str,
    data: DataSet,
    *,
    cache_dir: Path,
    seed: int = 0,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> nn.Module:
    """The network trained on a data set: from the cache, or trained now and cached.

    The cache key holds everything the result depends on: the data's content, the network's structure, the seed and
    the recipe.
    """
    recipe = recipe or recipe_for(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        key = _cache_key(model, model_name, data, seed, recipe)
        path = cache_dir / "originals" / f"{_file_name(data.name)}-{_file_name(model_name)}-{key[:16]}.safetensors"
        if _load_cached(model, path):
            return model.eval()
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        # Inside the fork, because dropout layers draw from the global generator.
        train(
            model,
            data.splits["train"],
            recipe,
            generator=generator,
            augmentation=data.augmentation,
            progress=progress,
        )
    validation = data.splits["validation"]
    accuracy = float(correctness(predict(model, validation), validation.targets).mean())
    seconds = time.perf_counter() - started
    log.info("trained %s on %s in %.0f s: validation accuracy %.4f", model_name, data.name, seconds, accuracy)
    facts = {"task": data.name, "model": model_name, "seed": seed, "recipe": asdict(recipe), "seconds": seconds}
    save_weights(model, path, {"autocompress": json.dumps({**facts, "validation_accuracy": accuracy})})
    return model


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[-40:]


def _cache_key(model: nn.Module, model_name: str, data: DataSet, seed: int, recipe: Recipe) -> str:
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    parts = [RECIPE_VERSION, asdict(recipe), asdict(data.augmentation), seed, model_name, shapes, repr(model)]
    return hashlib.sha256(json.dumps([data.fingerprint, *parts]).encode()).hexdigest()


def _load_cached(model: nn.Module, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        log.warning("%s is unreadable and will be made again (%s)", path, error)
        return False
    return True


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a state dict as safetensors; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share storage (tied weights).
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(state, temporary, dict(metadata))
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
