"""Says in words which options of a knob were left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from autocompress.plan import LayerPlan
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.search.menu import Knob, Option
from autocompress.units import format_bytes, format_count, format_ms

_WORSE: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency_ms": ("faster", format_ms),
    "size_bytes": ("smaller", format_bytes),
    "peak_memory_bytes": ("less memory", format_bytes),
    "energy_mj": ("less energy", lambda value: f"{value:.3g} mJ"),
    "macs": ("fewer MACs", format_count),
}


EVERYWHERE = "every layer"


@dataclass(frozen=True)
class Dominance:
    """Why an option goes: ``by`` is at least as good and costs no more.

    ``costs`` are (cost, the option's, the other's), each from the background that is kindest to the option.
    """

    option: int
    by: int
    costs: tuple[tuple[str, float, float], ...]


def explain(knobs: Sequence[Knob], found: Sequence[Sequence[Dominance]], where: str) -> dict[str, str]:
    """Why options were left out, by knob; what every knob lost alike stands once, under ``EVERYWHERE``.

    ``keep 20: no faster than 24 on local (0.213 against 0.209 ms); int8: no faster than fp32 on local (...)``

    Args:
        knobs: with all their options.
        found: what each of them lost.
        where: the device's name.
    """
    common = _lost_everywhere(knobs, found)
    reasons = {}
    if common:
        shared = [
            f"{format_words(form)}: {_reason(knob.options, item, where)}" for form, (knob, item) in common.items()
        ]
        reasons[EVERYWHERE] = "; ".join(shared)
    for knob, gone in zip(knobs, found, strict=True):
        parts = _parts(knob, [item for item in gone if knob.options[item.option].format not in common], where, common)
        if parts:
            reasons[knob.name] = "; ".join(parts)
    return reasons


def _lost_everywhere(
    knobs: Sequence[Knob], found: Sequence[Sequence[Dominance]]
) -> dict[LayerPlan, tuple[Knob, Dominance]]:
    """The formats that several knobs offer and every one of them lost at every width, with the first reason."""
    seen: dict[LayerPlan, list[bool]] = {}
    first: dict[LayerPlan, tuple[Knob, Dominance]] = {}
    for knob, gone in zip(knobs, found, strict=True):
        lost = {item.option: item for item in gone}
        for index, option in enumerate(knob.options):
            seen.setdefault(option.format, []).append(index in lost)
            if index in lost:
                first.setdefault(option.format, (knob, lost[index]))
    return {form: first[form] for form, flags in seen.items() if len(knobs) > 1 and all(flags)}


def _parts(knob: Knob, found: Sequence[Dominance], where: str, told_already: Collection[LayerPlan]) -> list[str]:
    lost = {item.option: item for item in found}
    options = knob.options
    parts: list[str] = []
    told: set[int] = set()
    widths: dict[int, list[int]] = {}
    for width in dict.fromkeys(option.keep for option in options):
        own = [i for i, option in enumerate(options) if option.keep == width and option.format not in told_already]
        if width is not None and own and all(i in lost for i in own):
            told.update(own)
            widths.setdefault(lost[own[0]].by, []).append(own[0])
    for members in widths.values():
        counts = ", ".join(str(options[i].keep) for i in members)
        parts.append(f"keep {counts}: {_reason(options, lost[members[0]], where)}")
    groups: dict[LayerPlan, list[int]] = {}
    for i in lost:
        if i not in told:
            groups.setdefault(options[i].format, []).append(i)
    for form, members in groups.items():
        offered = [i for i, option in enumerate(options) if option.format == form and i not in told]
        subject = format_words(form)
        if len(members) < len(offered):
            subject = f"keep {', '.join(str(options[i].keep) for i in members)} in {subject}"
        parts.append(f"{subject}: {_reason(options, lost[members[0]], where)}")
    return parts


def _reason(options: Sequence[Option], item: Dominance, where: str) -> str:
    option, by = options[item.option], options[item.by]
    than = []
    if by.keep != option.keep:
        than.append(str(by.keep))
    if by.format != option.format:
        than.append(format_words(by.format))
    *first, last = (f"no {_WORSE[name][0]}" for name, _, _ in item.costs)
    worse = f"{', '.join(first)} and {last}" if first else last
    name, ours, theirs = item.costs[0]
    ours_text, theirs_text = (_WORSE[name][1](value) for value in (ours, theirs))
    if ours_text == theirs_text:
        shown = f"{ours_text} both"
    elif ours_text.partition(" ")[2] == theirs_text.partition(" ")[2] != "":
        shown = f"{ours_text.partition(' ')[0]} against {theirs_text}"
    else:
        shown = f"{ours_text} against {theirs_text}"
    return f"{worse} than {' in '.join(than)} on {where} ({shown})"


def format_words(form: LayerPlan) -> str:
    """``fp32``, ``int8``, ``int8 with 4-bit weights``."""
    own = 32 if form.compute == "fp32" else int8_weight_bits()
    return form.compute if form.storage.bits == own else f"{form.compute} with {form.storage.bits}-bit weights"
