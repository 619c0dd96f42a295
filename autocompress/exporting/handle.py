"""An export read back from its folder: its numbers and the ways to run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.exporting.metrics import ARTIFACT, ORIGINAL, ExportMetrics, read_metrics

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import nn

    from autocompress.plan import CompressionPlan


@dataclass(frozen=True)
class ExportedModel:
    """One exported model.

    Attributes:
        path: the folder with ``model.onnx``, ``original.onnx``, ``model.safetensors``, ``plan.json``, ``metrics.json``.
        metrics: what was measured.

    >>> model = autocompress.export("resnet8", out="exports/digits")  # doctest: +SKIP
    >>> model.session().run(None, {"x": images})  # doctest: +SKIP
    """

    path: Path
    metrics: ExportMetrics

    @property
    def onnx_path(self) -> Path:
        """The exported file."""
        return self.path / ARTIFACT

    @property
    def original_path(self) -> Path:
        """The fp32 original, exported the same way, which the export was measured against."""
        return self.path / ORIGINAL

    @property
    def plan(self) -> CompressionPlan:
        """What each layer computes in and is stored as."""
        from autocompress.export.checkpoint import read_plan

        return read_plan(self.path)[1]

    def load(self) -> nn.Module:
        """The exported model as a torch module, rebuilt from ``model.safetensors`` and ``plan.json``."""
        from autocompress.export.checkpoint import load_compressed
        from autocompress.methods.simulation import build_compressed

        return build_compressed(load_compressed(self.path))

    def session(self, threads: int | None = None) -> InferenceSession:
        """A plain onnxruntime session of the file, with the threads it was timed at unless others are given."""
        from autocompress.runtime.onnxruntime import make_session

        return make_session(self.onnx_path, threads=self.metrics.threads if threads is None else threads)


def load_export(folder: str | Path) -> ExportedModel:
    """Reads an export from its folder; imports no torch until it is loaded or run.

    Raises:
        UsageError: the folder holds no export.
    """
    path = Path(folder)
    return ExportedModel(path, read_metrics(path))
