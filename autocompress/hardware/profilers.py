"""Sessions that time their kernels, one class for each runtime, all of them read into the same classes and features."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from autocompress.hardware.fitting import ONNXRUNTIME, OPENVINO, Noise
from autocompress.hardware.reading import TimedKernel
from autocompress.registry import Registry

PROFILERS = Registry(
    "profiler",
    {
        "onnxruntime": "autocompress.hardware.reading:ProfiledSession",
        "openvino": "autocompress.hardware.openvino_reading:OpenvinoProfile",
    },
)
"""By the name of the runtime."""

_NOISE = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO}


class Profiled(Protocol):
    """A model in a session that times its kernels."""

    def run(self) -> None:
        """Runs it, once or a few times."""

    def finish(self, block: int) -> list[TimedKernel]:
        """Ends timing; ``block`` is how many channels the runtime packs together."""


def noise_of(runtime: str) -> Noise:
    """What the times of a runtime's profiler are worth."""
    return _NOISE.get(runtime, ONNXRUNTIME)


def profiled(runtime: str, model: bytes, feed: dict[str, np.ndarray], threads: int) -> Profiled:
    """Opens a model in a runtime's profiler."""
    made: Profiled = PROFILERS.load(runtime)(model, feed, threads)
    return made
