"""The fitted cost model for OpenVINO: all of ``cost.py``, with OpenVINO's kernels."""

from __future__ import annotations

from autocompress.hardware.cost import FittedCostModel, FittedSkeleton
from autocompress.hardware.openvino_lowering import OpenvinoLowering
from autocompress.plan import ModelGraph


class OpenvinoSkeleton(FittedSkeleton):
    """Prices a graph's plans by the classes of the kernels that OpenVINO makes of them."""

    lowering = OpenvinoLowering


class OpenvinoCostModel(FittedCostModel):
    """Prices plans with the kernel costs of a profile that was measured with OpenVINO."""

    def lower(self, graph: ModelGraph) -> OpenvinoSkeleton:
        """Prepares a graph: everything that is the same for all plans is done here, once."""
        return OpenvinoSkeleton(graph, self.profile)
