"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Stages:
    """Seconds by stage.

    Stages may lie in one another: a second counts for the innermost one alone, so that together they are the time that
    passed, and what recovery spends on training is told apart from what it spends on exporting and measuring.

    Args:
        clock: gives seconds.
        spent: seconds of an earlier part of the run, by stage.

    >>> stages = Stages()
    >>> with stages.of("recover"), stages.of("export"):
    ...     pass
    >>> list(stages.seconds)
    ['recover', 'export']
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, spent: Mapping[str, float] | None = None) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = dict(spent or {})

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a stage."""
        self._charge()
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, up to now; in the order in which they were first entered."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        """Gives the time since the last change to the stage that it was spent in."""
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
