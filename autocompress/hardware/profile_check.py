"""Checks a profile file: what is wrong with it, what sets this machine apart from it, and what to do about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from autocompress.errors import UsageError
from autocompress.hardware.analytic_profile import OP_CLASSES, AnalyticProfile
from autocompress.hardware.kernels import KINDS
from autocompress.hardware.profile import FittedProfile, HardwareProfile, ProfileCheck, differences
from autocompress.hardware.profile_file import DIGEST

Profile = Annotated[FittedProfile | AnalyticProfile, Field(discriminator="kind")]

_HEAVY = ("fp32", "int8")
_POOR = 0.15


def profile_schema() -> dict[str, Any]:
    """The JSON Schema of profile files; ``hardware_profiles/schema.json`` is a copy of it."""
    schema: dict[str, Any] = TypeAdapter(Profile).json_schema()
    digest = {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "Written with the file: a digest of each field, which shows what was edited since.",
    }
    for name in ("FittedProfile", "AnalyticProfile"):
        schema["$defs"][name]["properties"][DIGEST] = digest
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "autocompress hardware profile",
        **schema,
    }


def check_profile(path: Path) -> list[ProfileCheck]:
    """Everything worth knowing before a profile file is relied on; errors first.

    Each finding is ``ok``, a ``warning`` or an ``error``, and says what to do about it.
    """
    try:
        profile, edited = HardwareProfile.read(path)
    except UsageError as error:
        return [_found("file", "error", str(error), "correct the file, or make it again with 'autocompress profile'")]
    checks = [_found("file", "ok", f"{profile.kind} profile {profile.name!r} of version {profile.version}")]
    if edited:
        detail = f"edited by hand since it was measured: {', '.join(edited)}"
        remedy = "measure it again, or remove its 'digest' if the edit is meant"
        checks.append(_found("edited", "warning", detail, remedy))
    checks += _fitted(profile) if isinstance(profile, FittedProfile) else []
    checks += _analytic(profile) if isinstance(profile, AnalyticProfile) else []
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted(checks, key=lambda check: order[check.level])


def _found(name: str, level: Any, detail: str, remedy: str = "") -> ProfileCheck:
    return ProfileCheck(name=name, level=level, detail=detail, remedy=remedy)


def _fitted(profile: FittedProfile) -> list[ProfileCheck]:
    apart = differences(profile)
    checks = list(apart)
    if not apart:
        checks.append(_found("machine", "ok", f"measured on this processor with the installed {profile.runtime}"))
    cores = os.cpu_count() or 1
    if profile.threads > cores:
        same = not any(check.name == "processor" for check in apart)
        detail = f"made for {profile.threads} threads; this machine has {cores} cores"
        remedy = f"profile again with --threads {cores} or fewer to search on this machine"
        checks.append(_found("threads", "error" if same else "warning", detail, remedy))
    unknown = sorted(set(profile.kernels) - set(KINDS))
    if unknown:
        detail = f"kernel classes that this autocompress does not know: {', '.join(unknown)}"
        checks.append(_found("kernels", "warning", detail, "they are never used; measure again"))
    free = sorted(
        kind for kind, cost in profile.kernels.items() if KINDS.get(kind) in _HEAVY and not any(cost.coefficients)
    )
    if free:
        detail = f"kernel classes that cost nothing: {', '.join(free)}"
        checks.append(_found("coefficients", "error", detail, "no computation is free; measure again"))
    missing = [kind for kind, family in KINDS.items() if family in _HEAVY and kind not in profile.kernels]
    if missing:
        detail = f"never measured: {', '.join(missing)}"
        checks.append(_found("coverage", "warning", detail, "plans that run them are priced by a similar class"))
    if profile.holdout is None:
        checks.append(_found("hold-out", "warning", "no errors on held-out models are known", "measure again"))
    else:
        text = f"{profile.holdout.mape:.1%} mean error on {profile.holdout.models} held-out models"
        poor = profile.holdout.mape > _POOR
        remedy = "measure again on a quieter machine" if poor else ""
        checks.append(_found("hold-out", "warning" if poor else "ok", text, remedy))
    return checks


def _analytic(profile: AnalyticProfile) -> list[ProfileCheck]:
    checks = []
    unsourced = unsourced_fields(profile)
    if unsourced:
        detail = f"numbers without a source: {', '.join(unsourced)}"
        checks.append(_found("sources", "warning", detail, "say in 'sources' where each comes from"))
    calibrated = f", calibrated on {len(profile.calibrated_on)} measurements" if profile.calibrated_on else ""
    detail = f"not validated by measurements: predictions within a factor of {1 + profile.error_band:g}{calibrated}"
    command = f"autocompress profile --calibrate FILE --hardware {profile.name} --out NEW"
    remedy = f"measure two or more models on the device and run '{command}'"
    checks.append(_found("validated", "warning", detail, remedy))
    return checks


def unsourced_fields(profile: AnalyticProfile) -> list[str]:
    """The numbers of a profile that ``sources`` says nothing of, by their names there."""
    named = profile.sources
    wanted = ["precisions", "error_band", "launch_us", "run_us"]
    wanted += [f"peak_gmacs.{precision}" for precision in profile.peak_gmacs]
    wanted += [f"efficiency.{name}" for name in OP_CLASSES]
    wanted += [f"levels.{level.name}" for level in profile.levels]
    optional = {
        "channel_step": bool(profile.channel_step),
        "memory": profile.memory != type(profile.memory)(),
        "energy": profile.energy is not None,
        "host": profile.host is not None,
        "weights_gb_per_s": profile.weights_gb_per_s is not None,
        "bit_rule": profile.bit_rule != "none",
        "floats_as": profile.floats_as is not None,
        "max_threads": profile.max_threads > 1,
        "thread_share": profile.max_threads > 1,
        "scale_compute": profile.scale_compute != 1.0,
        "scale_overhead": profile.scale_overhead != 1.0,
    }
    wanted += [name for name, used in optional.items() if used]
    return [name for name in wanted if name not in named and name.partition(".")[0] not in named]
