"""Profile files: YAML read and written safely, with digests that show what was edited by hand."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from autocompress.errors import UsageError
from autocompress.plan import digest_of

DIGEST = "digest"

_FREE = frozenset({DIGEST, "version", "kind", "name", "description"})
"""Fields that say nothing measured: they may be edited freely."""


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        UsageError: it cannot be read, is no text, no YAML or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"hardware profile {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"hardware profile {path}: not a text file ({error.reason})") from error
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"hardware profile {path}: not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"hardware profile {path}: expected a mapping of fields, found {type(content).__name__}")
    return content


def write_mapping(path: Path, content: dict[str, Any]) -> Path:
    """Writes fields and their digests; the file is complete or not there at all."""
    digests = {name: digest_of(value)[:8] for name, value in content.items() if name not in _FREE}
    text = yaml.safe_dump({**content, DIGEST: digests}, sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def edited_sections(content: dict[str, Any]) -> list[str]:
    """The fields whose content is no longer what was written with their digests; none in a file without digests."""
    digests = content.get(DIGEST)
    if not isinstance(digests, dict):
        return []
    names = [*digests, *(name for name in content if name not in _FREE and name not in digests)]
    return [str(name) for name in names if name not in content or _digest(content[name]) != digests.get(name)]


def _digest(value: Any) -> str:
    try:
        return digest_of(value)[:8]
    except (TypeError, ValueError):
        return "not JSON"
