"""Says in a few words what a plan does and what a front achieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.front import LoadedFront, Point, budget_text, error_of, points_per_unit
from autocompress.plan import CompressionPlan, LayerPlan, Metric
from autocompress.report.space import SpaceSummary
from autocompress.units import format_bytes, format_ms, format_ratio

WITHIN_POINTS = 1.0
"""The drop in validation quality up to which a point counts as keeping the original's quality."""


def describe_plan(plan: CompressionPlan, space: SpaceSummary) -> str:
    """A plan in words: ``62% of channels, int8 in 18 of 20 layers, 4-bit weights in 7, 300 steps of recovery``."""
    parts = []
    if plan.base.kind == "student":
        count = len(plan.base.dropped)
        if plan.base.init == "fresh":
            parts.append(f"{plan.base.width:g}x student (fresh)")
        elif count:
            parts.append(f"without {count} residual block{'s' if count > 1 else ''}")
    if space.group_sizes:
        kept = sum(space.keep_ratio(plan, group) * size for group, size in space.group_sizes.items())
        share = kept / max(sum(space.group_sizes.values()), 1)
        parts.append("all channels" if share > 0.995 else f"{share:.0%} of channels")
    # A student may lack layers of the original: what its plan does not name is not there.
    names = [name for name in space.layers if name in plan.layers] or list(space.layers)
    layers = [plan.layers.get(name, LayerPlan()) for name in names]
    int8 = sum(layer.compute == "int8" for layer in layers)
    if int8:
        parts.append("all int8" if int8 == len(layers) else f"int8 in {int8} of {len(layers)} layers")
    else:
        parts.append("fp32")
    narrow: dict[int, int] = {}
    for layer in layers:
        if layer.storage.bits < 8:
            narrow[layer.storage.bits] = narrow.get(layer.storage.bits, 0) + 1
    parts += [f"{bits}-bit weights in {count}" for bits, count in sorted(narrow.items())]
    steps = plan.recipe.steps + plan.recipe.qat_steps
    if steps:
        parts.append(f"{steps} steps of recovery")
    return ", ".join(parts)


def quality_text(metric: Metric, value: float) -> str:
    """A quality as people read it: a fraction in percent."""
    return f"{value:.2%}" if metric.unit == "fraction" else f"{value:.4g} {metric.unit}".rstrip()


def drop_text(metric: Metric, drop: float | None, *, unit: bool = True) -> str:
    """A loss with its sign turned: ``-0.63 points``; a gain is ``+``."""
    if drop is None:
        return "unknown"
    word = "points" if metric.unit == "fraction" else metric.unit
    shown = "0.00" if abs(drop) < 0.005 else f"{-drop:+.2f}"
    return f"{shown} {word}".rstrip() if unit else shown


def gains_text(point: Point) -> str:
    """``4.7x faster, 11x smaller`` than the original; slower, larger and merely predicted are said as such."""
    parts = []
    known = "" if point.info.latency_ms.measured is not None else " as predicted"
    times = (point.speedup, f"faster{known}", f"slower{known}")
    for ratio, better, worse in (times, (point.shrink, "smaller", "larger")):
        if ratio is not None:
            parts.append(f"{format_ratio(ratio)} {better}" if ratio >= 1 else f"{format_ratio(1 / ratio)} {worse}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Highlight:
    """One point worth naming, and why."""

    title: str
    point: Point
    gains: str
    detail: str


def highlights(front: LoadedFront) -> list[Highlight]:
    """The points that people ask for first, each once: chosen on validation, told with the test result."""
    close = [point for point in front.points if point.drop is not None and point.drop <= WITHIN_POINTS]
    scope = (
        f"within {WITHIN_POINTS:g} {'point' if points_per_unit(front.front.metric) == 100 else 'unit'} on validation"
    )
    wanted: list[tuple[str, Point]] = []
    if close:
        wanted.append((f"Best trade-off {scope}", max(close, key=front.gain)))
        wanted.append((f"Fastest {scope}", min(close, key=lambda p: p.latency_ms or 0.0)))
        wanted.append((f"Smallest {scope}", min(close, key=lambda p: p.size_bytes)))
    if front.points:
        best = min(front.points, key=lambda p: error_of(p.metric, p.validation))
        wanted.append(("Most accurate", best))
        wanted.append(("Most compressed", max(front.points, key=front.gain)))
    merged: dict[str, tuple[list[str], Point]] = {}
    for title, point in wanted:
        merged.setdefault(point.id, ([], point))[0].append(title)
    if len(front.points) == 1:
        only = front.points[0]
        return [Highlight(wanted_text(front), only, gains_text(only), _detail(only))]
    return [
        Highlight(_joined(titles, scope), point, gains_text(point), _detail(point)) for titles, point in merged.values()
    ]


_BEST = {
    "error": "most accurate",
    "latency_ms": "fastest",
    "size_bytes": "smallest",
    "peak_memory_bytes": "least memory",
    "energy_mj": "least energy",
    "macs": "fewest MACs",
}


def wanted_text(front: LoadedFront) -> str:
    """What was asked for, in words: ``Fastest, within drop 1.00 points``."""
    names = ", ".join(_BEST.get(name, name) for name in front.front.objectives)
    limits = ", ".join(budget_text(name, value) for name, value in front.front.constraints.items())
    return names[0].upper() + names[1:] + (f", within {limits}" if limits else "")


def verdict(front: LoadedFront) -> tuple[str, str]:
    """The result in one sentence, and what it rests on.

    The point is chosen on validation quality; the sentence quotes the test split, which nothing was chosen on, once it
    was scored.
    """
    if not front.points:
        return "No compressed model has been delivered yet.", "The search is running, or it was stopped early."
    metric = front.front.metric
    close = [point for point in front.points if point.drop is not None and point.drop <= WITHIN_POINTS]
    if close:
        point = max(close, key=front.gain)
        why = f"the best trade-off within {WITHIN_POINTS:g} point on validation"
    else:
        point = min(front.points, key=lambda p: p.drop if p.drop is not None else error_of(metric, p.validation))
        why = "the least drop on validation"
    kept = close and point.shown_drop is not None and point.shown_drop <= WITHIN_POINTS
    place = f"within {WITHIN_POINTS:g} point of" if kept else f"at {drop_text(metric, point.shown_drop)} against"
    return f"{gains_text(point)} {place} the original.", f"Point {point.id}, {why}: {_detail(point)}."


def _detail(point: Point) -> str:
    metric = point.metric
    parts = [f"{point.split} {metric.name} {quality_text(metric, point.shown)}"]
    if point.shown_drop is not None:
        interval = drop_interval_text(point)
        parts[0] += f" ({drop_text(metric, point.shown_drop)}{f', 95% interval {interval}' if interval else ''})"
    if point.latency_ms is not None:
        word = "" if point.info.latency_ms.measured is not None else " predicted"
        parts.append(f"{format_ms(point.latency_ms)}{word}")
    parts.append(format_bytes(point.size_bytes))
    return ", ".join(parts)


def split_gap_text(front: LoadedFront) -> str:
    """How far validation quality, which points were chosen on, lies above test quality; empty without points."""
    metric, gap = front.front.metric, front.front.search.split_gap
    points = [point for point in front.points if point.split == "test"]
    if not points:
        return ""
    scale = points_per_unit(metric)
    unit = "points" if metric.unit == "fraction" else metric.unit

    mean_by_chance, largest_by_chance = (gap.mean_by_chance, gap.largest_by_chance) if gap else (None, None)

    def spelled(value: float, word: str, by_chance: tuple[float, float] | None) -> str:
        chance = ""
        if by_chance is not None:
            chance = f" (chance alone: {by_chance[0] * scale:+.2f} to {by_chance[1] * scale:+.2f})"
        return f"{value * scale:+.2f} {unit}".rstrip() + word + chance

    differences = [point.validation - point.test for point in points]
    head = f"Validation minus test {metric.name}"
    if len(points) == 1:
        return f"{head}: {spelled(differences[0], '', mean_by_chance)}."
    mean = spelled(sum(differences) / len(differences), " on average", mean_by_chance)
    most = spelled(max(differences), " at most", largest_by_chance)
    return f"{head} over the {len(points)} points: {mean}, {most}."


def recovery_text(front: LoadedFront) -> str:
    """How the models of the front got their weights; empty without points."""
    given = [point.plan.recipe.steps + point.plan.recipe.qat_steps for point in front.points]
    trained = sorted(steps for steps in given if steps)
    if not given:
        return ""
    if not trained:
        return "Every model of the front stands as it was put together from the database of compressed layers."
    span = f"{trained[0]:,}" if trained[0] == trained[-1] else f"{trained[0]:,} to {trained[-1]:,}"
    told = f"{len(trained)} of {len(given)} models of the front were recovered, by {span} steps of training"
    rest = "; the others stand as they were put together from the database of compressed layers"
    return f"{told}{rest if len(trained) < len(given) else ''}."


def tied_text(names: Sequence[str], most: int = 2) -> str:
    """The points whose quality cannot be told from one's: ``p01, p02 and 3 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def drop_interval_text(point: Point) -> str:
    """The 95% interval of the paired test difference, ``-0.98 to -0.28``; empty where it is not known."""
    bounds = point.info.quality.drop_ci95
    if bounds is None:
        return ""
    worst, best = (drop_text(point.metric, b * points_per_unit(point.metric), unit=False) for b in reversed(bounds))
    return f"{worst} to {best}"


def _joined(titles: list[str], scope: str) -> str:
    """``Fastest and smallest within 1 point on validation``: the scope once, at the end."""
    if len(titles) == 1:
        return titles[0]
    short = [title.removesuffix(f" {scope}") for title in titles]
    words = [short[0], *(word[0].lower() + word[1:] for word in short[1:])]
    text = f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{text} {scope}" if all(title.endswith(scope) for title in titles) else text
