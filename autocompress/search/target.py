"""What the target device asks of a search: whether it is here to be measured, and what it can hold."""

from __future__ import annotations

from collections.abc import Mapping

from autocompress.config import MOST_OBJECTIVES, OBJECTIVES, RunConfig
from autocompress.errors import UsageError
from autocompress.hardware.analytic_profile import AnalyticProfile
from autocompress.hardware.profile import LOCAL, FittedProfile, HardwareProfile, cpu_description
from autocompress.plan import Compute, Estimate, Target

BANDED = ("latency_ms", "energy_mj", "peak_memory_bytes")
"""Costs that only a measurement makes certain: of a device that is not here, budgets hold on the band's upper end."""

PLANNED: tuple[Compute, ...] = ("fp32", "int8")


def is_present(config: RunConfig, profile: HardwareProfile) -> bool:
    """Whether models can be measured on the target: it is this machine, or its profile was measured on one like it."""
    if config.hardware == LOCAL:
        return True
    return isinstance(profile, FittedProfile) and profile.provenance.cpu == cpu_description()


def limits_of(config: RunConfig, profile: HardwareProfile) -> dict[str, float]:
    """The budgets asked for, and what the device can hold: its memories are limits whether asked for or not."""
    limits = dict(config.budgets)
    held = {"peak_memory_bytes": profile.memory.ram_bytes, "size_bytes": profile.memory.flash_bytes}
    for name, most in held.items():
        if most is not None:
            limits[name] = min(limits.get(name, float(most)), float(most))
    return limits


def predicted_limits(limits: dict[str, float], dense: Estimate, present: bool, margin: float) -> dict[str, float]:
    """The budgets that predictions are held to, the drop left out.

    Args:
        limits: the budgets.
        dense: the original's estimate, whose bands are taken for those of all plans.
        present: whether the target is here; else budgets hold on the upper end of the band.
        margin: by which predictions are held to less than a latency budget on a device that is here.
    """
    hard = {name: limit for name, limit in limits.items() if name != "drop"}
    for name in hard:
        known = dense.costs.get(name)
        if not present and name in BANDED and known is not None and known.value:
            hard[name] *= known.value / known.high
        elif present and name == "latency_ms":
            hard[name] /= margin
    return hard


def counted_costs(config: RunConfig, limits: Mapping[str, float], dense: Estimate) -> list[str]:
    """The costs that count, latency first: the objectives, the budgets, and the limits that the original breaks.

    What the device can hold does not count where the original already keeps well within it.
    """
    binding = {name for name in limits if name in dense.costs and dense.costs[name].high > limits[name]}
    counted = {*searched_costs(config), *config.objectives, *config.budgets, *binding} - {"error", "drop"}
    return sorted(counted, key=OBJECTIVES.index)


def searched_costs(config: RunConfig) -> tuple[str, ...]:
    """The costs that stitched candidates trade their divergence off against, in the objectives' order.

    The divergence is always one side of that: quality counts as an objective, through its budget, or both.  Where the
    error is the only objective, the costs that have a budget are the other side (plans along a budget's edge come from
    those that are cheaper), and time and size where there is no budget either.
    """
    costs = tuple(name for name in config.objectives if name != "error")
    bound = tuple(name for name in OBJECTIVES if name in config.budgets)
    return costs or bound[: MOST_OBJECTIVES - 1] or ("latency_ms", "size_bytes")


def executed_types(profile: HardwareProfile) -> tuple[str, ...]:
    """The types a layer may be planned in on the device: those it computes in, or hands to something that does."""
    if isinstance(profile, AnalyticProfile):
        return tuple(t for t in PLANNED if profile.host is not None or profile.executed(t) is not None)
    return tuple(t for t in PLANNED if t in profile.precisions)


def knows_energy(profile: HardwareProfile) -> bool:
    """Whether all of a run's energy is known: what a host computes would count as free."""
    hosted = isinstance(profile, AnalyticProfile) and profile.host is not None
    return profile.energy is not None and not hosted


def check_known(config: RunConfig, profile: HardwareProfile) -> None:
    """Refuses an objective or a budget that the profile has no figures for."""
    if config.max_energy_mj is None and "energy_mj" not in config.objectives:
        return
    if knows_energy(profile):
        return
    missing = "has no figures" if profile.energy is None else "has none for the host, which runs what the device cannot"
    key = "max_energy_mj" if config.max_energy_mj is not None else "objectives"
    raise UsageError(
        f"{config.origin(key)}: energy is not known for {profile.name}: its profile {missing}; leave energy out, or "
        "choose --hardware whose profile has it"
    )


def target_of(config: RunConfig, profile: HardwareProfile) -> Target:
    """The target as ``front.json`` names it."""
    return Target(
        hardware=config.hardware,
        runtime=profile.runtime,
        version=profile.runtime_version,
        threads=config.threads,
        batch=config.batch,
    )
