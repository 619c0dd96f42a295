"""One search on a very small model, shared by all end-to-end tests, and others beside it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autocompress.front import LoadedFront, load_front
from autocompress.tasks import load_task
from autocompress.tasks.base import Task
from tests.e2e.tools import TASK, CommandLine, Result, finish

DIGITS_BUDGET_S = 30.0


@dataclass(frozen=True)
class Run:
    """A finished search.

    Attributes:
        path: its directory.
        options: what it was started with, without ``--out``.
        result: how the process ended.
    """

    path: Path
    options: tuple[str, ...]
    result: Result

    @property
    def front(self) -> LoadedFront:
        return load_front(self.path)


@dataclass(frozen=True)
class Started:
    """A search that goes on."""

    path: Path
    options: tuple[str, ...]
    process: subprocess.Popen[str]
    begun: float


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("e2e"))


@pytest.fixture(scope="session")
def digits_started(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Started | None]:
    """The embedded default, begun beside the search of ``run`` where a test wants it: each takes a minute.

    Its cache is its own: measured beside each other, the two would leave one of two profiles of the machine there.
    """
    if not any("digits" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("digits")
    path = folder / "run"
    options = ("--task", "digits", "--time-budget", f"{DIGITS_BUDGET_S:g}s", "--seed", "0")
    process = CommandLine(folder).start("search", *options, "--out", path)
    yield Started(path, options, process, time.monotonic())
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def digits(digits_started: Started) -> Run:
    """The embedded default, from nothing: the original is trained, the machine measured, a time budget kept."""
    result = finish(digits_started.process, digits_started.begun)
    assert result.code == 0, result.err
    return Run(digits_started.path, digits_started.options, result)


@pytest.fixture(scope="session")
def run(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory, digits_started: Started | None) -> Run:
    """The example's model, searched with few trials: enough to begin the sampler's own choices."""
    options = (*cli.own_task, "--trials", "48", "--seed", "0")
    path = tmp_path_factory.mktemp("runs") / "own"
    result = cli("search", *options, "--out", path)
    assert result.code == 0, result.err
    return Run(path, options, result)


@pytest.fixture(scope="session")
def task(run: Run, cli: CommandLine) -> Task:
    """The task of ``run`` in this process, with the very weights that were compressed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
        return load_task(TASK, data=cli.weights)
