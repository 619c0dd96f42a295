"""Weights on integer grids: scales, and rounding that makes up for its own error (GPTQ, 2210.17323)."""

from __future__ import annotations

import torch

from autocompress.methods.linear import inverse_factor

BLOCK = 128

CHUNK = 1 << 20
"""Weights looked at together when scales are chosen: what a processor's cache holds."""

FINE_BITS = 7
"""From so many bits on a format is fine enough to be rounded to as it is: no compensation, no training."""

DEAD_ROW = 1e-3
"""A row whose largest weight is below this share of the layer's is held on the layer's grid."""


def integer_range(bits: int) -> tuple[int, int]:
    """Signed integers of a symmetric format; the lowest value is left unused at 8 bits, as runtimes assume.

    >>> integer_range(4)
    (-8, 7)
    """
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def row_scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A scale for each row of ``[rows, columns]``; below 8 bits the one of least squared error among clipped ranges."""
    low, high = integer_range(bits)
    largest = weight.abs().amax(dim=1)
    # A dead row has no scale of its own: one near zero would push its bias out of the runtime's 32-bit integers.
    largest = largest.clamp_min(max(DEAD_ROW * float(largest.max()), 1e-8))
    if bits >= 8:
        return largest / high
    count = max(1, CHUNK // max(weight.shape[1], 1))
    parts = zip(torch.split(weight, count), torch.split(largest, count), strict=True)
    return torch.cat([_least_error(rows, extremes, low, high) for rows, extremes in parts])


def _least_error(weight: torch.Tensor, largest: torch.Tensor, low: int, high: int) -> torch.Tensor:
    best = largest / high
    error = torch.full_like(best, float("inf"))
    for shrink in torch.linspace(0.55, 1.0, 19).tolist():
        scale = largest * shrink / high
        rounded = (weight / scale[:, None]).round_().clamp_(low, high).mul_(scale[:, None])
        trial = rounded.sub_(weight).square_().sum(dim=1)
        best = torch.where(trial < error, scale, best)
        error = torch.minimum(trial, error)
    return best


def round_to_nearest(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest grid values of ``[rows, columns]``; ``scales`` are ``[rows]``, or one for each weight."""
    low, high = integer_range(bits)
    step = scales[:, None] if scales.dim() == 1 else scales
    return (weight / step).round().clamp(low, high) * step


def round_with_compensation(
    weight: torch.Tensor, bias: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds column by column, moving each column's error into the columns still free and at last into the bias.

    Args:
        weight: ``[rows, columns]``.
        bias: ``[rows]``; the coefficient of a constant input, never rounded.
        hessian: ``[columns + 1, columns + 1]``: the inputs' second moments, the constant input last.
        scales: ``[rows]``, or one for each weight.
        bits: of the grid.

    Returns:
        The rounded weight and the corrected bias.
    """
    low, high = integer_range(bits)
    columns = weight.shape[1]
    upper = inverse_factor(hessian).float()
    # Inputs stand in rows here, so that each step reads and writes contiguous memory.
    work = torch.cat([weight.t(), bias[None]]).to(upper.dtype)
    steps = scales.to(upper.dtype).expand(columns, -1) if scales.dim() == 1 else scales.t().to(upper.dtype).contiguous()
    errors = torch.empty(BLOCK, work.shape[1], dtype=work.dtype)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        for column in range(start, stop):
            value, step = work[column], steps[column]
            rounded = (value / step).round_().clamp_(low, high).mul_(step)
            error = torch.sub(value, rounded, out=errors[column - start]).div_(upper[column, column])
            work[column] = rounded
            work[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1.0)
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors[: stop - start], alpha=-1.0)
    return work[:columns].t().to(weight.dtype).contiguous(), work[columns].to(bias.dtype)


def snap(matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows ``[rows, columns]`` that are integers times their scale up to rounding errors, made so to the bit."""
    return (matrix / scales[:, None]).round() * scales[:, None]
