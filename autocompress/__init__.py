"""autocompress: a trained PyTorch model, data and a target device in; a verified Pareto front of small models out.

    import autocompress

    front = autocompress.search(task="digits", time_budget="2m")
    model = front.best(max_latency_ms=0.2, max_drop=1.0).load()

Everything here is imported on first use, so that ``import autocompress`` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autocompress.version import __version__

if TYPE_CHECKING:
    from autocompress.api import calibrate, export, predict, profile, report, search, verify
    from autocompress.config import RunConfig
    from autocompress.exporting.handle import ExportedModel, load_export
    from autocompress.front import LoadedFront, Point, load_front, load_point
    from autocompress.tasks import load_task

__all__ = [
    "ExportedModel",
    "LoadedFront",
    "Point",
    "RunConfig",
    "__version__",
    "calibrate",
    "export",
    "load_export",
    "load_front",
    "load_point",
    "load_task",
    "predict",
    "profile",
    "report",
    "search",
    "verify",
]

_HOMES = {
    "ExportedModel": "autocompress.exporting.handle",
    "LoadedFront": "autocompress.front",
    "Point": "autocompress.front",
    "RunConfig": "autocompress.config",
    "calibrate": "autocompress.api",
    "load_export": "autocompress.exporting.handle",
    "load_front": "autocompress.front",
    "load_point": "autocompress.front",
    "load_task": "autocompress.tasks",
    "predict": "autocompress.api",
    "profile": "autocompress.api",
    "verify": "autocompress.api",
}

_FUNCTIONS_AND_PACKAGES = ("export", "report", "search")


class _CallablePackage(ModuleType):
    """``autocompress.search`` is a package and, called, the function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("autocompress.api"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


class _Package(ModuleType):
    """Importing ``autocompress.search.study`` binds the name ``search`` here to the package: it stays callable."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FUNCTIONS_AND_PACKAGES and type(value) is ModuleType:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS_AND_PACKAGES:
        return importlib.import_module(f"autocompress.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
