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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt(number: signal.Signals) -> None:
    def library() -> None:
        try:
            signal.raise_signal(number)
            time.sleep(1.0)
        except KeyboardInterrupt:
            raise TypeError("cannot compare") from None

    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt) as caught, interruptible(signal.SIGTERM):
        library()
    assert isinstance(caught.value.__cause__, TypeError)
    assert {name: signal.getsignal(name) for name in handlers} == handlers


def test_without_an_interrupt_an_error_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="cannot compare"), interruptible(signal.SIGTERM):
        raise TypeError("cannot compare")
