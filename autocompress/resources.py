"""Finds the YAML folders that ship with the package: ``search_spaces`` and ``hardware_profiles``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Folder = Literal["search_spaces", "hardware_profiles"]

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(folder: Folder) -> Path:
    """The folder as it stands in a checkout, else as it was installed inside the package.

    The checkout comes first: an editable install reads the files that are being edited.
    """
    checkout = _PACKAGE.parent / folder
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    return _PACKAGE / "_data" / folder


def resource_names(folder: Folder) -> list[str]:
    """The names that can be given instead of a path: the stems of the YAML files there."""
    return sorted(path.stem for path in resource_dir(folder).glob("*.yaml"))


def find_resource(folder: Folder, given: str) -> Path | None:
    """The file that ``given`` means: a path to a YAML file, else a shipped name; None where there is neither."""
    path = Path(given)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if given in resource_names(folder):
        return resource_dir(folder) / f"{given}.yaml"
    return None
