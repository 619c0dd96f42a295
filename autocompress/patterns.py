"""How layers are named in flags and search spaces: exactly, by glob, or by regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from autocompress.errors import UsageError, nearest_names


def match_layers(patterns: Sequence[str], names: Sequence[str], origin: str = "--freeze") -> set[str]:
    """The layers that the patterns mean: an exact name, a glob, or ``re:EXPRESSION`` over the whole name.

    >>> sorted(match_layers(["layer1.*"], ["conv1", "layer1.0", "layer1.1"]))
    ['layer1.0', 'layer1.1']

    Raises:
        UsageError: for a pattern that matches nothing, with the nearest name.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            matched = [name for name in names if re.fullmatch(pattern[3:], name)]
        else:
            matched = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            hint = f"; nearest: {nearest_names(pattern, names)[0]!r}" if names else ""
            raise UsageError(f"{origin}: pattern {pattern!r} matches no layer{hint}")
        found.update(matched)
    return found
