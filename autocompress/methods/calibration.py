"""Range methods: what interval the integers of an activation stand for, chosen from a sample of its values.

Each takes a sample whose smallest and largest values are the true extremes over all calibration data (as
``statistics.collect`` gives it) and the bits of the integers, and gives ``(low, high)``; 0 always lies inside.  Values
beyond the range saturate: a narrower range clips the few largest values and rounds all others more finely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autocompress.errors import unknown_name
from autocompress.methods.registry import RANGE_METHODS

RangeMethod = Callable[[torch.Tensor, int], tuple[float, float]]

EMPTY = (0.0, 1e-6)
"""The range of an activation that is always zero: any scale will do, but there must be one."""

SMALLEST = 1e-8
"""A range narrower than this is taken for empty."""

PERCENTILE = 99.99
"""Share of the values, in percent, that lies below the upper (above the lower) end of a percentile range."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
END_STEPS = (0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
FINE_STEPS = (0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1.005, 1.01, 1.015, 1.02, 1.025, 1.03)
"""Shares of the min-max range that the search for the least squared error tries, and changes of what is best so far."""

SEARCHED_VALUES = 32768
"""Values that this search looks at."""

HISTOGRAM_BINS = 2048
THRESHOLDS = 120
"""Bins and candidate thresholds of the entropy method."""

MOST_CUT = 1e-4
"""Largest share of the values that the entropy method may cut off: beyond it outputs suffer (7 dB in ResNet-18 at 1%),
whatever the divergence says."""


def range_method(name: str) -> RangeMethod:
    """The method of this name; an unknown name lists the known ones."""
    if name not in RANGE_METHODS:
        raise unknown_name("range method", name, ["auto", *RANGE_METHODS])
    method: RangeMethod = RANGE_METHODS.load(name)
    return method


def minmax(sample: torch.Tensor, bits: int = 8) -> tuple[float, float]:
    """Everything that was seen: nothing saturates on the calibration data.

    >>> minmax(torch.tensor([1.0, 3.0]))
    (0.0, 3.0)
    """
    low, high = (float(edge) for edge in sample.aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high - low >= SMALLEST else EMPTY


def percentile(sample: torch.Tensor, bits: int = 8, percent: float = PERCENTILE) -> tuple[float, float]:
    """All but the rarest values at either end: ``percent`` of the values lie below the upper end, and as many above
    the lower one (McKinstry et al., 1809.04191)."""
    values = sample.sort().values
    rank = (1.0 - percent / 100) * (values.numel() - 1)
    below, share = int(rank), rank - int(rank)
    ends = []
    for ordered in (values, -values.flip(0)):
        after = ordered[min(below + 1, ordered.numel() - 1)]
        ends.append(float(ordered[below] + share * (after - ordered[below])))
    low, high = min(ends[0], 0.0), max(-ends[1], 0.0)
    # Where nearly all values are zero, the few that are not are all there is to hold.
    return (low, high) if high - low >= SMALLEST else minmax(sample)


def least_squares(sample: torch.Tensor, bits: int = 8) -> tuple[float, float]:
    """The range of least squared quantization error: min-max shrunk as a whole, then each end on its own, then finely.

    The fine steps matter where many values are equal (the background of images): they can fall on an integer.
    """
    low, high = minmax(sample)
    if (low, high) == EMPTY:
        return EMPTY
    sample = _spread(sample, SEARCHED_VALUES)
    best, chosen = float("inf"), (low, high)

    def consider(bottom: float, top: float) -> None:
        nonlocal best, chosen
        bottom, top = max(low, bottom), min(high, top)
        error = _squared_error(sample, bottom, top, bits) if top - bottom >= SMALLEST else float("inf")
        if error < best:
            best, chosen = error, (bottom, top)

    for shrink in SHRINKS:
        consider(low * shrink, high * shrink)
    before = float("inf")
    while low < 0.0 < high and best < 0.99 * before:
        before, (bottom, top) = best, chosen
        for change in END_STEPS:
            consider(bottom * change, top)
        bottom, top = chosen
        for change in END_STEPS:
            consider(bottom, top * change)
    bottom, top = chosen
    for change in FINE_STEPS:
        consider(bottom * change, top * change)
    bottom, top = chosen
    return chosen


def _spread(sample: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many values, evenly from the whole sample."""
    if sample.numel() <= most:
        return sample
    return sample[torch.linspace(0, sample.numel() - 1, most, dtype=torch.float64).long()]


def _squared_error(sample: torch.Tensor, low: float, high: float, bits: int) -> float:
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero = round(-low / scale)
    rounded = (sample / scale).round_().clamp_(-zero, levels - zero).mul_(scale)
    return float(rounded.sub_(sample).square_().mean())


def entropy(sample: torch.Tensor, bits: int = 8) -> tuple[float, float]:
    """The threshold whose integers tell the least different distribution: least Kullback-Leibler divergence between
    the clipped histogram of magnitudes and its quantized form (Migacz, "8-bit inference with TensorRT", GTC 2017).

    Where values of both signs occur, half the integers stand for either sign, and both ends are cut at the threshold.
    """
    low, high = minmax(sample)
    if (low, high) == EMPTY:
        return EMPTY
    levels = 2**bits if low == 0.0 or high == 0.0 else 2 ** (bits - 1)
    top = max(-low, high)
    magnitudes = sample.abs()
    # Zeros need no threshold (0 is always exact), and after a Relu they would drown all else.
    counts = torch.histc(magnitudes[magnitudes > 0], HISTOGRAM_BINS, 0.0, top).double()
    cuts = torch.linspace(levels, HISTOGRAM_BINS, THRESHOLDS).round().long()
    bins = torch.arange(HISTOGRAM_BINS)
    inside = bins[None] < cuts[:, None]
    kept = torch.where(inside, counts, 0.0)
    clipped = kept.clone()
    # What lies beyond a threshold saturates: it is counted in the last bin inside.
    clipped.scatter_add_(1, cuts[:, None] - 1, counts.sum() - kept.sum(1, keepdim=True))
    groups = torch.div(bins[None] * levels, cuts[:, None], rounding_mode="floor").clamp_(max=levels - 1)
    filled = (inside & (counts > 0)[None]).double()
    sums = torch.zeros(len(cuts), levels, dtype=torch.float64).scatter_add_(1, groups, kept)
    occupied = torch.zeros_like(sums).scatter_add_(1, groups, filled)
    spread = (sums / occupied.clamp_min(1.0)).gather(1, groups) * filled
    p = clipped / clipped.sum(1, keepdim=True)
    q = (spread / spread.sum(1, keepdim=True).clamp_min(1e-12)).clamp_min(1e-8)
    divergence = torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)
    # A sample's bins differ by chance alone, which the more merged bins the more looks like divergence: its
    # expectation (one half a degree of freedom, over the number of values) is taken off.
    freedom = filled.sum(1) - (sums > 0).sum(1)
    divergence -= freedom / (2.0 * counts.sum())
    # A cut through a spike (the background of images) hides any loss in one bin: only a small share is cut off.
    divergence[counts.sum() - kept.sum(1) > MOST_CUT * sample.numel()] = float("inf")
    threshold = top * float(cuts[int(divergence.argmin())]) / HISTOGRAM_BINS
    return max(low, -threshold), min(high, threshold)
