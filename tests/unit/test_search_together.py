"""Trainings side by side: results in order, failures apart, and an end to all of them at an interrupt."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from autocompress.progress import Progress, SilentProgress
from autocompress.search.together import MOST, at_once, together


def test_results_come_in_order_and_failures_apart() -> None:
    both = threading.Barrier(2, timeout=20)

    def good(progress: Progress) -> str:
        both.wait()
        progress.advance()
        return "done"

    def bad(progress: Progress) -> str:
        both.wait()
        raise ValueError("no")

    threads = torch.get_num_threads()
    first, second = together([good, bad], SilentProgress())
    assert first == "done"
    assert isinstance(second, ValueError)
    assert torch.get_num_threads() == threads
    (alone,) = together([lambda progress: torch.get_num_threads()], SilentProgress())
    assert alone == threads


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_no_jobs_fault(count: int) -> None:
    def full(progress: Progress) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        together([full] * count, SilentProgress())


def test_an_interrupt_ends_every_job_at_its_next_step() -> None:
    ended: list[float] = []

    def endless(progress: Progress) -> None:
        try:
            for _ in range(2000):
                time.sleep(0.01)
                progress.advance()
        finally:
            ended.append(time.monotonic())

    started = time.monotonic()
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    with pytest.raises(KeyboardInterrupt):
        together([endless, endless], SilentProgress())
    assert len(ended) == 2
    assert max(ended) - started < 10.0


def test_trainings_run_at_once_where_that_is_faster() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # What takes as long with one thread as with two is run twice at once; what takes twice as long is not.
        assert at_once(lambda: 0.5) == (2, 0.5)
        assert at_once(lambda: 1.0 / torch.get_num_threads()) == (1, 0.5)
        torch.set_num_threads(1)
        assert at_once(lambda: 0.5) == (1, 0.5)
        torch.set_num_threads(16)
        assert at_once(lambda: 0.5)[0] == MOST
    finally:
        torch.set_num_threads(threads)
