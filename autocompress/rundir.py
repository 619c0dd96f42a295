"""The run directory: which one a search writes to, and the configuration kept in it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from autocompress.config import RunConfig
from autocompress.errors import UsageError

_UNSTARTED = frozenset({"config.yaml", "log.jsonl"})


def open_run_directory(config: RunConfig) -> tuple[Path, bool]:
    """Makes or enters the run directory and writes the resolved ``config.yaml`` there.

    Returns:
        The directory, and whether a run already stood in it (only with ``resume``).

    Raises:
        UsageError: where the directory is used and ``resume`` was not asked for, or cannot be written.
    """
    config, directory = claim_run_directory(config)
    resumed = _used(directory)
    try:
        temporary = directory / "config.yaml.tmp"
        temporary.write_text(config.to_yaml(), encoding="utf-8")
        temporary.replace(directory / "config.yaml")
    except OSError as error:
        raise UsageError(f"{config.origin('out')}: the run directory cannot be written: {error}") from error
    return directory, resumed


def claim_run_directory(config: RunConfig) -> tuple[RunConfig, Path]:
    """Makes the directory that a run will use, so that its name is known before the run begins.

    Returns:
        The configuration with ``out`` set to the directory, and the directory.

    Raises:
        UsageError: as :func:`open_run_directory`.
    """
    try:
        directory = _number(config) if config.out is None else _given(config, config.out)
    except OSError as error:
        raise UsageError(f"{config.origin('out')}: the run directory cannot be made: {error}") from error
    return config.model_copy(update={"out": directory}), directory


def discard_unstarted(directory: Path) -> None:
    """Removes a run directory in which nothing has happened yet: a failed start leaves nothing behind."""
    if directory.is_dir() and all(path.is_file() and _bare(path.name) in _UNSTARTED for path in directory.iterdir()):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def _bare(name: str) -> str:
    return name.removesuffix(".tmp")


def _used(directory: Path) -> bool:
    """Whether anything stands there; a write that was cut off does not count."""
    return directory.is_dir() and any(not path.name.endswith(".tmp") for path in directory.iterdir())


def _given(config: RunConfig, out: Path) -> Path:
    where = config.origin("out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{where}: {str(out)!r} is a file; give a directory")
    if _used(out) and not config.resume:
        raise UsageError(
            f"{where}: {str(out)!r} is not empty; add --resume to go on with the run in it, or choose another directory"
        )
    if _used(out) and not (out / "config.yaml").is_file():
        raise UsageError(f"{where}: {str(out)!r} holds no run (no config.yaml); choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _number(config: RunConfig) -> Path:
    """The first free ``results/<task>-<model>-<n>``; making it is what claims it."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", f"{config.task}-{config.model or 'model'}").strip("-")
    for number in itertools.count(1):
        candidate = Path("results") / f"{stem}-{number}"
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")
