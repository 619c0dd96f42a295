"""What every command of the command line shares: its console, its ``--json``, its exit codes and its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

INTERRUPTED = 130
CHECKS_FAILED = 1

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def console(*, error: bool = False) -> Console:
    """A console on stdout or stderr."""
    # A pipe has no width: rich would take 80 columns and fold the tables that are read by other programs.
    found = Console(stderr=error, soft_wrap=False)
    return found if found.is_terminal else Console(stderr=error, width=200)


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """Lets other signals end what is inside as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in signals}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
