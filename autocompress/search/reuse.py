"""A search that starts from everything another run knows: its models, recoveries, trials and measurements.

The other run's files are linked or copied, never changed.  What was measured and trained there holds for the same
model, data, machine and search space only, so every run notes what it is of and a search that starts from it compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from autocompress.config import RunConfig
from autocompress.errors import UsageError
from autocompress.hardware.profile import FittedProfile, HardwareProfile
from autocompress.plan import digest_of
from autocompress.search.deliver import ORIGINAL
from autocompress.search.files import read_json, write_text
from autocompress.search.legs import Leg, read_leg
from autocompress.spaces import SearchSpace
from autocompress.tasks.base import Task

FILE = "identity.json"

KNOWN = ("anchors.json", "observations.json", "sensitivity.json", "studies.json")
"""Files under ``.work`` that hold for another search, too; the models and the recoveries are folders beside them."""

SHOWN = ("space.json", "profile.yaml", "trials.csv")
"""Files of the run itself: the profile stays, the others stand until the search has its own."""

_WORDS = {
    "task": "the task",
    "model": "the model",
    "weights": "the model's weights",
    "data": "the data",
    "space": "the search space or --freeze",
    "hardware": "the target",
    "machine": "the machine (its profile, or the runtime's version)",
    "threads": "the threads",
    "batch": "the batch",
}


@dataclass(frozen=True)
class Identity:
    """What the results of a run hold for; digests where it is content that counts."""

    task: str
    model: str
    weights: str
    data: str
    space: str
    hardware: str
    machine: str
    threads: int
    batch: int

    @classmethod
    def of(cls, config: RunConfig, space: SearchSpace, task: Task, profile: HardwareProfile) -> Identity:
        """Of the run that a configuration describes."""
        device = (
            profile.provenance.cpu if isinstance(profile, FittedProfile) else digest_of(profile.model_dump(mode="json"))
        )
        return cls(
            task=task.name,
            model=task.model_name,
            weights=_digest(task.model.state_dict()),
            data=task.fingerprint,
            space=digest_of([space.model_dump(mode="json", exclude={"description"}), sorted(config.freeze)]),
            hardware=config.hardware,
            machine=f"{device}; {profile.runtime} {profile.runtime_version}",
            threads=config.threads,
            batch=config.batch,
        )

    def write(self, run: Path) -> None:
        """Notes in a run directory what it is of."""
        write_text(run / ".work" / FILE, json.dumps(dataclasses.asdict(self), indent=1))


def check_reusable(config: RunConfig, source: Path, ours: Identity) -> None:
    """Refuses a run to start from whose results would not hold here.

    Raises:
        UsageError: naming what differs, or what is missing.
    """
    where = config.origin("reuse")
    if not (source / "config.yaml").is_file():
        raise UsageError(f"{where}: {str(source)!r} holds no run (no config.yaml); give the directory of a search")
    stored = read_json(source / ".work" / FILE)
    if stored is None or not (source / ".work" / "models" / ORIGINAL / "metrics.json").is_file():
        raise UsageError(
            f"{where}: {str(source)!r} has nothing to start from: its .work folder was deleted, or it ended before its "
            "first model; search without --reuse"
        )
    theirs = dataclasses.asdict(Identity(**stored))
    differing = [word for key, word in _WORDS.items() if theirs[key] != dataclasses.asdict(ours)[key]]
    if differing:
        raise UsageError(
            f"{where}: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''} from what {str(source)!r} was "
            "made with, so that its results do not hold here; search without --reuse"
        )


def take_up(source: Path, run: Path, budget_s: float | None) -> Leg:
    """Brings what a run knows into a new run directory; gives the new run's first leg.

    It counts on from the other run's last one: its recoveries are none of the new run's, and may go further up.
    """
    for metrics in sorted((source / ".work" / "models").glob("*/metrics.json")):
        if not metrics.parent.name.endswith(".part"):
            _link_folder(metrics.parent, run / ".work" / "models" / metrics.parent.name)
    if (source / ".work" / "recovered").is_dir():
        _link_folder(source / ".work" / "recovered", run / ".work" / "recovered")
    for name in KNOWN:
        _copy(source / ".work" / name, run / ".work" / name)
    for name in SHOWN:
        _copy(source / name, run / name)
    _copy_database(source / "study.db", run / "study.db")
    before = read_leg(source)
    leg = Leg((before.number if before else 1) + 1, 0.0, budget_s)
    leg.write(run)
    return leg


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _link_folder(source: Path, target: Path) -> None:
    """Links the files of a folder, none of which is written in place.  The folder appears whole."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.name.startswith(".") or file.suffix == ".part":
            continue
        try:
            os.link(file, partial / file.name)
        except OSError:
            shutil.copy2(file, partial / file.name)
    partial.rename(target)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        write_text(target, source.read_text(encoding="utf-8"))


def _copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a database that somebody may be writing to."""
    if not source.is_file():
        return
    partial = target.with_name(f".{target.name}.part")
    partial.unlink(missing_ok=True)
    uri = f"{source.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as theirs, closing(sqlite3.connect(partial)) as ours:
        theirs.backup(ours)
    partial.replace(target)
