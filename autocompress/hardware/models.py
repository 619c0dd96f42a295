"""Cost models by the kind of profile they read: what prices plans on a device."""

from __future__ import annotations

from typing import Any, Protocol

from autocompress.hardware.kernels import Work
from autocompress.hardware.profile import HardwareProfile
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import ModelGraph
from autocompress.registry import Registry

COST_MODELS = Registry(
    "cost model",
    {
        "analytic": "autocompress.hardware.analytic:AnalyticCostModel",
        "fitted-onnxruntime": "autocompress.hardware.cost:FittedCostModel",
        "fitted-openvino": "autocompress.hardware.openvino_cost:OpenvinoCostModel",
    },
)
"""A fitted profile knows the kernels of one runtime, so its model is named by both; an analytic one knows none."""


class CostModel(Protocol):
    """Says what plans cost on a device."""

    @property
    def profile(self) -> HardwareProfile:
        """The device."""

    def lower(self, graph: ModelGraph) -> Skeleton:
        """Prepares a graph: everything that is the same for all plans is done here, once."""

    def kernel_us(self, kind: str, work: Work) -> float:
        """Microseconds of one kernel inside a run, its class being one of ``kernels.KINDS``."""

    def run_us(self, weight_bytes: float) -> float:
        """Microseconds of a run beside its kernels', for a model with so many bytes of weights."""


def cost_model(profile: HardwareProfile) -> CostModel:
    """The cost model that reads a profile.

    Raises:
        UsageError: nothing prices kernels of the profile's runtime.
    """
    key = profile.kind if profile.kind != "fitted" else f"fitted-{profile.runtime}"
    made: Any = COST_MODELS.load(key)
    model: CostModel = made(profile)
    return model
