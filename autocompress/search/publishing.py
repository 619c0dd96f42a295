"""Brings a run directory up to date with what was delivered: the front, its files and its tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Literal

from autocompress.errors import InfeasibleError
from autocompress.export.files import write_atomic
from autocompress.front import LoadedFront, latency_of, points_frame
from autocompress.plan import Front, FrontPoint, SearchSummary, SplitGap
from autocompress.search.deliver import ORIGINAL, UNIFORM_INT8, Delivery
from autocompress.search.files import write_text
from autocompress.search.scoring import front_hypervolume, split_gap


def publish(
    delivery: Delivery,
    status: Literal["running", "complete"],
    trials: int,
    seconds: float,
    stages: Mapping[str, float],
) -> Front:
    """Brings the run directory up to date: models first, then ``front.json`` renamed into place.

    Models that left the front are removed only after the new ``front.json`` stands.

    Args:
        delivery: what the run has exported and measured.
        status: of the front.
        trials: plans that were evaluated so far.
        seconds: that the run has taken.
        stages: how they were spent, by name.
    """
    points, rejected = delivery.select()
    reference = delivery.points[ORIGINAL]
    baselines = [delivery.points[UNIFORM_INT8]] if UNIFORM_INT8 in delivery.points else []
    shown = [reference, *baselines, *points]
    for point in shown:
        _place(delivery, point)
    task = delivery.task
    front = Front(
        version=1,
        status=status,
        verified=delivery.present,
        task=task.name,
        model=task.model_name,
        metric=task.metric,
        target=delivery.target,
        seed=delivery.seed,
        objectives=delivery.objectives,
        constraints=dict(delivery.limits),
        reference=reference,
        baselines=tuple(baselines),
        points=tuple(points),
        search=SearchSummary(
            trials=trials,
            seconds=seconds,
            hypervolume=front_hypervolume(task.metric, reference, points, delivery.objectives),
            stages=dict(stages),
            split_gap=_split_gap(delivery, points),
        ),
    )
    write_text(delivery.run / "front.json", front.model_dump_json(by_alias=True, indent=1))
    delivery.standing = frozenset(point.id for point in points)
    _write_tables(delivery, front, rejected)
    keep = {point.id for point in shown}
    for folder in (delivery.run / "models").iterdir():
        if folder.name not in keep:
            shutil.rmtree(folder)
    return front


def require_feasible(delivery: Delivery, front: Front) -> None:
    """Raises the error of exit code 3 where no point keeps the budgets, with the one that comes nearest.

    Raises:
        InfeasibleError: the front is empty.
    """
    if front.points:
        return
    delivered = [p for n, p in delivery.points.items() if n != ORIGINAL and delivery.counts(p)]
    if not delivery.limits or not delivered:
        raise InfeasibleError(_empty_message(delivery.failures))
    nearest = min(delivered, key=lambda p: sum(delivery.excess(p).values()))
    raise InfeasibleError(_nearest_message(delivery, nearest), nearest)


def _split_gap(delivery: Delivery, points: Sequence[FrontPoint]) -> SplitGap | None:
    known = [p.id for p in points if (p.id, "test") in delivery.scores]
    return split_gap(*([delivery.scores[name, split] for name in known] for split in ("validation", "test")))


def _place(delivery: Delivery, point: FrontPoint) -> None:
    """Puts a model's files under ``models/``; a folder that appears there is whole."""
    target, source = delivery.run / "models" / point.id, delivery.files / point.id
    if not target.is_dir():
        partial = target.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ("model.onnx", "model.safetensors", "plan.json"):
            shutil.copy2(source / name, partial / name)
        write_text(partial / "metrics.json", point.model_dump_json(indent=1))
        partial.rename(target)
    else:
        stamped = (source / "model.onnx").read_bytes()
        if stamped != (target / "model.onnx").read_bytes():
            write_atomic(target / "model.onnx", stamped)
        write_text(target / "metrics.json", point.model_dump_json(indent=1))


def _write_tables(delivery: Delivery, front: Front, rejected: Mapping[str, str]) -> None:
    """``front.csv``, and ``rejected.csv`` with the reason why each other candidate is left out."""
    loaded = LoadedFront(delivery.run, front)
    write_text(delivery.run / "front.csv", loaded.to_frame().to_csv())
    frame = points_frame([loaded._handle(delivery.points[n]) for n in rejected if n in delivery.points])
    for name in rejected:
        point = delivery.points.get(name)
        frame.loc[name, "feasible"] = point is not None and not delivery.excess(point)
    frame["reason"] = [rejected[name] for name in frame.index]
    write_text(delivery.run / "rejected.csv", frame.to_csv(index_label="id"))


def _empty_message(failures: Mapping[str, str]) -> str:
    """Says why there is no compressed model at all."""
    if failures:
        name, reason = next(iter(failures.items()))
        count = len(failures)
        return (
            f"no compressed model was delivered: {count} candidate{'s' if count > 1 else ''} failed, {name} first "
            f"({reason}); see rejected.csv and log.jsonl"
        )
    return (
        "no compressed model was delivered: nothing that the search space allows is better than the original on "
        "this device; see 'dropped' in space.json, or allow more with --space"
    )


def _nearest_message(delivery: Delivery, nearest: FrontPoint) -> str:
    """Says which budgets the nearest point breaks, in the units they were given in."""
    broken = ", ".join(f"{name} by {100 * share:.1f}%" for name, share in delivery.excess(nearest).items())
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in delivery.limits.items())
    return (
        f"no compressed model keeps the budgets ({limits}); nearest: {nearest.id} with "
        f"{latency_of(nearest):.4g} ms{'' if delivery.present else ' predicted'}, "
        f"{nearest.size_bytes / 1e6:.4g} MB and {delivery.drop_of(nearest):.2f} points of validation quality lost, "
        f"which breaks {broken}"
    )
