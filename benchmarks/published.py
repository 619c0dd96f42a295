"""Compares analytic profiles with what others measured on those devices: ``python -m benchmarks.published``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from autocompress.graph.read import read_model
from autocompress.hardware.analytic_profile import AnalyticProfile, Published
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import list_hardware, load_hardware
from autocompress.plan import INT8_WEIGHT, CompressionPlan, LayerPlan, ModelGraph
from autocompress.tasks.registry import MODELS
from autocompress.tasks.vision import import_torchvision


@cache
def graph_of(model: str, resolution: int) -> ModelGraph:
    """A model by its name in a profile: one of the project's or torchvision's, ``NAME of width W`` included."""
    name, _, width = model.partition(" of width ")
    if name in MODELS:
        own: nn.Module = MODELS.load(name)(classes=10, channels=3).eval()
        return read_model(own, (torch.zeros(1, 3, resolution, resolution),))[0]
    models = import_torchvision().models
    arguments: dict[str, float | bool] = {"width_mult": float(width)} if width else {}
    if name == "googlenet":
        arguments |= {"aux_logits": False, "init_weights": False}
    module: nn.Module = getattr(models, name)(**arguments).eval()
    return read_model(module, (torch.zeros(1, 3, resolution, resolution),))[0]


def predicted_ms(profile: AnalyticProfile, figure: Published) -> float:
    """What the profile predicts for a published measurement."""
    skeleton = cost_model(profile.at(figure.threads, None)).lower(graph_of(figure.model, figure.resolution or 224))
    layer = LayerPlan(compute="int8", storage=INT8_WEIGHT) if figure.precision == "int8" else LayerPlan()
    return float(skeleton.price([CompressionPlan(layers=dict.fromkeys(skeleton.layer_names, layer))]).latency_ms[0])


def rows() -> Iterator[tuple[AnalyticProfile, Published, float]]:
    """Every published figure of every shipped profile, with its prediction."""
    for name in list_hardware()[1:]:
        profile = load_hardware(name)
        if isinstance(profile, AnalyticProfile):
            for figure in profile.published:
                yield profile, figure, predicted_ms(profile, figure)


def main() -> None:
    """Prints the table of ``hardware_profiles/README.md``."""
    print("| profile | model | type | input | published ms (by) | predicted ms | error |")
    print("|---|---|---|---|---|---|---|")
    for profile, figure, predicted in rows():
        error = f"{predicted / figure.latency_ms - 1:+.0%}" + (" (used)" if figure.used else "")
        shown = f"{figure.latency_ms:g} ({figure.runtime})"
        print(
            f"| {profile.name} | {figure.model} | {figure.precision} | {figure.resolution} | {shown} | "
            f"{predicted:.3g} | {error} |"
        )


if __name__ == "__main__":
    main()
