"""How long work reports on itself; the command line renders it, a library caller may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; ``total`` is its number of steps where that is known."""

    def advance(self, amount: int = 1) -> None:
        """Steps of the current stage are done."""

    def note(self, **values: object) -> None:
        """Facts worth showing beside the bar: best points so far, the loss, seconds left."""


class SilentProgress:
    """Shows nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        return None

    def note(self, **values: object) -> None:
        return None
