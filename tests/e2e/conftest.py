"""One search on a very small model, shared by all end-to-end tests, and others beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from autocompress.front import LoadedFront, load_front
from autocompress.tasks import load_task
from autocompress.tasks.base import Task
from tests.e2e.tools import TASK, CommandLine, Result


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


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("e2e"))


@pytest.fixture(scope="session")
def run(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Run:
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
