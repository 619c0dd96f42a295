"""Kills a search with SIGKILL at random moments, resumes it each time, and checks that nothing is lost or repeated.

    python -m benchmarks.kill_resume              # ten kills of a search on digits, about five minutes

After every kill: ``front.json``, once there, is valid and every file it names is whole; the trials that had ended are
still there as they were.  At the end: no plan was evaluated twice, and nothing is left of what was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import optuna
import pandas as pd

from autocompress.errors import UsageError
from autocompress.front import LoadedFront, load_front
from autocompress.plan import CompressionPlan

RESULTS = Path(__file__).resolve().parent.parent / "results"
WAITING_S = 90.0
"""How long a process may take to reach a stage before the wait for a kill begins anyway."""

Stage = Literal["start", "work", "recover"]


@dataclass(frozen=True)
class Trial:
    """A trial that ended, as the study's storage has it."""

    number: int
    state: str
    digest: str
    values: tuple[float, ...]
    same_as: int | None
    repaired: bool


@dataclass(frozen=True)
class Leg:
    """One process of a run, from its start to its end.

    ``lost`` counts trials that had ended before and are gone or changed; ``broken`` says what is wrong with the front.
    """

    leg: int
    ended_by: str
    seconds: float
    trials: int
    lost: int
    points: int
    status: str
    broken: str


class Interrupted:
    """A search that is killed and resumed.

    Args:
        run: its directory.
        options: of ``autocompress search``, without ``--out`` and ``--resume``.
        environment: of the processes.
    """

    def __init__(self, run: Path, options: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.run, self.environment = run, environment
        self.command = [sys.executable, "-m", "autocompress", "search", *options, "--out", str(run), "--resume"]
        self.legs: list[Leg] = []
        self._ended: dict[tuple[str, int], Trial] = {}

    def go(self, kill_after: float | None, stage: Stage = "work") -> Leg:
        """Runs one process to its end.

        Args:
            kill_after: seconds into the stage after which it is killed; None leaves it alone.
            stage: ``start``: the run has been entered; ``work``: its model has been read; ``recover``: something was
                recovered.

        Raises:
            RuntimeError: the process ended with an error of its own.
        """
        begun = time.monotonic()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
            try:
                if kill_after is not None:
                    self._wait_for(stage, process)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(kill_after)
                    process.kill()
                code = process.wait()
            finally:
                process.kill()
            if code not in (0, -signal.SIGKILL):
                errors.seek(0)
                raise RuntimeError(f"{' '.join(self.command)} ended with {code}: {errors.read().decode()[-2000:]}")
        trials = trials_of(self.run)
        kept = {(study, t.number): t for study, found in trials.items() for t in found}
        lost = sum(kept.get(key) != trial for key, trial in self._ended.items())
        self._ended = kept
        front, broken = inspect_front(self.run)
        leg = Leg(
            leg=len(self.legs) + 1,
            ended_by="SIGKILL" if code else "itself",
            seconds=round(time.monotonic() - begun, 1),
            trials=len(kept),
            lost=lost,
            points=0 if front is None else len(front),
            status="none" if front is None else front.front.status,
            broken="; ".join(broken),
        )
        self.legs.append(leg)
        return leg

    def _wait_for(self, stage: Stage, process: subprocess.Popen[bytes]) -> None:
        """Waits until the process has come so far; its first lines in the log say so."""
        wanted = self._log_lines() + (1 if stage == "start" else 2)
        recovered = self.run / ".work" / "recovered"
        deadline = time.monotonic() + WAITING_S
        while time.monotonic() < deadline and process.poll() is None:
            arrived = self._log_lines() >= wanted
            if arrived and (stage != "recover" or any(recovered.glob("*.safetensors"))):
                return
            time.sleep(0.05)

    def _log_lines(self) -> int:
        log = self.run / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    @property
    def evaluated_twice(self) -> list[str]:
        """Plans with more than one evaluation: completed trials that share a digest and don't say so."""
        return [
            digest
            for trials in trials_of(self.run).values()
            for digest, count in Counter(
                t.digest for t in trials if t.state == "COMPLETE" and t.same_as is None
            ).items()
            if digest and count > 1
        ]


def trials_of(run: Path) -> dict[str, list[Trial]]:
    """The trials that ended, by the name of their study; nothing where there is no storage yet."""
    path = run / "study.db"
    if not path.is_file():
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{path}"
    try:
        names = optuna.get_all_study_names(storage)
    except Exception:  # killed while the tables were being made
        return {}
    found: dict[str, list[Trial]] = {}
    for name in names:
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        found[name] = [_trial(t) for t in trials if t.state.is_finished()]
    return found


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    plan = trial.user_attrs.get("plan")
    digest = "" if plan is None else CompressionPlan.model_validate_json(plan).structure_digest
    values = tuple(trial.values or ())
    attributes = trial.user_attrs
    return Trial(trial.number, trial.state.name, digest, values, attributes.get("same_as"), "repaired" in attributes)


def inspect_front(run: Path) -> tuple[LoadedFront | None, list[str]]:
    """The front as it stands, and what is wrong with it; no front yet is nothing wrong."""
    if not (run / "front.json").is_file():
        return None, []
    try:
        front = load_front(run)
    except UsageError as error:
        return None, [str(error)]
    problems = []
    for point in (front.reference, *front.baselines, *front.points):
        for name in ("model.onnx", "model.safetensors", "plan.json", "metrics.json"):
            if not (point.path / name).is_file():
                problems.append(f"{point.id} has no {name}")
        if problems:
            continue
        if point.onnx_path.stat().st_size != point.size_bytes:
            problems.append(f"{point.id} is {point.onnx_path.stat().st_size} bytes, not {point.size_bytes}")
        session = ort.InferenceSession(str(point.onnx_path))
        given = session.get_inputs()[0]
        shape = [size if isinstance(size, int) else 2 for size in given.shape]
        session.run(None, {given.name: np.zeros(shape, dtype=np.float32)})
    return front, problems


def leftovers(run: Path) -> list[str]:
    """Files that a finished run has no use for: what writes that were cut off leave behind."""
    shown = {"config.yaml", "space.json", "profile.yaml", "environment.json", "study.db", "trials.csv", "front.json"}
    shown |= {"front.csv", "rejected.csv", "ladder.csv", "report.html", "log.jsonl", "manifest.json", "models", ".work"}
    front = load_front(run)
    models = {point.path.name for point in (front.reference, *front.baselines, *front.points)}
    odd = [path.name for path in run.iterdir() if path.name not in shown]
    odd += [f"models/{path.name}" for path in (run / "models").iterdir() if path.name not in models]
    odd += [str(p.relative_to(run)) for p in run.rglob("*") if p.name.endswith((".part", ".tmp", "-journal"))]
    return sorted(set(odd))


# ------------------------------------------------------------------------------------------------------ the benchmark


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills, resumes, writes ``results/kill-resume.csv``; gives 1 where something was lost, repeated or broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--time-budget", default="90s")
    parser.add_argument("--out", type=Path, default=RESULTS / "kill-resume.csv")
    given = parser.parse_args(arguments)
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        run = Path(folder) / "run"
        search = Interrupted(run, ["--task", "digits", "--time-budget", given.time_budget, "--quiet"])
        for number in range(given.kills):
            stage: Stage = "start" if number % 4 == 0 else "recover" if number >= given.kills // 2 else "work"
            leg = search.go(moments.uniform(0.1, 8.0), stage)
            print(_line(leg), flush=True)
            if leg.status == "complete" and leg.ended_by == "itself":
                break  # out of time before the last kill; the same command would give it as much again
        else:
            print(_line(search.go(kill_after=None)), flush=True)
        odd, twice = leftovers(run), search.evaluated_twice
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        frame = pd.DataFrame([asdict(leg) for leg in search.legs])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out, index=False)
    lost, broken = int(frame["lost"].sum()), [text for text in frame["broken"] if text]
    ok = not (lost or broken or odd or twice) and frame["status"].iloc[-1] == "complete"
    summary = (
        f"{given.kills} kills: {len(frame)} processes, {frame['trials'].iloc[-1]} trials, {lost} lost, "
        f"{len(twice)} evaluated twice, {len(broken)} broken fronts, {len(odd)} leftovers, "
        f"{frame['points'].iloc[-1]} points at the end: {'ok' if ok else 'FAILED'}\n{_machine(environment)}"
    )
    given.out.with_suffix(".txt").write_text(summary + "\n", encoding="utf-8")
    print(summary)
    for problem in (*broken, *(f"left over: {name}" for name in odd), *(f"evaluated twice: {d}" for d in twice)):
        print(problem)
    return 0 if ok else 1


def _line(leg: Leg) -> str:
    return (
        f"{leg.leg:>3}: {leg.seconds:>6.1f} s, ended by {leg.ended_by}, {leg.trials} trials, {leg.lost} lost, front "
        f"{leg.status} with {leg.points} points{f', BROKEN: {leg.broken}' if leg.broken else ''}"
    )


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("autocompress", "torch", "onnxruntime", "optuna"))
    return f"{environment['cpu'].partition(',')[0]}, Python {environment['python']}, {versions}, {environment['date']}"


if __name__ == "__main__":
    sys.exit(main())
