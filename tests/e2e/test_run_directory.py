"""What a finished search leaves: the contract of the run directory, held against the real files."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath

import numpy as np
import onnx
import onnxruntime as ort
import optuna
import pandas as pd
import pytest
import torch
import yaml

from autocompress.front import Point, load_point
from autocompress.pareto import dominates
from autocompress.plan import CompressionPlan
from autocompress.runtime.kernels import executed_kernels
from autocompress.tasks.base import Task, quality
from benchmarks.kill_resume import leftovers
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine, files_of

FILES = {
    "config.yaml", "space.json", "profile.yaml", "environment.json", "study.db", "trials.csv", "front.json",
    "front.csv", "rejected.csv", "ladder.csv", "report.html", "log.jsonl", "manifest.json",
}  # fmt: skip
MODEL_FILES = {"model.onnx", "model.safetensors", "plan.json", "metrics.json"}
FRONT_KEYS = {
    "schema", "status", "verified", "task", "model", "metric", "target", "seed", "objectives", "constraints",
    "reference", "baselines", "points", "search",
}  # fmt: skip
POINT_KEYS = {
    "id", "plan", "quality", "latency_ms", "size_bytes", "params", "macs", "peak_memory_bytes", "energy_mj",
    "artifact", "checkpoint", "runtime_agreement", "kernels", "tied_with", "feasible",
}  # fmt: skip


def delivered(run: Run) -> list[Point]:
    front = run.front
    return [front.reference, *front.baselines, *front.points]


def test_every_file_of_the_contract_is_there_and_nothing_is_left_over(run: Run) -> None:
    assert {name for name in FILES if not (run.path / name).is_file()} == set()
    assert leftovers(run.path) == []
    for point in delivered(run):
        assert {file.name for file in point.path.iterdir()} == MODEL_FILES
    assert {folder.name for folder in (run.path / "models").iterdir()} == {point.id for point in delivered(run)}


def test_the_study_of_formats_learns_from_what_was_delivered(run: Run) -> None:
    study = optuna.load_study(study_name="formats", storage=f"sqlite:///{run.path / 'study.db'}")
    told = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.COMPLETE]
    assert told
    assert all(trial.values[0] >= 0.0 for trial in told)


def test_front_json_has_the_contracts_keys(run: Run) -> None:
    front = json.loads((run.path / "front.json").read_text(encoding="utf-8"))
    assert front.keys() == FRONT_KEYS
    assert (front["schema"], front["status"], front["verified"], front["seed"]) == (1, "complete", True, 0)
    assert front["target"].keys() == {"hardware", "runtime", "version", "threads", "batch"}
    assert front["metric"] == {"name": "accuracy", "unit": "fraction", "higher_is_better": True}
    assert front["search"].keys() == {"trials", "seconds", "hypervolume", "stages", "split_gap"}
    assert front["search"]["trials"] == 48
    assert 0 < front["search"]["hypervolume"] < 1
    for point in (front["reference"], *front["baselines"], *front["points"]):
        assert point.keys() == POINT_KEYS
        assert point["latency_ms"].keys() == {"predicted", "measured", "measured_p95", "error_band"}
        assert point["quality"].keys() == {"validation", "test", "test_ci95", "drop_ci95"}
        assert point["latency_ms"]["measured"] > 0
        for path in (point["artifact"], point["checkpoint"]):
            assert not PurePosixPath(path).is_absolute()
            assert (run.path / path).is_file()
        low, high = point["quality"]["test_ci95"]
        assert low <= point["quality"]["test"] <= high


def test_nothing_names_the_machines_paths(run: Run) -> None:
    for name in ("front.json", "front.csv", "rejected.csv", "trials.csv", "report.html", "manifest.json"):
        assert str(run.path) not in (run.path / name).read_text(encoding="utf-8"), name


def test_no_point_dominates_another_as_measured(run: Run) -> None:
    points = run.front.points
    assert len(points) >= 3
    values = {point.id: [point.objective(name) for name in run.front.front.objectives] for point in points}
    assert [(a, b) for a in values for b in values if dominates(values[a], values[b])] == []


def test_metrics_and_plan_of_a_model_are_the_fronts(run: Run) -> None:
    for point in delivered(run):
        metrics = json.loads((point.path / "metrics.json").read_text(encoding="utf-8"))
        assert metrics == point.info.model_dump(mode="json")
        plan = json.loads((point.path / "plan.json").read_text(encoding="utf-8"))["plan"]
        assert CompressionPlan.model_validate(plan) == point.plan


def test_tables_agree_with_the_front(run: Run) -> None:
    table = pd.read_csv(run.path / "front.csv").set_index("id")
    assert set(table.index) == {point.id for point in run.front.points}
    for point in run.front.points:
        assert table.loc[point.id, "latency_ms"] == pytest.approx(point.latency_ms)
    rejected = pd.read_csv(run.path / "rejected.csv").set_index("id")
    assert not set(rejected.index) & set(table.index)
    assert rejected["reason"].str.match(r"dominated as measured by |within 2% of another|breaks a budget|.*").all()
    assert rejected["reason"].notna().all()


def test_the_manifest_covers_what_is_delivered(run: Run) -> None:
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    for point in delivered(run):
        assert {f"models/{point.id}/{name}" for name in MODEL_FILES} <= manifest.keys()
    for name, digest in manifest.items():
        assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == digest


def test_the_log_is_json_lines_and_the_environment_names_versions(run: Run) -> None:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    facts = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    assert {"autocompress", "torch", "onnxruntime", "optuna"} <= facts["packages"].keys()
    assert facts["python"]
    assert facts["cpu"]
    assert facts["training"] == "cpu"


def test_the_resolved_configuration_repeats_the_run(run: Run) -> None:
    config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert config["trials"] == 48
    assert config["seed"] == 0
    assert not {"out", "resume", "dry_run"} & config.keys()


def test_trials_carry_their_plans_and_none_is_evaluated_twice(run: Run) -> None:
    trials = pd.read_csv(run.path / "trials.csv")
    assert len(trials) >= 48
    complete = trials[trials["state"] == "COMPLETE"]
    knobs = [name for name in trials.columns if trials[name].astype(str).str.contains(r"(?:fp32|int8)-w\d").any()]
    first = complete[complete["same_as"].isna()]
    assert not first.duplicated(knobs).any()
    # The repeats say whose values they took.
    for _, row in complete[complete["same_as"].notna()].iterrows():
        original = trials.set_index("number").loc[int(row["same_as"])]
        assert list(row[knobs]) == list(original[knobs])
        assert row["divergence"] == original["divergence"]


# -------------------------------------------------------------------------------------------------------- the artifacts


def test_artifacts_reproduce_their_quality_in_a_plain_session(run: Run, task: Task) -> None:
    for point in delivered(run):
        session = ort.InferenceSession(str(point.onnx_path))
        for split, written in (("validation", point.validation), ("test", point.test)):
            data = task.split(split)
            (outputs,) = session.run(None, {session.get_inputs()[0].name: data.inputs.numpy()})
            found = float((outputs.argmax(1) == data.targets.numpy()).mean())
            assert abs(found - written) <= 0.002, (point.id, split)


def test_an_artifact_is_one_file_of_the_size_stated(run: Run) -> None:
    for point in delivered(run):
        assert point.onnx_path.stat().st_size == point.size_bytes
        onnx.checker.check_model(str(point.onnx_path), full_check=True)
        model = onnx.load(str(point.onnx_path), load_external_data=False)
        assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_an_artifact_has_the_models_own_names_and_any_batch(run: Run, task: Task) -> None:
    images = task.split("test").inputs
    for point in delivered(run):
        session = ort.InferenceSession(str(point.onnx_path))
        (given,) = session.get_inputs()
        assert given.name == "image"
        assert given.type == "tensor(float)"
        assert given.shape[1:] == [1, 8, 8]
        assert isinstance(given.shape[0], str)
        whole = session.run(None, {"image": images[:64].numpy()})[0]
        assert whole.shape == (64, 10)
        one = np.concatenate([session.run(None, {"image": images[i : i + 1].numpy()})[0] for i in range(64)])
        np.testing.assert_allclose(one, whole, atol=1e-4)


def test_the_kernels_stated_are_those_executed(run: Run) -> None:
    for point in delivered(run):
        assert dict(executed_kernels(point.onnx_path).counts) == point.info.kernels
        int8 = sum(layer.compute == "int8" for layer in point.plan.layers.values())
        assert (point.info.kernels.get("int8", 0) > 0) == (int8 > 0)
    assert run.front.baselines[0].info.kernels.get("fp32", 0) == 0


def test_the_original_is_the_users_model_exported(run: Run, task: Task) -> None:
    reference = run.front.reference
    assert reference.validation == pytest.approx(quality(task, task.model), abs=1e-9)
    assert reference.test == pytest.approx(quality(task, task.model, "test"), abs=1e-9)


# ------------------------------------------------------------------------------------------------------ the checkpoints


def test_a_loaded_point_agrees_with_its_artifact(run: Run, task: Task) -> None:
    images = task.split("test").inputs
    for point in delivered(run):
        module = load_point(point.path).load()
        with torch.no_grad():
            simulated = module(images).numpy()
        executed = point.session().run(None, {"image": images.numpy()})[0]
        assert (simulated.argmax(1) == executed.argmax(1)).mean() >= 0.99, point.id
        # Rounding to int8 can fall on either side; the outputs stay close all the same.
        spread = float(np.abs(executed).max())
        assert np.abs(simulated - executed).mean() <= 0.01 * spread, point.id


def test_the_users_model_and_weights_are_unchanged(run: Run, cli: CommandLine, task: Task) -> None:
    stored = torch.load(cli.weights / "digit_net.pt", weights_only=True)
    state = task.model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    assert {path.name for path in cli.weights.iterdir()} == {"digit_net.pt"}
    assert files_of(cli.cwd) == set()


@pytest.mark.parametrize("ratio", ["speedup", "shrink"])
def test_something_was_gained(run: Run, ratio: str) -> None:
    assert max(getattr(point, ratio) for point in run.front.points) > {"speedup": 1.0, "shrink": 4.0}[ratio]
