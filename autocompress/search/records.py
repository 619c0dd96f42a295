"""What a run notes beside its front: where it ran, what it said, and the digests of what it wrote."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autocompress.devices import device_description
from autocompress.environment import environment_facts
from autocompress.search.files import write_text

_FILES = (
    "config.yaml",
    "space.json",
    "trials.csv",
    "profile.yaml",
    "environment.json",
    "front.json",
    "front.csv",
    "rejected.csv",
    "ladder.csv",
)


def write_environment(run: Path, device: torch.device) -> None:
    """``environment.json``: machine, versions, and the device that recovery trains on."""
    facts = {**environment_facts(), "training": device_description(device)}
    write_text(run / "environment.json", json.dumps(facts, indent=1))


def write_manifest(run: Path) -> None:
    """``manifest.json``: the SHA-256 of each file of the run."""
    files = [run / name for name in _FILES] + sorted((run / "models").glob("*/*"))
    digests = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    write_text(run / "manifest.json", json.dumps(digests, indent=1))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Writes the package's log to a file of the run, an object a line."""
    root = logging.getLogger("autocompress")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_JsonLines())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
        }
        row |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)
