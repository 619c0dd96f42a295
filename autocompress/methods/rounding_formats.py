"""Weights in any stored format: scales by channel or by block, tables of few values, half precision."""

from __future__ import annotations

import torch

from autocompress.errors import UsageError
from autocompress.methods.rounding import integer_range, round_to_nearest, row_scales
from autocompress.plan import NumFormat

TABLE_LIMIT = 63
"""The largest integer in a table: products of it are exact on every processor (see ``runtime.cpu``), and a table of few
values loses nothing by a coarser grid."""

TABLE_STEPS = 25
"""Rounds of Lloyd's algorithm for a table of values; it has settled by then."""


def format_scales(weight: torch.Tensor, storage: NumFormat) -> torch.Tensor:
    """The scales of ``[rows, columns]`` in an affine or codebook format: ``[rows]``, or ``[rows, blocks]``."""
    if storage.scheme == "codebook":
        return row_scales(weight, 8) * (127 / TABLE_LIMIT)
    if storage.granularity != "block":
        return row_scales(weight, storage.bits)
    block = storage.block or weight.shape[1]
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block))
    return row_scales(padded.reshape(-1, block), storage.bits).reshape(rows, -1)


def column_scales(scales: torch.Tensor, storage: NumFormat, columns: int) -> torch.Tensor:
    """The scale of every weight, as ``[rows, columns]`` where there are blocks, else ``[rows, 1]``."""
    if scales.dim() == 1:
        return scales[:, None]
    return scales.repeat_interleave(storage.block or columns, dim=1)[:, :columns]


def round_to_format(weight: torch.Tensor, storage: NumFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest representable values of ``[rows, columns]``, and their scales (None for floats).

    Raises:
        UsageError: a weight is beyond what half precision holds.
    """
    if storage.scheme == "float":
        return _to_half(weight) if storage.bits == 16 else weight, None
    scales = format_scales(weight, storage)
    step = column_scales(scales, storage, weight.shape[1])
    if storage.scheme == "codebook":
        integers = round_to_nearest(weight, scales, 8) / step
        return round_to_table(integers.round(), scales, storage) * step, scales
    low, high = integer_range(storage.bits)
    return (weight / step).round().clamp(low, high) * step, scales


def round_to_table(integers: torch.Tensor, scales: torch.Tensor, storage: NumFormat) -> torch.Tensor:
    """Replaces 8-bit integers by the nearest of ``2 ** bits`` of them, chosen for the least squared error.

    One table serves the whole tensor, or each row has its own.  The values come from Lloyd's algorithm on the counts of
    the 255 integers (as in Deep Compression, 1510.00149, whose centroids are real numbers), begun at their quantiles.

    Args:
        integers: ``[rows, columns]`` in ``[-127, 127]``.
        scales: ``[rows]``: rows with larger scales weigh more where a table is shared.
        storage: a codebook format.
    """
    share = scales.square()[:, None] if storage.granularity == "tensor" else torch.ones_like(scales)[:, None]
    places = integers.long() + 127
    counts = torch.zeros(len(integers), 255, dtype=torch.float64)
    counts.scatter_add_(1, places, share.double().expand(places.shape))
    if storage.granularity == "tensor":
        counts = counts.sum(dim=0, keepdim=True)
    nearest = _lloyd(counts, 2**storage.bits)
    return nearest.expand(len(integers), 255).gather(1, places).to(integers.dtype)


def _lloyd(counts: torch.Tensor, size: int) -> torch.Tensor:
    """For each row of ``[tables, 255]`` weights of -127 ... 127, the table's value that each of those becomes."""
    values = torch.arange(-127, 128, dtype=torch.float64)
    reached = counts.cumsum(dim=1) / counts.sum(dim=1, keepdim=True).clamp_min(1e-30)
    quantiles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    centres = (
        torch.searchsorted(reached, quantiles.expand(len(counts), size).contiguous()).clamp_max(254).double() - 127
    )
    # Quantiles leave the rare large weights without a value near them; half the table starts evenly spaced.
    seen = counts > 0
    low = torch.where(seen, values, values.new_tensor(float("inf"))).amin(dim=1, keepdim=True)
    high = torch.where(seen, values, values.new_tensor(float("-inf"))).amax(dim=1, keepdim=True)
    even = low + (high - low) * torch.linspace(0, 1, size, dtype=torch.float64)
    centres = ((centres + even) / 2).sort(dim=1).values
    total, moment = (torch.nn.functional.pad(t.cumsum(dim=1), (1, 0)) for t in (counts, counts * values))
    for _ in range(TABLE_STEPS):
        # The integers up to the middle between two centres belong to the lower one.
        ends = torch.floor((centres[:, 1:] + centres[:, :-1]) / 2).long() + 128
        ends = torch.nn.functional.pad(ends, (1, 0), value=0)
        ends = torch.cat([ends, torch.full((len(counts), 1), 255)], dim=1)
        weight = total.gather(1, ends[:, 1:]) - total.gather(1, ends[:, :-1])
        mean = (moment.gather(1, ends[:, 1:]) - moment.gather(1, ends[:, :-1])) / weight.clamp_min(1e-30)
        centres = torch.where(weight > 0, mean, centres).sort(dim=1).values
    centres = centres.round()
    middles = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
    chosen = torch.searchsorted(middles, values.expand(len(counts), 255).contiguous())
    # Where no more values occur than the table holds, they are the table.
    return torch.where((seen.sum(dim=1) <= size)[:, None], values, centres.gather(1, chosen))


def _to_half(weight: torch.Tensor) -> torch.Tensor:
    half = weight.half().float()
    if not bool(torch.isfinite(half).all()):
        largest = float(weight.abs().max())
        raise UsageError(f"a weight of {largest:.4g} is beyond what 16-bit floats hold (65504); store it in 32 bits")
    return half
