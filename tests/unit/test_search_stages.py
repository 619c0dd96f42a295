"""Where the time goes: each second counts once, for the innermost stage."""

from __future__ import annotations

import pytest

from autocompress.search.stages import Stages


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_second_counts_for_the_innermost_stage_alone() -> None:
    clock = Clock()
    stages = Stages(clock)
    with stages.of("recover"):
        clock.now += 5
        with stages.of("export"):
            clock.now += 2
            with stages.of("measure"):
                clock.now += 1
        clock.now += 3
        with stages.of("export"):
            clock.now += 4
        assert stages.seconds == {"recover": 8, "export": 6, "measure": 1}
    clock.now += 50  # between stages nothing counts
    with stages.of("recover"):
        clock.now += 1
    assert stages.seconds == {"recover": 9, "export": 6, "measure": 1}


def test_a_stage_that_raises_has_taken_its_time() -> None:
    clock = Clock()
    stages = Stages(clock)

    def fail() -> None:
        with stages.of("outer"), stages.of("inner"):
            clock.now += 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with stages.of("outer"):
        clock.now += 1
    assert stages.seconds == {"outer": 1, "inner": 2}
