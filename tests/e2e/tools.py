"""Runs the real command line in processes of its own, as a user would, on the model of ``examples/own_model.py``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TASK = "own_model:task"
TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Result:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float


class CommandLine:
    """``python -m autocompress`` with a cache and a home of its own.

    Args:
        folder: what the processes may write to besides their run directories.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cwd = folder / "cwd"
        self.weights = folder / "weights"
        for path in (self.cwd, self.weights):
            path.mkdir()

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            **os.environ,
            "AUTOCOMPRESS_CACHE": str(self.folder / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "150",
        }

    @property
    def own_task(self) -> list[str]:
        """The options of a search on the example's model, whose weights are trained once."""
        return ["--task", TASK, "--data", str(self.weights)]

    def start(self, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "autocompress", *map(str, words)],
            cwd=self.cwd,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Under nohup and in background jobs of a shell Ctrl-C's signal is ignored, and children inherit that.
            preexec_fn=_heed_interrupts,
        )

    def __call__(self, *words: object) -> Result:
        begun = time.monotonic()
        process = self.start(*words)
        return finish(process, begun)

    def interrupt(self, when: Callable[[], bool], *words: object) -> Result:
        """Sends Ctrl-C's signal once ``when`` holds."""
        begun = time.monotonic()
        process = self.start(*words)
        while process.poll() is None and not when():
            time.sleep(0.02)
            if time.monotonic() - begun > TIMEOUT_S:
                process.kill()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        return finish(process, begun)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(process: subprocess.Popen[str], begun: float) -> Result:
    """Waits for a process and takes what it said."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    # Python ends by the signal itself where Ctrl-C came inside exec("..."), handled or not; shells call both 130.
    code = 128 + signal.SIGINT if process.returncode == -signal.SIGINT else process.returncode
    return Result(code, out, err, time.monotonic() - begun)


def files_of(folder: Path) -> set[str]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
