"""The search against simpler ways at equal time: ``make bench-search``, cell by cell, resumable.

A cell is a model, a method and a seed, for ten minutes of wall-clock on this machine.  Every front that a method
publishes is noted with its time; afterwards each model that ever stood on one is scored on the test split and timed
again beside the original, in a plain session, and the hypervolume of what was delivered is drawn against time.

python -m benchmarks.search                        # every cell that this machine's cells.csv does not hold yet
python -m benchmarks.search resnet20/ours/0        # one cell
python -m benchmarks.search --page                 # only the page and the plots, from the figures kept

Figures of two machines do not compare, so each kind of processor has its own folder in results/search.

The hypervolume is the share of the box (error above the original's, 0 to 10 points, linear; log2 of the speed-up, to
8x; log2 of the shrinkage, to 32x) that a front dominates; the gap is what is left to 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from autocompress.plan import Front
from benchmarks.ablations import ABLATIONS
from benchmarks.fronts import RESULTS
from benchmarks.search_curves import TASK, curve, machine
from benchmarks.search_page import RIVALS, final, publish

FOLDER = RESULTS / "search" / re.sub(r"[^a-z0-9]+", "-", machine().lower())
"""Where this machine's figures go."""

BUDGET_S, ABLATION_S = 600.0, 300.0
POLL_S = 0.2
STEPS = (300, 60, 0)
"""Lengths of training of the rivals; the one that serves a rival best on seed 0 is taken for its other seeds."""


@dataclass(frozen=True)
class Cell:
    """One run to make: ``steps`` are a rival's training steps a trial."""

    model: str
    method: str
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        method = self.method if self.steps is None else f"{self.method}-{self.steps}"
        return f"{self.model}/{method}/{self.seed}"

    @property
    def budget_s(self) -> float:
        return ABLATION_S if self.method.startswith("without-") else BUDGET_S

    def command(self, out: Path) -> list[str]:
        """What makes it: the command line a user would type, or the rival's."""
        common = ["--task", TASK, "--model", self.model, "--time-budget", f"{self.budget_s:.0f}s"]
        common += ["--seed", str(self.seed), "--out", str(out)]
        if self.method == "ours":
            return [sys.executable, "-m", "autocompress", "search", "--quiet", *common]
        if self.method.startswith("without-"):
            return [sys.executable, "-m", "benchmarks.ablations", self.method, *common]
        steps = [] if self.steps is None else ["--steps", str(self.steps)]
        return [sys.executable, "-m", "benchmarks.rivals", self.method, *steps, *common]


def cells(known: pd.DataFrame) -> Iterator[Cell]:
    """Every cell of the benchmark, in the order in which figures are wanted first.

    A rival's later cells need its training length, so they come once its first ones are known.
    """
    yield Cell("resnet20", "ours", 0)
    for steps in STEPS:
        for method in ("nsga2", "tpe"):
            yield Cell("resnet20", method, 0, steps)
    yield Cell("resnet20", "sequence", 0)
    yield Cell("resnet20", "ours", 1)
    for method in ("nsga2", "tpe"):
        yield Cell("resnet20", method, 1, best_steps(known, method))
    yield Cell("resnet20", "sequence", 1)
    for method in ("random", "quantize"):
        yield Cell("resnet20", method, 0, best_steps(known, "nsga2"))
    yield Cell("mobilenetv2", "ours", 0)
    best = best_rival(known)
    yield Cell("mobilenetv2", best, 0, None if best == "sequence" else best_steps(known, best))
    for part in ABLATIONS:
        yield Cell("resnet20", part, 0)


def best_steps(known: pd.DataFrame, method: str) -> int:
    """The training length that serves a rival best at the end of seed 0."""
    rows = final(known)
    rows = rows[(rows["model"] == "resnet20") & (rows["method"] == method) & (rows["seed"] == 0)]
    return int(rows.loc[rows["hypervolume"].idxmax(), "steps"]) if len(rows) else STEPS[0]


def best_rival(known: pd.DataFrame) -> str:
    """The rival with the largest final hypervolume on ResNet-20, over its seeds."""
    rows = final(known)
    rows = rows[(rows["model"] == "resnet20") & rows["method"].isin(RIVALS)]
    means = rows.groupby(["method", "steps"], dropna=False)["hypervolume"].mean()
    return str(means.idxmax()[0]) if len(means) else "tpe"


# -------------------------------------------------------------------------------------------------------- one cell


def run(cell: Cell, work: Path) -> pd.DataFrame:
    """Runs a cell and notes the fronts it publishes; gives their hypervolumes, a row each."""
    folder = work / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(cell.command(folder / "run"), stdout=log, stderr=subprocess.STDOUT)
        fronts = watch(process, folder / "run" / "front.json")
    if process.returncode:
        raise SystemExit(f"{cell.name} ended with {process.returncode}; see {folder / 'log.txt'}")
    volumes, last = curve(cell.model, folder / "run", fronts)
    place = FOLDER / "fronts" / f"{cell.name.replace('/', '-')}.csv"
    place.parent.mkdir(parents=True, exist_ok=True)
    last.to_csv(place, index=False)
    facts = {"steps": cell.steps, "seed": cell.seed, "budget": cell.budget_s, "commit": commit.stdout.strip()}
    return volumes.assign(model=cell.model, method=cell.method, **facts)


def watch(process: subprocess.Popen[bytes], path: Path) -> list[tuple[float, list[str]]]:
    """(seconds by the run's own clock, ids of the front's models) for every front published while it runs."""
    fronts: list[tuple[float, list[str]]] = []
    stamp = 0
    while True:
        ended = process.poll() is not None
        if path.is_file() and path.stat().st_mtime_ns != stamp:
            stamp = path.stat().st_mtime_ns
            front = Front.model_validate_json(path.read_text(encoding="utf-8"))
            fronts.append((front.search.seconds, [p.id for p in front.points]))
        if ended:
            return fronts
        time.sleep(POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="such as resnet20/ours/0 or resnet20/tpe-60/1; by default all")
    parser.add_argument("--work", type=Path, default=FOLDER / ".work", help="where the runs are kept (git-ignored)")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    given = parser.parse_args()
    table = FOLDER / "cells.csv"
    known = (pd.read_csv(table) if table.is_file() else pd.DataFrame()).reindex(columns=COLUMNS)
    done = {cell_of(row).name for row in final(known).to_dict("records")}
    asked = [parse(name) for name in given.cells]
    while not given.page:
        waiting = asked or [cell for cell in cells(known) if cell.name not in done]
        if not waiting:
            break
        cell = waiting[0]
        asked = asked[1:]
        rows = run(cell, given.work)
        if len(known):
            known = known[[cell_of(row).name != cell.name for row in known.to_dict("records")]]
        known = pd.concat([known, rows], ignore_index=True)[COLUMNS] if len(known) else rows[COLUMNS]
        FOLDER.mkdir(parents=True, exist_ok=True)
        known.to_csv(table, index=False)
        done.add(cell.name)
        print(f"{cell.name}: {rows['hypervolume'].iloc[-1]:.4f} after {rows['seconds'].iloc[-1]:.0f} s", flush=True)
        if given.cells and not asked:
            break
    publish(known, FOLDER, [cell.name for cell in cells(known) if cell.name not in done])


def cell_of(row: dict[str, object]) -> Cell:
    """The cell that a row of ``cells.csv`` belongs to."""
    steps = row["steps"]
    return Cell(str(row["model"]), str(row["method"]), int(row["seed"]), None if pd.isna(steps) else int(steps))  # type: ignore[call-overload]


def parse(name: str) -> Cell:
    """A cell from its name, ``model/method[-steps]/seed``."""
    model, method, seed = name.split("/")
    base, _, steps = method.rpartition("-")
    return Cell(model, base, int(seed), int(steps)) if steps.isdigit() else Cell(model, method, int(seed))


COLUMNS = [
    "model", "method", "steps", "seed", "budget", "seconds", "hypervolume", "validation_hypervolume", "points",
    "trials", "delivered", "machine", "date", "commit",
]  # fmt: skip


if __name__ == "__main__":
    main()
