"""ONNX Runtime on the CPU: sessions, what they execute, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autocompress.runtime.base import DEFAULT_RUNTIME, Artifact, InputInfo
from autocompress.runtime.kernels import Kernel, KernelReport, check_kernels, executed_kernels
from autocompress.runtime.session import Batch, make_session, run_batches, version
from autocompress.runtime.timing import LatencyStats, measure_latency

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


class OnnxSession:
    """A plain session behind the interface of ``base.Session``."""

    def __init__(self, model: Artifact, threads: int) -> None:
        self._session = make_session(model, threads)
        self.inputs = tuple(
            InputInfo(
                given.name,
                tuple(size if isinstance(size, int) else None for size in given.shape),
                _DTYPES.get(given.type, given.type.removeprefix("tensor(").removesuffix(")")),
            )
            for given in self._session.get_inputs()
        )

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(self._session.run(None, feed))


class OnnxRuntime:
    """ONNX Runtime; the same session serves every batch."""

    name = DEFAULT_RUNTIME
    spins = True

    def version(self) -> str:
        return version()

    def session(self, model: Artifact, threads: int = 1, batch: int | None = None) -> OnnxSession:
        return OnnxSession(model, threads)

    def executed_kernels(self, model: Artifact, threads: int = 1) -> KernelReport:
        return executed_kernels(model, threads)


__all__ = [
    "Batch",
    "Kernel",
    "KernelReport",
    "LatencyStats",
    "OnnxRuntime",
    "OnnxSession",
    "check_kernels",
    "executed_kernels",
    "make_session",
    "measure_latency",
    "run_batches",
    "version",
]
