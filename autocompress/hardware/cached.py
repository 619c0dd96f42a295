"""Which profiles of this machine are in the cache."""

from __future__ import annotations

from pathlib import Path

from autocompress.errors import UsageError
from autocompress.hardware.profile import HardwareProfile, local_path
from autocompress.tasks.cache import cache_directory


def cached_profiles(cache_dir: Path | None = None) -> list[HardwareProfile]:
    """The profiles that ``local`` stands for on this machine, one for each runtime, threads and batch measured.

    Those of another processor or of an older way of measuring lie in the cache too; they are left out, as is any that
    cannot be read.
    """
    found = []
    for path in sorted((cache_directory(cache_dir) / "hardware").glob("*.yaml")):
        try:
            profile, _ = HardwareProfile.read(path)
        except UsageError:
            continue
        current = local_path(profile.runtime, profile.runtime_version, profile.threads, profile.batch, cache_dir)
        if current == path:
            found.append(profile)
    return found
