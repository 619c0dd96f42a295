"""What every command of the command line shares: its console, its ``--json`` and its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

INTERRUPTED = 130
CHECKS_FAILED = 1

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def console(*, error: bool = False) -> Console:
    """A console on stdout or stderr."""
    # A pipe has no width: rich would take 80 columns and fold the tables that are read by other programs.
    found = Console(stderr=error, soft_wrap=False)
    return found if found.is_terminal else Console(stderr=error, width=200)
