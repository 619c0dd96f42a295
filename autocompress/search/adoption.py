"""Stitched candidates that another study has evaluated: a search that starts from its run need not do so again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna

from autocompress.hardware.skeleton import Skeleton
from autocompress.pareto import pareto_mask
from autocompress.plan import CompressionPlan
from autocompress.search.files import read_json, write_text
from autocompress.search.study import ERROR, PLAN, Adopted, PlanStudy, open_storage

FILE = "studies.json"

MOST_ADOPTED = 300
"""Plans that are taken over, the best front of them first, then the next: writing them takes time."""

MOST_SEEDS = 32


def note_study(run: Path, name: str, seed: int) -> None:
    """Notes that a study's candidates are of this run's model, and on which samples they were evaluated."""
    path = run / ".work" / FILE
    noted: dict[str, int] = read_json(path) or {}
    if noted.get(name) != seed:
        write_text(path, json.dumps({**noted, name: seed}))


def known_elsewhere(study: PlanStudy, storage: str, run: Path, seed: int, skeleton: Skeleton) -> list[Adopted]:
    """What the other studies noted in a run directory evaluated, as far as this study's menu and limits allow it.

    Args:
        study: that would go on from it.
        storage: that holds all of them.
        run: whose notes say which studies are of the same model.
        seed: of the samples that candidates are evaluated on; others say something else.
        skeleton: gives the costs as they are predicted now.
    """
    noted: dict[str, int] = read_json(run / ".work" / FILE) or {}
    wanted = {name for name, theirs in noted.items() if theirs == seed and name != study.name}
    if not wanted:
        return []
    found: dict[str, tuple[CompressionPlan, tuple[int, ...], float, float, str]] = {}
    opened = open_storage(storage)
    for name in sorted(wanted & set(optuna.get_all_study_names(opened))):
        other = optuna.load_study(study_name=name, storage=opened)
        for trial in other.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            choices = study.menu.choices(plan)
            if study.menu.plan(choices).structure_digest == plan.structure_digest:
                row = (plan, choices, trial.values[0], trial.user_attrs[ERROR], f"{name} {trial.number}")
                found.setdefault(plan.structure_digest, row)
    if not found:
        return []
    rows = list(found.values())
    table = skeleton.price([plan for plan, *_ in rows])
    columns = {name: getattr(table, name) for name in {*study.costs, *study.limits}}
    known = []
    for index, (plan, choices, divergence, error, origin) in enumerate(rows):
        costs = {name: float(column[index]) for name, column in columns.items()}
        if all(costs[name] <= limit for name, limit in study.limits.items()):
            known.append(Adopted(plan, choices, divergence, error, costs, origin))
    return _first_fronts(known, study.costs)


def best_of(known: Sequence[Adopted], costs: Sequence[str]) -> list[Adopted]:
    """The front of what is known, spread over its divergences: the plans to begin with."""
    if not known:
        return []
    front = [item for item, good in zip(known, pareto_mask(_values(known, costs)), strict=True) if good]
    front.sort(key=lambda item: item.divergence)
    places = np.unique(np.linspace(0, len(front) - 1, min(len(front), MOST_SEEDS)).round().astype(int))
    return [front[place] for place in places]


def _first_fronts(known: Sequence[Adopted], costs: Sequence[str]) -> list[Adopted]:
    rest, chosen = list(known), list[Adopted]()
    while rest and len(chosen) < MOST_ADOPTED:
        mask = pareto_mask(_values(rest, costs))
        chosen += [item for item, good in zip(rest, mask, strict=True) if good]
        rest = [item for item, good in zip(rest, mask, strict=True) if not good]
    return chosen[:MOST_ADOPTED]


def _values(known: Sequence[Adopted], costs: Sequence[str]) -> np.ndarray:
    return np.array([[item.divergence, *(item.costs[name] for name in costs)] for item in known])
