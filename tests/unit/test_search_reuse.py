"""Starting from another run: what must agree, what is taken up, and that the other run stays as it is."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from torch import nn

from autocompress.config import RunConfig
from autocompress.errors import UsageError
from autocompress.plan import CompressionPlan
from autocompress.search.adoption import best_of, known_elsewhere, note_study
from autocompress.search.engine import Engine
from autocompress.search.evaluate import Stitched
from autocompress.search.files import Clock
from autocompress.search.legs import Leg, read_leg
from autocompress.search.reuse import Identity, _digest, check_reusable, take_up
from autocompress.search.study import ADOPTED, PlanStudy
from tests.fixtures.search import make_menu, make_skeleton

OURS = Identity(
    task="digits",
    model="resnet8",
    weights="w",
    data="d",
    space="s",
    hardware="local",
    machine="cpu",
    threads=1,
    batch=1,
)
CONFIG = RunConfig.create(task="digits")
SKELETON = make_skeleton()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run with two models, a recovery and a study."""
    run = tmp_path / "first"
    for name in ("original", "p1"):
        folder = run / ".work" / "models" / name
        folder.mkdir(parents=True)
        for file in ("model.onnx", "metrics.json", "validation.npy"):
            (folder / file).write_text(f"{file} of {name}")
    (run / ".work" / "models" / "p2.part").mkdir()
    (run / ".work" / "recovered").mkdir()
    (run / ".work" / "recovered" / "k-1.safetensors").write_text("weights")
    (run / ".work" / "recovered" / "k-2.part").write_text("cut off")
    for name in ("anchors.json", "sensitivity.json", "spent.json", "search-done.json"):
        (run / ".work" / name).write_text("[]")
    for name in ("config.yaml", "profile.yaml", "space.json", "front.json"):
        (run / name).write_text("{}")
    with closing(sqlite3.connect(run / "study.db")) as database, database:
        database.execute("create table t (x)")
        database.execute("insert into t values (7)")
    OURS.write(run)
    Leg(2, 60.0, 60.0, done=True).write(run)
    return run


def test_everything_that_is_known_is_taken_up_and_the_other_run_stays(source: Path, tmp_path: Path) -> None:
    before, run = snapshot(source), tmp_path / "second"
    run.mkdir()
    leg = take_up(source, run, 30.0)
    assert leg == read_leg(run) == Leg(3, 0.0, 30.0)
    found = {name for name in snapshot(run) if name != ".work/leg.json"}
    assert found == {
        *(f".work/models/{model}/{file}" for model in ("original", "p1") for file in
          ("model.onnx", "metrics.json", "validation.npy")),
        ".work/recovered/k-1.safetensors", ".work/anchors.json", ".work/sensitivity.json",
        "profile.yaml", "space.json", "study.db",
    }  # fmt: skip
    with closing(sqlite3.connect(run / "study.db")) as database:
        assert database.execute("select x from t").fetchall() == [(7,)]
    assert snapshot(source) == before


def test_what_a_kill_left_half_done_is_done_again(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "second"
    (run / ".work" / "models" / "p1.part").mkdir(parents=True)
    take_up(source, run, None)
    whole = snapshot(run)
    take_up(source, run, None)
    assert {name: content for name, (_, content) in snapshot(run).items() if "study" not in name} == {
        name: content for name, (_, content) in whole.items() if "study" not in name
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "x"}, "the model's weights differs from"),
        ({"data": "x"}, "the data differs from"),
        ({"space": "x", "threads": 2}, "the search space or --freeze, the threads differ from"),
        ({"machine": "x"}, r"the machine \(its profile, or the runtime's version\) differs from"),
    ],
)
def test_a_run_of_something_else_is_refused_by_name(source: Path, change: dict[str, object], words: str) -> None:
    check_reusable(CONFIG, source, OURS)
    with pytest.raises(UsageError, match=f"--reuse: {words} what .*first' was made with"):
        check_reusable(CONFIG, source, dataclasses.replace(OURS, **change))  # type: ignore[arg-type]


def test_a_run_that_knows_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run \(no config\.yaml\)"):
        check_reusable(CONFIG, tmp_path, OURS)
    (source / ".work" / "models" / "original" / "metrics.json").unlink()
    with pytest.raises(UsageError, match=r"has nothing to start from: its \.work folder was deleted"):
        check_reusable(CONFIG, source, OURS)


def test_weights_are_told_apart() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert _digest(one.state_dict()) == _digest({k: v.clone() for k, v in one.state_dict().items()})
    assert _digest(one.state_dict()) != _digest(other.state_dict())


# ------------------------------------------------------------------------------------------------- stitched candidates


def price(plan: CompressionPlan) -> dict[str, float]:
    table = SKELETON.price([plan])
    return {name: float(getattr(table, name)[0]) for name in ("latency_ms", "size_bytes")}


class Judge:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, plan: CompressionPlan) -> Stitched:
        self.seen.append(plan.structure_digest)
        return Stitched(1.0 / sum(plan.groups.values()), 0.1)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A study of 24 candidates of a menu, noted in ``tmp_path``."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = PlanStudy(url, make_menu(), ("latency_ms", "size_bytes"), {}, seed=0)
    for _ in range(24):
        study.step(price, Judge())
    note_study(tmp_path, study.name, 0)
    return url


def test_known_candidates_are_taken_over_under_other_objectives_and_limits(storage: str, tmp_path: Path) -> None:
    first = PlanStudy(storage, make_menu(), ("latency_ms", "size_bytes"), {}, seed=0)
    sizes = sorted(s.costs["size_bytes"] for s in first.scored())
    limits = {"size_bytes": sizes[len(sizes) // 2]}
    study = PlanStudy(storage, make_menu(), ("latency_ms",), limits, seed=0)
    assert study.trials == 0
    known = known_elsewhere(study, storage, tmp_path, 0, SKELETON)
    wanted = {s.plan.structure_digest: s for s in first.scored() if s.costs["size_bytes"] <= limits["size_bytes"]}
    assert {item.plan.structure_digest for item in known} == wanted.keys()
    assert all(item.divergence == wanted[item.plan.structure_digest].divergence for item in known)
    seeds = best_of(known, study.costs)
    assert seeds
    assert {s.plan.structure_digest for s in seeds} <= wanted.keys()
    study.enqueue(item.choices for item in seeds)
    study.adopt(known)
    assert (study.adopted, study.trials) == (len(known), len(known))
    assert {s.plan.structure_digest for s in study.scored()} == wanted.keys()
    # The best of them are tried again as seeds, which costs nothing, and none is evaluated a second time.
    judge = Judge()
    for _ in seeds:
        study.step(price, judge)
    assert judge.seen == []
    assert all(ADOPTED in t.user_attrs for t in study.study.trials if t.number < 0 or "same_as" not in t.user_attrs)
    again = PlanStudy(storage, make_menu(), ("latency_ms",), limits, seed=0)
    assert {s.plan.structure_digest for s in again.scored()} == wanted.keys()


def test_candidates_of_other_samples_or_models_are_not_taken_over(storage: str, tmp_path: Path) -> None:
    study = PlanStudy(storage, make_menu(), ("latency_ms",), {}, seed=1)
    assert known_elsewhere(study, storage, tmp_path, 1, SKELETON) == []
    assert known_elsewhere(study, storage, tmp_path / "another run", 0, SKELETON) == []
    assert best_of([], study.costs) == []


def test_candidates_that_the_menu_does_not_offer_are_not_taken_over(storage: str, tmp_path: Path) -> None:
    narrow = make_menu(keep=[1.0], compute=["fp32"], weight_bits=[32, 8])
    study = PlanStudy(storage, narrow, ("latency_ms",), {}, seed=0)
    offered = {narrow.plan(choices).structure_digest for choices in [narrow.uniform(1.0, "fp32", 32)]}
    for item in known_elsewhere(study, storage, tmp_path, 0, SKELETON):
        assert narrow.plan(item.choices).structure_digest == item.plan.structure_digest
    assert offered


def test_notes_of_studies_add_up(tmp_path: Path) -> None:
    note_study(tmp_path, "plans-a", 0)
    note_study(tmp_path, "plans-b", 3)
    note_study(tmp_path, "plans-a", 0)
    assert json.loads((tmp_path / ".work" / "studies.json").read_text()) == {"plans-a": 0, "plans-b": 3}


def test_trials_of_the_run_that_another_began_with_do_not_count_as_its_own(tmp_path: Path) -> None:
    engine = Engine.__new__(Engine)
    engine.run = tmp_path
    study = SimpleNamespace(name="plans-a", trials=48, adopted=0)
    engine.clock = cast(Clock, SimpleNamespace(leg=2, began_s=0.0))
    assert engine._taken_over(cast(PlanStudy, study)) == 48
    study.trials = 51  # After an interruption it is still 48.
    assert engine._taken_over(cast(PlanStudy, study)) == 48
    engine.clock = cast(Clock, SimpleNamespace(leg=2, began_s=60.0))  # A run that was given more counts all its trials.
    assert engine._taken_over(cast(PlanStudy, study)) == 0
