"""What a search would choose from, priced but not searched: ``--dry-run``."""

from __future__ import annotations

import math
from typing import Any

from autocompress.config import RunConfig
from autocompress.graph.macs import count_macs
from autocompress.graph.read import read_model
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import HardwareProfile
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan
from autocompress.search.context import prices
from autocompress.search.menu import Menu
from autocompress.search.pruning import prune
from autocompress.search.samplers import make_sampler
from autocompress.search.study import sampler_settings
from autocompress.search.target import counted_costs, executed_types, is_present, limits_of
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import Task


def preview(config: RunConfig, space: SearchSpace, task: Task, profile: HardwareProfile) -> dict[str, Any]:
    """The model as read, the menu, and what the plans at its corners are predicted to cost."""
    graph, _ = read_model(task.model, task.example_inputs)
    menu = Menu(graph, space, config.freeze, config.origin("freeze"))
    skeleton = cost_model(profile).lower(graph)
    limits = limits_of(config, profile)
    counted = counted_costs(config, limits, skeleton.estimate(CompressionPlan()))
    menu = prune(menu, skeleton, counted, executed_types(profile))
    with config.citing("sampler"):
        make_sampler(config.sampler, sampler_settings(menu, len(config.objectives) - 1))
    corners = {
        "dense fp32": menu.uniform(1.0, "fp32", 32),
        "uniform int8": menu.uniform(1.0, "int8", 8),
        "half the channels, int8": menu.uniform(0.5, "int8", 8),
        "least, int8 with 4-bit weights": menu.uniform(0.0, "int8", 4),
    }
    plans = {name: menu.plan(choices) for name, choices in corners.items()}
    macs, unsupported = count_macs(task.model, task.example_inputs)
    return {
        "task": task.name,
        "model": task.model_name,
        "layers": len(graph.compressible),
        "parameters": graph.parameters(),
        "macs": graph.macs(),
        "macs_by_fvcore": macs,
        "operators_fvcore_leaves_out": unsupported,
        "channel_groups": {group.id: group.size for group in graph.groups},
        "cannot_be_compressed": graph.skipped,
        "knobs": len(menu.knobs),
        "plans": f"10^{sum(math.log10(len(knob.options)) for knob in menu.knobs):.1f}",
        "left_out": menu.dropped,
        "hardware": profile.name,
        "measured_here": is_present(config, profile),
        "budgets": limits,
        "predicted": {name: _costs(skeleton, plan) for name, plan in plans.items()},
    }


def _costs(skeleton: Skeleton, plan: CompressionPlan) -> dict[str, float]:
    found = prices(skeleton, plan)
    shown = {"latency_ms": round(found["latency_ms"], 4), "size_bytes": int(found["size_bytes"])}
    shown["peak_memory_bytes"] = int(found["peak_memory_bytes"])
    if "energy_mj" in found:
        shown["energy_mj"] = float(f"{found['energy_mj']:.4g}")
    return shown
