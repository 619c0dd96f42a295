"""The folder of an export: there whole, or not at all."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autocompress.errors import UsageError
from autocompress.export.external import data_path

RESULTS = Path("results")


def check_free(out: Path | None) -> None:
    """Refuses a folder that something stands in, before any work is done.

    Raises:
        UsageError: ``out`` is a file or not empty.
    """
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {str(out)!r} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out: {str(out)!r} is not empty; choose another folder, or remove it first")


@contextmanager
def building(out: Path | None, stem: str) -> Iterator[Building]:
    """A folder to build in, beside where it will stand; what is not finished is removed.

    Args:
        out: where it will stand; None for the first free ``results/<stem>-<n>``.
        stem: such as ``resnet8-int8``.
    """
    check_free(out)
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-")
    parent = RESULTS if out is None else out.absolute().parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{stem if out is None else out.name}.", suffix=".part"))
    except OSError as error:
        raise UsageError(f"--out: cannot write to {str(parent)!r}: {error}") from error
    found = Building(folder, out, stem)
    try:
        yield found
    finally:
        if folder.exists():
            shutil.rmtree(folder)
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()


class Building:
    """A folder under construction.

    Attributes:
        path: where files are written to until ``finish``.
    """

    def __init__(self, path: Path, out: Path | None, stem: str) -> None:
        self.path = path
        self._out = out
        self._stem = stem

    def finish(self) -> Path:
        """Renames the folder to where it belongs, and returns that."""
        # mkdtemp makes folders private; give it the permissions that its parent's other folders have.
        self.path.chmod(0o777 & ~_umask())
        if self._out is not None:
            check_free(self._out)
            self.path.rename(self._out)
            return self._out
        for number in itertools.count(1):
            target = RESULTS / f"{self._stem}-{number}"
            if not target.exists():
                try:
                    self.path.rename(target)
                except OSError:  # taken since it was looked at
                    continue
                return target
        raise AssertionError("unreachable")


def artifact_bytes(path: Path) -> int:
    """Everything that an ONNX file needs on disk: a large model keeps its weights beside it."""
    weights = data_path(path)
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def digest_of_file(path: Path) -> str:
    """SHA-256, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask
