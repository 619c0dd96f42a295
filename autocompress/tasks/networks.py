"""From a network's name to something that builds it: built-in, torchvision's, or a user's ``module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import UsageError, unknown_name
from autocompress.registry import import_object
from autocompress.tasks.base import ModelFactory
from autocompress.tasks.registry import MODELS
from autocompress.tasks.vision import classifier_names, import_torchvision


@dataclass(frozen=True)
class Architecture:
    """A network that can be built for any number of classes and channels.

    Attributes:
        name: as the user wrote it.
        build: returns it untrained; takes those of ``width`` and ``depth`` that are in ``accepts``.
        accepts: which of ``width`` and ``depth`` it takes.
        foreign: whether it is a user's own code, which may return a trained model.
    """

    name: str
    build: ModelFactory
    accepts: frozenset[str]
    foreign: bool = False


def architecture(name: str, classes: int, channels: int) -> Architecture:
    """Finds a network by name.

    Args:
        name: a built-in, a torchvision classifier, or ``module:function`` (a function of any of the keywords
            ``classes``, ``channels``, ``width`` and ``depth`` that returns a module).
        classes: how many outputs it must have.
        channels: how many channels its images have.

    Raises:
        UsageError: no network has that name; the message names the nearest.
    """
    if name in MODELS:
        return _from_function(name, MODELS.load(name), classes, channels)
    if ":" in name:
        function = import_object(name)
        if not callable(function):
            raise UsageError(f"model {name!r} is a {type(function).__name__}, not a function that returns a module")
        return _from_function(name, function, classes, channels, foreign=True)
    known = classifier_names()
    if name not in known:
        raise unknown_name("model", name, [*MODELS, *known])
    accepts = frozenset({"width"}) if name.startswith("mobilenet_") else frozenset()
    return Architecture(name, partial(torchvision_classifier, name, classes, channels), accepts)


def _from_function(
    name: str, function: Callable[..., Any], classes: int, channels: int, foreign: bool = False
) -> Architecture:
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    fixed = {
        key: value
        for key, value in {"classes": classes, "channels": channels}.items()
        if key in parameters or (open_ended and not foreign)
    }
    accepts = frozenset(key for key in ("width", "depth") if key in parameters)

    def build(**options: Any) -> nn.Module:
        module = function(**fixed, **options)
        if not isinstance(module, nn.Module):
            raise UsageError(f"model {name!r} returned a {type(module).__name__}; it must return a torch.nn.Module")
        return module

    return Architecture(name, build, accepts, foreign)


def check_fit(found: Architecture, example: Tensor, classes: int) -> None:
    """Runs an untrained network on two images, because a misfit should show before minutes of training.

    Raises:
        UsageError: it fails on images of that shape, or answers with another number of classes.
    """
    with torch.random.fork_rng(devices=[]):
        network = found.build().eval()
    shape = tuple(example.shape)
    try:
        with torch.no_grad():
            outputs = network(example)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UsageError(
            f"model {found.name!r} fails on images of shape {shape[1:]}: {error}; choose another input_size "
            "(many torchvision models need 224) or another model"
        ) from error
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (len(example), classes):
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(
            f"model {found.name!r} answers images {shape} with {given}; expected one tensor {(len(example), classes)}"
        )


def comes_trained(found: Architecture) -> bool:
    """Whether a user's function returns a model with weights of its own, not random ones.

    Initial weights depend on the random seed; weights that don't were loaded from somewhere.
    """
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(found.build().state_dict())
    first, second = states
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def torchvision_classifier(name: str, classes: int, channels: int, width: float | None = None) -> nn.Module:
    """A torchvision classifier, untrained, with its first convolution and last layer fitted to the data."""
    options: dict[str, Any] = {} if width is None else {"width_mult": width}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads answer only while training, with another type of output.
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = import_torchvision().models.get_model(name, weights=None, num_classes=classes, **options)
    path, first = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != channels:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, _with_channels(first, channels))
    return model


def _with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A new convolution like ``conv`` that reads ``channels`` channels."""
    return nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
