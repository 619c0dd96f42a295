"""Ctrl-C ends a command wherever it comes."""

from __future__ import annotations

import signal
import time
import weakref

import pytest

from autocompress.cli_options import interruptible


class _Thing:
    """What a weak reference can point to."""


def test_an_interrupt_inside_a_callback_that_python_would_drop_ends_the_command_all_the_same() -> None:
    def command() -> None:
        thing = _Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        with interruptible(signal.SIGTERM):
            del thing
            assert reference() is None
            time.sleep(5.0)

    with pytest.raises(KeyboardInterrupt):
        command()


def test_other_signals_end_it_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
