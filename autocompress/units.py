"""Reads and writes the units people use: ``90s``, ``1h30m``, ``20M``, ``1.3 MB``, ``0.42 ms``."""

from __future__ import annotations

import math
import re

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``10m``, ``1h30m``, ``0.5h`` or a plain number of seconds.

    >>> parse_duration("1h30m")
    5400.0

    Raises:
        ValueError: for anything else, showing what is allowed.
    """
    cleaned = text.strip().lower().replace(" ", "")
    if re.fullmatch(r"(\d+(\.\d+)?[smhd])+", cleaned):
        return sum(float(number) * _SECONDS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", cleaned))
    try:
        seconds = float(cleaned)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is not a duration; write e.g. 90s, 10m, 1h30m")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest spelling that :func:`parse_duration` reads back.

    >>> format_duration(5400.0), format_duration(90.0), format_duration(0.5)
    ('1h30m', '1m30s', '0.5s')
    """
    if seconds != int(seconds):
        return f"{seconds:g}s"
    rest, parts = int(seconds), ""
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        parts += f"{count}{unit}" if count else ""
    return parts or "0s"


def parse_count(text: str) -> int:
    """A whole number, with k, M or G for thousands, millions and thousand millions.

    >>> parse_count("1.5M")
    1500000

    Raises:
        ValueError: for anything else, showing what is allowed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", text.strip().lower().replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is not a count; write e.g. 250000, 20M, 1.5G")
    return round(float(match[1]) * _COUNTS[match[2]])


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as ``--max-size-mb`` counts them.

    >>> format_bytes(98_300), format_bytes(1_160_000)
    ('98.3 kB', '1.16 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A count in thousands, millions or thousand millions.

    >>> format_count(31_200_000)
    '31.2M'
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_ms(milliseconds: float) -> str:
    """Milliseconds with three digits; never another unit, so that a column can be compared at a glance.

    >>> format_ms(4.0567), format_ms(0.0421)
    ('4.06 ms', '0.0421 ms')
    """
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:.0f} ms"


def format_ratio(ratio: float) -> str:
    """How many times: one decimal, none from ten on.

    >>> format_ratio(3.14), format_ratio(11.4)
    ('3.1x', '11x')
    """
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"
