"""torchvision, importable beside any build of torch.

A torchvision wheel with compiled operators beside a torch build that cannot load them (CPU-only torch and the default
wheel) fails in ``import torchvision``: it registers a fake kernel for operators that do not exist.  Nothing here needs
those operators, so the registration is made tolerant while the import lasts.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_LOCK = threading.Lock()


def import_torchvision() -> ModuleType:
    """The torchvision module; registrations of its missing compiled operators are skipped during the import only."""
    with _LOCK:
        original = torch.library.register_fake

        def tolerant(op: Any, func: Callable[..., Any] | None = None, /, **options: Any) -> Any:
            def register(function: Callable[..., Any]) -> Callable[..., Any]:
                try:
                    original(op, function, **options)
                except RuntimeError as error:
                    if "torchvision::" not in str(op) or "does not exist" not in str(error):
                        raise
                return function

            return register if func is None else register(func)

        torch.library.register_fake = tolerant
        try:
            return importlib.import_module("torchvision")
        finally:
            torch.library.register_fake = original


def classifier_names() -> list[str]:
    """Names of torchvision's image classifiers (float ones; quantized variants are not trainable originals)."""
    models = import_torchvision().models
    return list(models.list_models(module=models))
