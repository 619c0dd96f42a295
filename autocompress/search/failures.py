"""What becomes of a candidate that fails: a reason people can read; the search goes on without it."""

from __future__ import annotations

from autocompress.errors import AutocompressError

LONGEST = 400

EXPECTED = (ArithmeticError, AutocompressError, RuntimeError)
"""What candidates are known to fail with: their reason says enough.  Of anything else the log keeps the traceback."""


def reason_of(error: BaseException) -> str:
    """The kind of an error and what it says, on one line and of a length that fits a table.

    >>> reason_of(FloatingPointError("the loss became nan"))
    'FloatingPointError: the loss became nan'
    """
    said = " ".join(str(error).split())
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def is_expected(error: BaseException) -> bool:
    """Whether an error is of a kind that candidates are known to fail with."""
    return isinstance(error, EXPECTED)
