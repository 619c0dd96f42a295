"""The machine and the versions that a result was made with."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from autocompress.version import __version__

PACKAGES = ("torch", "torchvision", "onnxruntime", "onnx", "optuna", "torch-pruning", "fvcore", "numpy")


class Facts(TypedDict):
    """What ``environment.json`` holds."""

    python: str
    system: str
    cpu: str
    date: str
    packages: dict[str, str]


def environment_facts() -> Facts:
    """This machine, these versions, now (UTC)."""
    from autocompress.hardware.profile import cpu_description

    versions = {"autocompress": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_description(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": versions,
    }
