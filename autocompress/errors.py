"""Errors a user can act on: each says what was given, what is allowed and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress.plan import FrontPoint


class AutocompressError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 2


class UsageError(AutocompressError):
    """What was asked for is not possible as written: a name, a value, a file."""


class ArtifactError(AutocompressError):
    """An exported file is not what was asked for: nothing of it is kept."""

    exit_code = 1


class InfeasibleError(AutocompressError):
    """No compressed model meets the budgets; ``nearest`` is the point that came closest."""

    exit_code = 3

    def __init__(self, message: str, nearest: FrontPoint | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


def nearest_names(given: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names most like ``given``, best first.

    >>> nearest_names("resnet2O", ["resnet20", "mobilenetv2"])
    ['resnet20']
    """
    return difflib.get_close_matches(given, list(known), n=count, cutoff=0.0)


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a list of known ones."""
    names = sorted(known)
    hint = f"; nearest: {nearest_names(given, names)[0]!r}" if names else ""
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return UsageError(f"unknown {kind} {given!r}{hint}; known: {shown or 'none'}")
