"""Progress of work inside a stage that has a bar of its own."""

from __future__ import annotations

from autocompress.progress import Progress


class Quiet:
    """Lets steps pass without moving the bar of the stage they belong to; notes go through."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, total: int | None = None) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        return None

    def note(self, **values: object) -> None:
        self._progress.note(**values)
