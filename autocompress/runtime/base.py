"""What every runtime offers: sessions of an ONNX artifact, and what of it they execute.

A runtime is a module of this folder and a line in ``RUNTIMES``; another package adds one with an entry point in the
group ``autocompress.runtime``.  How its kernels become classes and features is said in ``hardware/profilers.py``, how
plans become its kernels in ``hardware/models.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from autocompress.errors import UsageError
from autocompress.registry import Registry

if TYPE_CHECKING:
    from autocompress.runtime.kernels import KernelReport

Artifact = Path | str | bytes
"""An ONNX file, or its contents."""

DEFAULT_RUNTIME = "onnxruntime"

RUNTIMES = Registry(
    "runtime",
    {
        "onnxruntime": "autocompress.runtime.onnxruntime:OnnxRuntime",
        "openvino": "autocompress.runtime.openvino:OpenvinoRuntime",
    },
)


@dataclass(frozen=True)
class InputInfo:
    """An input of a model: ``shape`` has None where the artifact leaves a size open, ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class Session(Protocol):
    """A model that is ready to run."""

    @property
    def inputs(self) -> Sequence[InputInfo]:
        """In the model's own order."""

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, in the model's own order, for inputs by name."""


class Runtime(Protocol):
    """One runtime on the CPU."""

    name: str

    def version(self) -> str:
        """Part of what a measured latency holds for."""

    def session(self, model: Artifact, threads: int = 1, batch: int | None = None) -> Session:
        """A session as a user would open it.

        Args:
            model: the artifact.
            threads: threads of one run.
            batch: samples of every run, where that is known beforehand: a runtime that compiles for fixed shapes does
                so.  None keeps the batch open.
        """

    def executed_kernels(self, model: Artifact, threads: int = 1) -> KernelReport:
        """Every kernel that the runtime executes for the artifact, as ``check_kernels`` takes it."""


def load_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UsageError: no such runtime, or its package is not installed.
    """
    made: Runtime = RUNTIMES.load(name)()
    return made


def runtime_here(name: str) -> Runtime:
    """The runtime of a target where it is one of ours, else the default: a device's own may run only there."""
    return load_runtime(name if name in RUNTIMES else DEFAULT_RUNTIME)


def run_batches(session: Session, batches: Iterable[np.ndarray]) -> np.ndarray:
    """The first output for every batch of the first input, one after another along the batch axis."""
    name = session.inputs[0].name
    return np.concatenate([session.run({name: batch})[0] for batch in batches])


def check_session(model: Artifact, threads: int) -> None:
    """What no runtime can open is refused alike by all of them."""
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"no model file at {str(model)!r}")
    if threads < 1:
        raise UsageError(f"threads={threads}: a session needs at least one thread")
