"""Trainings side by side: small networks leave most threads idle, so each gets its share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

import torch

from autocompress.progress import Progress
from autocompress.search.quiet import Quiet

T = TypeVar("T")

MOST = 4
"""Trainings that run at once, at most."""

LEAST_SPEEDUP = 1.2
"""Trainings run side by side where that is so many times faster than one after another."""


HEEDED_S = 0.5
"""An interrupt is heeded within so many seconds."""


class _Stopped(BaseException):
    """Ends a training whose results nobody waits for any more."""


class _UntilStopped(Quiet):
    def __init__(self, progress: Progress, stop: Event) -> None:
        super().__init__(progress)
        self._stop = stop

    def advance(self, amount: int = 1) -> None:
        if self._stop.is_set():
            raise _Stopped


def together(jobs: Sequence[Callable[[Progress], T]], progress: Progress) -> list[T | Exception]:
    """Runs jobs at once, each with its share of the threads; gives the result of each, or what it raised.

    A job is given the progress to advance at every step; after an interrupt that is where it ends.

    Raises:
        OSError: of a job, which is no candidate's fault.
    """
    if len(jobs) == 1:
        return [_attempt(jobs[0], Quiet(progress))]
    threads, stop = torch.get_num_threads(), Event()
    share = max(1, threads // len(jobs))
    try:
        with ThreadPoolExecutor(len(jobs), initializer=torch.set_num_threads, initargs=(share,)) as pool:
            futures = [pool.submit(_attempt, job, _UntilStopped(progress, stop)) for job in jobs]
            try:
                # A wait without an end is only broken by a signal that this very thread receives.
                while wait(futures, HEEDED_S).not_done:
                    continue
            except BaseException:
                stop.set()
                raise
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)


def _attempt(job: Callable[[Progress], T], progress: Progress) -> T | Exception:
    try:
        return job(progress)
    except OSError:
        raise
    except Exception as error:
        return error


def at_once(step_seconds: Callable[[], float]) -> tuple[int, float]:
    """(how many trainings to run at once, the seconds that a step of each then takes).

    Args:
        step_seconds: times a training step with the threads there are.
    """
    threads = torch.get_num_threads()
    count = min(MOST, threads)
    alone = step_seconds()
    if count == 1:
        return 1, alone
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
        shared = max(pool.map(lambda _: step_seconds(), range(count)))
    torch.set_num_threads(threads)
    return (count, shared) if shared * LEAST_SPEEDUP < count * alone else (1, alone)
