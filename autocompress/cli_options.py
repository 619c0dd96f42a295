"""What every command of the command line shares: its console, its ``--json``, its exit codes and its end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

INTERRUPTED = 130
CHECKS_FAILED = 1
RESENT_S = 0.05

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def console(*, error: bool = False) -> Console:
    """A console on stdout or stderr."""
    # A pipe has no width: rich would take 80 columns and fold the tables that are read by other programs.
    found = Console(stderr=error, soft_wrap=False)
    return found if found.is_terminal else Console(stderr=error, width=200)


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """Lets Ctrl-C end what is inside wherever it comes, and other signals end it as Ctrl-C does.

    Python drops an exception that comes while it runs a finalizer or a weak reference's callback, where libraries spend
    much of their time; an interrupt that is dropped there is sent again.  Extensions may turn it into an error of their
    own (numpy does, where it compares structured arrays): whatever ends what is inside after an interrupt is one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    def dropped(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            hook(lost)
            return
        # From another thread and a little later: raised from here it would be dropped again.
        timer = threading.Timer(RESENT_S, os.kill, (os.getpid(), signals[0]))
        timer.start()
        waiting.append(timer)

    heard: list[int] = []
    waiting: list[threading.Timer] = []
    # Where Ctrl-C is ignored, as in the background of a script, it stays so.
    ctrl_c = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.default_int_handler else set()
    before = {name: signal.signal(name, interrupt) for name in ctrl_c.union(signals)}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    except Exception as error:
        if heard:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in waiting:
            timer.cancel()
        sys.unraisablehook = hook
        for name, handler in before.items():
            signal.signal(name, handler)
