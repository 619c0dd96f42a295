"""The legs of a run: the first search, and one more each time that a finished run is given more time or trials."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from autocompress.config import RunConfig, read_yaml
from autocompress.errors import UsageError
from autocompress.front import load_front
from autocompress.search.files import read_json, write_text

FILE = "leg.json"


@dataclass(frozen=True)
class Leg:
    """What a run may spend until it is complete.

    Attributes:
        number: 1 for the first.
        began_s: seconds that the run had taken before.
        budget_s: seconds that this leg may take; None without a limit.
        done: whether it was completed.
    """

    number: int = 1
    began_s: float = 0.0
    budget_s: float | None = None
    done: bool = False

    def write(self, run: Path) -> None:
        """Keeps the leg in the run directory."""
        write_text(run / ".work" / FILE, json.dumps(dataclasses.asdict(self)))

    def configured(self, config: RunConfig) -> RunConfig:
        """The configuration that repeats the run in one go: all the time it was given, by whatever legs.

        More time for a finished run also lifts the number of trials it was told before.
        """
        total = None if self.budget_s is None else self.began_s + self.budget_s
        more_time = self.began_s > 0 and total is not None
        trials = None if more_time and not config.gave("trials") else config.trials
        return config.model_copy(update={"time_budget": total, "trials": trials})


def read_leg(run: Path) -> Leg | None:
    """The leg a run is in; None where it has not begun any."""
    stored = read_json(run / ".work" / FILE)
    return None if stored is None else Leg(**stored)


def mark_done(run: Path) -> None:
    """Notes that a run's leg was completed."""
    leg = read_leg(run)
    if leg is not None:
        dataclasses.replace(leg, done=True).write(run)


def next_leg(run: Path | None, config: RunConfig) -> Leg | None:
    """The leg that a search goes on with or begins; None where the run is finished and no more of it is asked for.

    A finished run goes on where a flag or keyword says for how long, or names more trials than it has.  An
    interrupted one has what is left of its budget; a time budget that is given replaces that of the interrupted leg,
    so that the same command goes on as if nothing had happened.

    Raises:
        UsageError: more is asked of a finished run, and the files that it would go on from are gone.
    """
    if run is None or not config.resume or not (run / "config.yaml").is_file():
        return Leg(budget_s=config.time_budget)
    complete = (run / "front.json").is_file() and load_front(run).front.status == "complete"
    leg = read_leg(run) or Leg(budget_s=config.time_budget, done=complete)
    if not (complete and leg.done):
        return dataclasses.replace(leg, budget_s=config.time_budget if config.gave("time_budget") else leg.budget_s)
    if not config.gave("time_budget") and not _more_trials(run, config):
        return None
    if not (run / ".work" / "models").is_dir():
        raise UsageError(
            f"{config.origin('out')}: the run in {str(run)!r} is finished and its .work folder was deleted: there is "
            "nothing to go on from; choose another --out"
        )
    spent = float(read_json(run / ".work" / "spent.json") or 0.0)
    return Leg(leg.number + 1, spent, config.time_budget if config.gave("time_budget") else None)


def _more_trials(run: Path, config: RunConfig) -> bool:
    if config.trials is None or not config.gave("trials"):
        return False
    told = read_yaml(run / "config.yaml").get("trials")
    return config.trials > (load_front(run).front.search.trials if told is None else int(told))
