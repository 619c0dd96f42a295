"""Channel counts that pay: the grid on which runtimes waste no time."""

from __future__ import annotations

NARROWEST = (4, 2)
"""Channel counts below the grid that are offered as well: at high resolution a narrow layer's time falls with them."""


def keep_count(size: int, share: float) -> int:
    """Channels to keep for a share of a group: on the grid of 8, or of 4 in small groups, and no fewer than asked for.

    >>> [keep_count(64, share) for share in (1.0, 0.5, 0.3)]
    [64, 32, 24]
    >>> [keep_count(16, share) for share in (0.25, 0.125)]
    [4, 2]
    """
    if share >= 1:
        return size
    step = 8 if size > 32 else 4
    wanted = round(size * share)
    on_grid = -(-wanted // step) * step
    return min(size, next((count for count in NARROWEST[::-1] if count >= wanted), on_grid))
