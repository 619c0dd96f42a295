"""Exports candidates, measures the files in the runtime, and says which of them are the front."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np
import numpy.typing as npt
import torch

from autocompress.errors import UsageError
from autocompress.export.checkpoint import save_checkpoint
from autocompress.export.metadata import ArtifactMetrics, Provenance, describe, stamp
from autocompress.export.onnx import write_onnx
from autocompress.front import drop_between, error_of, latency_of
from autocompress.hardware.profile import cpu_description
from autocompress.methods.compressed import CompressedModel, not_finite
from autocompress.methods.simulation import build_compressed
from autocompress.plan import Estimate, FrontPoint, Latency, Quality, Target
from autocompress.progress import Progress, SilentProgress
from autocompress.runtime.base import run_batches, runtime_here
from autocompress.runtime.kernels import check_kernels
from autocompress.runtime.timing import LatencyStats, measure_latency
from autocompress.search.failures import is_expected, reason_of
from autocompress.search.files import read_json, write_text
from autocompress.search.membership import ALIKE, apart_mask, front_mask
from autocompress.search.scoring import Scores, interval, paired_drop, ties
from autocompress.search.stages import Stages
from autocompress.search.target import BANDED
from autocompress.tasks.base import Task, predict

logger = logging.getLogger(__name__)

ORIGINAL, UNIFORM_INT8 = "original", "uniform-int8"
BATCH = 250
AGREEMENT_SAMPLES = 500
TRIED_S = 0.05
"""Seconds for which a model is timed to see whether it runs."""

LATENCY_MARGIN = 1.03
"""A latency budget must hold with this much to spare, since measuring again gives another median."""


class NotAsPlannedError(RuntimeError):
    """The runtime executes a model otherwise than its plan says."""


@dataclass
class Delivery:
    """The models of one run: what was exported, what was measured, and which of it is the front.

    Attributes:
        run: the run directory.
        task: gives the splits and the score.
        target: where the files are measured.
        objectives: axes of the front, one to four.
        limits: budgets by cost name; ``drop`` in points of validation quality.
        knows_energy: whether the estimates' energy is that of the whole run.
        present: whether the target is here to be measured; else points stand on predictions, budgets on their bands.
        uppers: what a latency budget is held against, by point: the upper end of the measured median or of the band.
        bounds: the upper ends of other predicted costs, by point and cost.
        failures: why candidates did not become a point: by the name of the model, or of the recovery, that failed.
        stages: where the time goes.
        standing: the front as last published: of two points as good as alike, one that stands there stays.
        scores: of each sample, by point and split.
        files: the folder that holds a folder of files a model.
    """

    run: Path
    task: Task
    target: Target
    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    seed: int
    present: bool = True
    knows_energy: bool = True
    points: dict[str, FrontPoint] = field(default_factory=dict)
    uppers: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    standing: frozenset[str] = frozenset()
    stages: Stages = field(default_factory=Stages)
    scores: dict[tuple[str, str], Scores] = field(default_factory=dict)
    _scoring_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = self.run / ".work" / "models"
        published = read_json(self.run / "front.json")
        if published is not None:
            self.standing = frozenset(point["id"] for point in published["points"])
        self.failures.update(read_json(self._failed) or {})
        for path in sorted(self.files.glob("*/metrics.json")):
            facts = json.loads(path.read_text(encoding="utf-8"))
            point = FrontPoint.model_validate(facts["point"])
            # A process that was stopped between stamping a file and noting it left the file a few bytes longer.
            stamped = (path.parent / "model.onnx").stat().st_size
            size = point.size_bytes + stamped - facts.get("artifact_bytes", stamped)
            self.points[path.parent.name] = point.model_copy(update={"size_bytes": size})
            self.uppers[path.parent.name] = facts["latency_upper_ms"]
            self.bounds[path.parent.name] = facts.get("bounds", {})
            for split in ("validation", "test"):
                if (path.parent / f"{split}.npy").is_file():
                    self.scores[path.parent.name, split] = np.load(path.parent / f"{split}.npy").astype(np.float64)

    # --------------------------------------------------------------------------------------------- exporting

    @property
    def _failed(self) -> Path:
        return self.run / ".work" / "failures.json"

    def fail(self, name: str, error: BaseException | str) -> None:
        """Notes that a candidate failed, and why: in the log and, from the next front on, in ``rejected.csv``.

        A resumed run remembers it, and does not try again.
        """
        reason = error if isinstance(error, str) else reason_of(error)
        unexpected = error if isinstance(error, Exception) and not is_expected(error) else None
        logger.warning("%s is left out: %s", name, reason, exc_info=unexpected)
        self.failures[name] = reason
        write_text(self._failed, json.dumps(self.failures, indent=1))

    def add(self, name: str, make: Callable[[], CompressedModel], estimate: Estimate | None) -> bool:
        """Makes one model, exports it and scores the file; its latency follows with ``measure``.

        Whatever goes wrong with the candidate on the way is noted as the reason why it is left out.

        Args:
            name: of the model; what was added or failed before is left as it is.
            make: gives the model.
            estimate: of its costs.

        Returns:
            Whether it is there to be measured.

        Raises:
            OSError: files cannot be written, which is no candidate's fault.
        """
        if name in self.points or name in self.failures:
            return name in self.points
        folder = self.files / f"{name}.part"
        try:
            compressed = make()
            with self.stages.of("export"):
                self._export(name, compressed, estimate, folder)
        except OSError:
            raise
        except Exception as error:
            self.fail(name, str(error) if isinstance(error, NotAsPlannedError) else error)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def _export(self, name: str, compressed: CompressedModel, estimate: Estimate | None, folder: Path) -> None:
        broken = not_finite(compressed.graph, compressed.weights)
        if broken:
            raise FloatingPointError(f"its weights are no finite numbers, those of {broken[0]} first")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artifact = folder / "model.onnx"
        metadata = describe(compressed.plan, self._origin(compressed))
        size = write_onnx(compressed, artifact, metadata, self.target.runtime)
        runtime = runtime_here(self.target.runtime)
        report = runtime.executed_kernels(artifact, self.target.threads)
        problems = check_kernels(compressed, report)
        if problems:
            raise NotAsPlannedError("; ".join(problems))
        save_checkpoint(compressed, folder)
        outputs = self._score(name, "validation", folder)
        agreement = self._agreement(compressed, outputs)
        costs = estimate.costs if estimate is not None else {}
        latency = costs.get("latency_ms")
        memory, energy = costs.get("peak_memory_bytes"), costs.get("energy_mj")
        self.bounds[name] = {cost: costs[cost].high for cost in BANDED if cost in costs and cost != "latency_ms"}
        self.points[name] = FrontPoint(
            id=name,
            plan=compressed.plan,
            quality=Quality(validation=float(self.scores[name, "validation"].mean())),
            latency_ms=Latency(
                predicted=None if latency is None else latency.value,
                measured=None,
                measured_p95=None,
                error_band=None if latency is None else (latency.low, latency.high),
            ),
            size_bytes=size,
            params=compressed.graph.parameters(),
            macs=compressed.graph.macs(),
            peak_memory_bytes=None if memory is None else int(memory.value),
            energy_mj=None if energy is None or not self.knows_energy else energy.value,
            artifact=f"models/{name}/model.onnx",
            checkpoint=f"models/{name}/model.safetensors",
            runtime_agreement=agreement,
            kernels=dict(report.counts),
        )
        final = self.files / name
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)

    def _score(self, name: str, split: str, folder: Path) -> torch.Tensor:
        """Runs a file over a split and keeps the scores beside it; gives its outputs."""
        started = monotonic()
        runtime = runtime_here(self.target.runtime)
        session = runtime.session(folder / "model.onnx", threads=min(2, torch.get_num_threads()))
        data = self.task.split(split)
        batches = (data.batch(slice(i, i + BATCH)).inputs[0].numpy() for i in range(0, len(data), BATCH))
        outputs = torch.from_numpy(run_batches(session, batches))
        unknown = int(outputs.isnan().reshape(len(outputs), -1).any(1).sum())
        if unknown:
            raise FloatingPointError(f"its outputs are not numbers on {unknown} of {len(data)} {split} samples")
        scores = self.task.score(outputs, data.targets).double().numpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"its scores are no finite numbers on the {split} split")
        partial = folder / f".{split}.npy"
        np.save(partial, scores.astype(np.float32))
        partial.replace(folder / f"{split}.npy")
        self.scores[name, split] = scores
        self._scoring_s[name] = monotonic() - started
        return outputs

    def _score_test(self, name: str) -> None:
        """Scores a model that stands on the front on the test split, once."""
        point = self.points[name]
        if point.quality.test is None:
            self._score(name, "test", self.files / name)
            test, reference = self.scores[name, "test"], self.scores.get((ORIGINAL, "test"))
            drop = None
            if reference is not None and name != ORIGINAL:
                better, worse = (reference, test) if self.task.metric.higher_is_better else (test, reference)
                drop = paired_drop(better, worse)
            facts = {"test": float(test.mean()), "test_ci95": interval(test), "drop_ci95": drop}
            self.points[name] = point.model_copy(update={"quality": point.quality.model_copy(update=facts)})
            self._save(name)

    def scoring_seconds(self, names: Sequence[str]) -> float:
        """How long it will take to score models on the test split, by what their validation split took."""
        ratio = len(self.task.split("test")) / max(len(self.task.split("validation")), 1)
        usual = sum(self._scoring_s.values()) / max(len(self._scoring_s), 1)
        waiting = [name for name in names if name in self.points and self.points[name].quality.test is None]
        return ratio * sum(self._scoring_s.get(name, usual) for name in waiting)

    def score_front(self) -> None:
        """Scores what stands on the front on the test split, once; a model that cannot be scored there leaves it."""
        waiting = True
        while waiting:
            shown = [
                *(name for name in (ORIGINAL, UNIFORM_INT8) if name in self.points),
                *(p.id for p in self.select()[0]),
            ]
            waiting = False
            for name in shown:
                try:
                    self._score_test(name)
                except OSError:
                    raise
                except Exception as error:
                    if name == ORIGINAL:
                        raise UsageError(f"the original cannot be scored on the test split: {error}") from error
                    self._withdraw(name, error)
                    waiting = True

    def _origin(self, compressed: CompressedModel) -> Provenance:
        names = {"task": self.task.name, "model": self.task.model_name}
        return Provenance.here(compressed.plan, cpu_description(), seed=self.seed, **names)

    def _agreement(self, compressed: CompressedModel, outputs: torch.Tensor) -> float:
        """The share of validation samples that the torch simulation and the runtime classify alike."""
        simulated = predict(
            build_compressed(compressed), self.task.split("validation").take(slice(0, AGREEMENT_SAMPLES))
        )
        count = len(simulated)
        if simulated.dim() != 2:
            return float(torch.isclose(simulated, outputs[:count], rtol=1e-2, atol=1e-2).float().mean())
        return float((simulated.argmax(1) == outputs[:count].argmax(1)).float().mean())

    # --------------------------------------------------------------------------------------------- measuring

    def measure(self, names: Iterable[str], seconds_each: float, progress: Progress | None = None) -> None:
        """Times models in the runtime, the original among them, and writes their metrics.

        Where the target is not here, nothing is timed: a model's latency stays as predicted.
        """
        chosen = [name for name in dict.fromkeys([ORIGINAL, *names]) if name in self.points]
        if not self.present:
            for name in chosen:
                band = self.points[name].latency_ms.error_band
                if band is not None:
                    self.uppers[name] = band[1]
                    self._save(name)
            return
        with self.stages.of("measure"):
            try:
                stats = self._time(chosen, seconds_each, progress)
            except OSError:
                raise
            except Exception:
                # They are timed in turn, so one that cannot run stops them all.
                stats = self._time(self._that_run(chosen), seconds_each, progress)
            for name, taken in stats.items():
                self._record(name, taken)

    def _time(
        self, names: Iterable[str], seconds_each: float, progress: Progress | None = None
    ) -> dict[str, LatencyStats]:
        return measure_latency(
            {name: self.files / name / "model.onnx" for name in names},
            threads=self.target.threads,
            batch=self.target.batch,
            seconds_each=seconds_each,
            progress=progress or SilentProgress(),
            runtime=self.target.runtime,
        )

    def _that_run(self, names: Iterable[str]) -> list[str]:
        """Those models that run at the target's threads and batch; the others leave, with the reason."""
        running = []
        for name in names:
            try:
                self._time([name], TRIED_S)
            except OSError:
                raise
            except Exception as error:
                if name == ORIGINAL:
                    raise UsageError(f"the original does not run as exported: {reason_of(error)}") from error
                self._withdraw(name, error)
            else:
                running.append(name)
        return running

    def _withdraw(self, name: str, error: Exception) -> None:
        """Takes a model back that turned out not to run."""
        self.fail(name, error)
        del self.points[name]
        shutil.rmtree(self.files / name)

    def _record(self, name: str, taken: LatencyStats) -> None:
        point = self.points[name]
        latency = point.latency_ms.model_copy(update={"measured": taken.median_ms, "measured_p95": taken.p95_ms})
        self.points[name] = point.model_copy(update={"latency_ms": latency})
        self.uppers[name] = max(taken.high_ms, taken.median_ms * LATENCY_MARGIN)
        self._save(name)

    def _save(self, name: str) -> None:
        artifact, point = self.files / name / "model.onnx", self.points[name]
        before = artifact.stat().st_size
        grown = stamp(artifact, ArtifactMetrics.of(point, self.task.metric, self.target)) - before
        self.points[name] = point.model_copy(update={"size_bytes": point.size_bytes + grown})
        facts = {
            "point": self.points[name].model_dump(mode="json"),
            "latency_upper_ms": self.uppers[name],
            "bounds": self.bounds.get(name, {}),
            "artifact_bytes": artifact.stat().st_size,
        }
        write_text(self.files / name / "metrics.json", json.dumps(facts))

    # --------------------------------------------------------------------------------------------- selecting

    def excess(self, point: FrontPoint) -> dict[str, float]:
        """By what share of each broken budget a measured point exceeds it."""
        values = {**self.costs(point), "drop": self.drop_of(point)}
        values["latency_ms"] = self.uppers.get(point.id, latency_of(point) or np.inf)
        found = {}
        for name, limit in self.limits.items():
            value = values.get(name)
            if not self.present and value is not None:
                value = self.bounds.get(point.id, {}).get(name, value)
            if value is None or value > limit + 1e-9:
                found[name] = (
                    np.inf if value is None else (value - limit) / max(limit, 0.1 if name == "drop" else 1e-12)
                )
        return found

    def drop_of(self, point: FrontPoint) -> float:
        """Points of validation quality that a model lost against the original."""
        return drop_between(self.task.metric, self.points[ORIGINAL], point, "validation")

    def select(self) -> tuple[list[FrontPoint], dict[str, str]]:
        """The front among the measured models, best quality first, and why each other one is left out."""
        rejected = dict(self.failures)
        candidates = []
        for name, point in self.points.items():
            if name in (ORIGINAL, UNIFORM_INT8) or not self.counts(point):
                continue
            broken = self.excess(point)
            unknown = [
                cost for cost, value in zip(self.objectives, self._values(point), strict=True) if np.isnan(value)
            ]
            if unknown:
                rejected[name] = f"{', '.join(unknown)} is not known"
            elif broken:
                limits = ", ".join(f"{key} by {100 * share:.1f}%" for key, share in broken.items())
                rejected[name] = f"breaks a budget: {limits}"
            else:
                candidates.append(point)
        candidates.sort(key=lambda p: (error_of(self.task.metric, p.quality.validation), latency_of(p) or 0.0))
        mask = front_mask(self._table(candidates), self._errors(candidates))
        kept = [p for p, good in zip(candidates, mask, strict=True) if good]
        for point, good in zip(candidates, mask, strict=True):
            if not good:
                by = next(q.id for q in kept if (np.array(self._values(q)) <= np.array(self._values(point))).all())
                rejected[point.id] = f"dominated as {'measured' if self.present else 'predicted'} by {by}"
        alike = apart_mask(self._table(kept), self._errors(kept), [p.id in self.standing for p in kept])
        for point, apart in zip(kept, alike, strict=True):
            if not apart:
                rejected[point.id] = "within 2% of another point on every axis"
        kept = [p for p, apart in zip(kept, alike, strict=True) if apart]
        labels = ties({p.id: self.scores[p.id, "validation"] for p in kept})
        beaten = self._beaten(kept, labels)
        rejected.update({name: f"less accurate than {by}, and no cost is 2% lower" for name, by in beaten.items()})
        kept = [p for p in kept if p.id not in beaten]
        shown = {p.id for p in kept}
        tied = {p.id: tuple(name for name in labels[p.id] if name in shown) for p in kept}
        return [p.model_copy(update={"tied_with": tied[p.id]}) for p in kept], rejected

    def _beaten(self, points: Sequence[FrontPoint], tied: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        """Points that save next to nothing against one whose quality is better beyond chance, and which that is.

        Args:
            points: of the front, best quality first.
            tied: for each point, those whose quality cannot be told from its own.
        """
        if "error" not in self.objectives or len(self.objectives) == 1:
            return {}
        costs = np.delete(self._table(points), self.objectives.index("error"), axis=1)
        found: dict[str, str] = {}
        for place, point in enumerate(points):
            for better in range(place):
                name = points[better].id
                if name in found or name in tied[point.id]:
                    continue
                if (costs[better] <= (1.0 + ALIKE) * costs[place]).all():
                    found[point.id] = name
                    break
        return found

    def counts(self, point: FrontPoint) -> bool:
        """Whether a point's latency is known as well as it will be: measured, or predicted where nothing is."""
        return point.latency_ms.measured is not None or (not self.present and point.id in self.uppers)

    @staticmethod
    def costs(point: FrontPoint) -> dict[str, float]:
        """The costs of a point that are known."""
        values = {
            "latency_ms": latency_of(point),
            "size_bytes": point.size_bytes,
            "peak_memory_bytes": point.peak_memory_bytes,
            "energy_mj": point.energy_mj,
            "macs": point.macs,
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    def _values(self, point: FrontPoint) -> list[float]:
        named = {"error": error_of(self.task.metric, point.quality.validation), "latency_ms": latency_of(point)}
        values = [named[name] if name in named else getattr(point, name) for name in self.objectives]
        return [float("nan") if value is None else float(value) for value in values]

    def _table(self, points: Sequence[FrontPoint]) -> npt.NDArray[np.float64]:
        return np.array([self._values(p) for p in points]).reshape(len(points), len(self.objectives))

    def _errors(self, points: Sequence[FrontPoint]) -> list[float]:
        return [error_of(self.task.metric, p.quality.validation) for p in points]
