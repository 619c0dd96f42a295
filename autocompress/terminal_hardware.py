"""What the command line shows of devices and of predictions for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.units import format_bytes, format_count, format_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autocompress.hardware.predict import Prediction
    from autocompress.hardware.profile import FittedProfile, HardwareProfile, ProfileCheck

_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency_ms": ("latency", format_ms),
    "size_bytes": ("size on disk", format_bytes),
    "peak_memory_bytes": ("peak activations", format_bytes),
    "macs": ("multiply-accumulates", format_count),
    "energy_mj": ("energy", lambda value: f"{value:.3g} mJ"),
}


def prediction_view(model: Path, prediction: Prediction, top: int) -> RenderableType:
    """A prediction's costs with their bands, its slowest kernels, and what of it is a guess."""
    estimate = prediction.estimate
    profile = prediction.profile
    parts: list[RenderableType] = [
        Text(f"{model} on {profile.name} ({target_text(profile)}): predicted, not measured", style="dim"),
        Text(""),
    ]
    costs = _plain_table("", "", "", numbers=(1,))
    for key, (label, shown) in _COSTS.items():
        cost = estimate.costs.get(key)
        if cost is None:
            continue
        if cost.low < cost.high:
            detail = f"{shown(cost.low)} to {shown(cost.high)}"
        else:
            detail = "exact" if cost.source in ("measured", "analytic") else "incomplete"
        costs.add_row(label, Text(shown(cost.value), style="bold"), Text(detail, style="dim"))
    parts.append(costs)
    if top:
        parts += [Text(""), _kernels(prediction, top)]
    if prediction.extrapolated and profile.validity is not None:
        low, high = (format_ms(limit) for limit in profile.validity.latency_ms)
        parts += [Text(""), Text(f"an extrapolation: the profile was measured on models of {low} to {high}", "yellow")]
    for note in estimate.notes:
        parts += [Text(""), Text(note, "yellow")]
    if estimate.unmodelled:
        parts += [
            Text(""),
            Text(f"never measured, priced by what is nearest: {', '.join(estimate.unmodelled)}", "yellow"),
        ]
    return Group(*parts)


def _kernels(prediction: Prediction, top: int) -> Table:
    total = sum(prediction.estimate.per_kernel.values())
    kinds = {kernel.name: f"{kernel.op} as {kernel.kind}" for kernel in prediction.kernels}
    ordered = sorted(prediction.estimate.per_kernel.items(), key=lambda item: -item[1])
    headings = (f"slowest of {len(ordered)}", "latency", "share", *(["class"] if kinds else []))
    table = _plain_table(*headings, numbers=(1, 2))
    for name, milliseconds in ordered[:top]:
        share = f"{milliseconds / total:.1%}" if total else ""
        row: list[RenderableType] = [Text(name), format_ms(milliseconds), share, Text(kinds.get(name, ""), style="dim")]
        table.add_row(*row[: len(headings)])
    rest = sum(milliseconds for _, milliseconds in ordered[top:])
    if rest:
        table.add_row(Text("the rest", style="dim"), format_ms(rest), f"{rest / total:.1%}")
    return table


def profile_view(profile: HardwareProfile) -> RenderableType:
    """What a profile knows, from what, and how far its predictions can be trusted."""
    from autocompress.hardware.profile import FittedProfile

    heading = [Text(f"{profile.name}: {target_text(profile)}", style="bold")]
    if isinstance(profile, FittedProfile):
        return Group(*heading, *_fitted(profile))
    parts: list[RenderableType] = [Text(profile.description, "dim")] if profile.description else []
    parts.append(Text(f"computes in {', '.join(profile.precisions)}"))
    parts.append(Text(trust_text(profile)))
    return Group(*heading, *parts)


def _fitted(profile: FittedProfile) -> list[RenderableType]:
    """Its kernel classes, and its errors on models it was not fitted to."""
    origin = profile.provenance
    table = _plain_table("kernel class", "kernels", "mean error", numbers=(1, 2))
    for kind, cost in profile.kernels.items():
        table.add_row(Text(kind), str(cost.samples), f"{cost.mape:.1%}")
    parts: list[RenderableType] = [
        Text(f"{origin.cpu}, {origin.cores} cores; measured {origin.measured_at} in {origin.seconds:.0f} s", "dim"),
        Text(""),
        table,
        Text(""),
    ]
    if profile.holdout is not None:
        held = profile.holdout
        ranks = f"Kendall tau {held.kendall_tau:.3f}"
        if held.spearman is not None:
            ranks += f", Spearman {held.spearman:.3f}"
        parts.append(
            Text(
                f"{held.models} whole models held out of the fit: mean error {held.mape:.1%}, largest {held.max:.1%}, "
                f"{ranks}"
            )
        )
    parts.append(Text(f"two measurements of one model lie {profile.repeat_floor:.1%} apart", style="dim"))
    return parts


def checks_view(checks: Sequence[ProfileCheck]) -> RenderableType:
    """What was found in a profile, with the remedy of each fault."""
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        detail = f"{check.detail}; {check.remedy}" if check.remedy else check.detail
        table.add_row(Text(check.level, style=styles[check.level]), Text(check.name), Text(detail, style="dim"))
    return table


def trust_text(profile: HardwareProfile) -> str:
    """Whether predictions were compared with measurements, and how far off they may be."""
    held = getattr(profile, "holdout", None)
    if held is not None:
        return f"validated: {held.mape:.1%} mean error on models held out of the fit"
    return f"{'validated' if profile.validated else 'not validated'}, within {profile.error_band:.0%}"


def target_text(profile: HardwareProfile) -> str:
    """The runtime, threads and batch that a profile's figures hold for."""
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    version = "" if profile.runtime_version == "any" else f" {profile.runtime_version}"
    return f"{profile.runtime}{version}, {threads}, batch {profile.batch}"


def _plain_table(*headings: str, numbers: tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=any(headings))
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if place in numbers else "left", no_wrap=place in numbers)
    return table
