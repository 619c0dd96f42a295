"""Where trained originals, downloaded data and decoded images are kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory(given: Path | str | None = None) -> Path:
    """The cache: what the caller gave, else ``AUTOCOMPRESS_CACHE``, else the platform's place for caches."""
    if given is not None:
        return Path(given).expanduser()
    if configured := os.environ.get("AUTOCOMPRESS_CACHE"):
        return Path(configured).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "autocompress"
