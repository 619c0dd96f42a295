"""ONNX Runtime on the CPU: sessions, what they execute, and how long they take."""

from autocompress.runtime.kernels import Kernel, KernelReport, check_kernels, executed_kernels
from autocompress.runtime.session import Batch, make_session, run_batches, version
from autocompress.runtime.timing import LatencyStats, measure_latency

__all__ = [
    "Batch",
    "Kernel",
    "KernelReport",
    "LatencyStats",
    "check_kernels",
    "executed_kernels",
    "make_session",
    "measure_latency",
    "run_batches",
    "version",
]
