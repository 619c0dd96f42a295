"""RunConfig: files and flags, units, and errors that say where a value stands and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.config import RunConfig, load_config
from autocompress.errors import UsageError
from autocompress.rundir import claim_run_directory, discard_unstarted, open_run_directory
from autocompress.units import format_duration, parse_count, parse_duration


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load_config()
    assert (config.task, config.model, config.time_budget, config.trials) == ("digits", "resnet8", 600.0, None)
    assert config.objectives == ("error", "latency_ms", "size_bytes")


def test_trials_alone_set_no_time_budget() -> None:
    assert load_config(flags={"trials": 20}).time_budget is None


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "task: fashion-mnist\nmax-drop: 2\nseed: 7\n")
    config = load_config(file, {"seed": 8, "max_drop": None})
    assert (config.task, config.model, config.seed, config.max_drop) == ("fashion-mnist", "resnet20", 8, 2.0)


def test_budgets_in_the_units_of_the_front() -> None:
    config = RunConfig.create(max_latency_ms=4, max_size_mb=0.5, max_drop=1, max_macs="20M")
    assert config.budgets == {"latency_ms": 4.0, "size_bytes": 500_000.0, "drop": 1.0, "macs": 20_000_000.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "digit"}, "--task: unknown task 'digit'; nearest: 'digits'"),
        ({"device": "gpu"}, "--device: 'gpu' is not allowed; input should be 'auto', 'cpu' or 'cuda'"),
        ({"hardware": "lokal"}, "--hardware: unknown hardware 'lokal'; nearest: 'local'"),
        ({"hardware": "a.yaml"}, "--hardware: no such file: 'a.yaml'"),
        ({"space": "defalt"}, "--space: unknown search space 'defalt'; nearest: 'default'"),
        ({"max_latency_ms": 0}, "--max-latency-ms: 0 is not allowed"),
        ({"max_drop": -1}, "--max-drop: -1 is not allowed"),
        ({"max_latency_ms": float("nan")}, "--max-latency-ms: nan is not allowed"),
        ({"max_size_mb": float("inf")}, "--max-size-mb: inf is not allowed"),
        ({"max_macs": "many"}, "--max-macs: 'many' is not a count; write e.g. 250000, 20M"),
        ({"threads": 0}, "--threads: 0 is not allowed"),
        ({"time_budget": "ten minutes"}, "--time-budget: 'ten minutes' is not a duration; write e.g. 90s"),
        ({"time_budget": "0s"}, "--time-budget: 0.0 is not allowed"),
        ({"objectives": "error,latency"}, "--objectives: unknown objective 'latency'; nearest: 'latency_ms'"),
        ({"objectives": "latency_ms,size_bytes"}, "--objectives latency_ms,size_bytes has no word on quality"),
        ({"objectives": "latency_ms", "max_size_mb": 2}, "add --max-drop POINTS, e.g. --max-drop 1, or error"),
        ({"objectives": ","}, "--objectives: 0 objectives given; give 1 to 4 of error, latency_ms"),
        ({"objectives": "error,latency_ms,size_bytes,macs,energy_mj"}, "--objectives: 5 objectives given; give 1 to 4"),
        ({"reuse": "absent"}, "--reuse: 'absent' holds no run (no config.yaml)"),
        ({"objectives": "error,macs,macs"}, "repeat"),
        ({"freeze": ["re:("]}, "--freeze: 're:(' is not a regular expression"),
        ({"weights": "w.ckpt"}, "--weights: 'w.ckpt' is no weights file; allowed: .safetensors"),
        ({"weights": "absent.pt"}, "--weights: no such file: 'absent.pt'"),
        ({"data": "absent"}, "--data: no such folder: 'absent'"),
        ({"storage": "study.db"}, "--storage: 'study.db' is no storage URL"),
        ({"executor": "ray"}, "--executor: 'ray' is not allowed"),
        ({"task": "imagefolder:pictures"}, "add --model"),
        ({"resume": True}, "--resume needs the run to go on with"),
    ],
)
def test_a_bad_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(flags=flags)
    assert message in str(caught.value)


def test_a_bad_value_in_a_file_cites_file_and_key(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "max_drop: lots\nsed: 1\n")
    with pytest.raises(UsageError, match=r"run\.yaml:sed: unknown key; nearest: 'seed'"):
        load_config(file)
    write(file, "max_drop: lots\nthreads: 0\n")
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert f"{file}:max_drop: 'lots' is not allowed" in str(caught.value)
    assert f"{file}:threads: 0 is not allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- task", "expected 'key: value' lines, found a list")]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path / "run.yaml", text))


def test_a_missing_file() -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_config("absent.yaml")


def test_late_checks_cite_where_the_value_was_given() -> None:
    config = load_config(flags={"model": "resnet2O"})
    with pytest.raises(UsageError, match="--model: unknown model"), config.citing("model", "weights"):
        raise UsageError("unknown model 'resnet2O'")


def test_the_resolved_configuration_repeats_itself(tmp_path: Path) -> None:
    flags = {"freeze": ["conv1", "layer1.*"], "time_budget": "90s", "max_macs": "2M", "objectives": "error,macs"}
    config = load_config(flags={**flags, "out": tmp_path / "run"})
    directory, resumed = open_run_directory(config)
    again = load_config(directory / "config.yaml")
    assert not resumed
    assert again == config.model_copy(update={"out": None})


def test_a_used_directory_needs_resume(tmp_path: Path) -> None:
    open_run_directory(load_config(flags={"out": tmp_path, "seed": 3}))
    with pytest.raises(UsageError, match=r"--out: .* is not empty; add --resume"):
        open_run_directory(load_config(flags={"out": tmp_path, "seed": 3}))
    config = load_config(flags={"out": tmp_path, "resume": True, "time_budget": "20m"})
    assert (config.seed, config.time_budget) == (3, 1200.0)
    assert open_run_directory(config) == (tmp_path, True)


def test_resume_refuses_to_become_another_run(tmp_path: Path) -> None:
    open_run_directory(load_config(flags={"out": tmp_path, "seed": 3}))
    with pytest.raises(UsageError, match="--seed: 4 differs from 3"):
        load_config(flags={"out": tmp_path, "resume": True, "seed": 4})


def test_another_sampler_may_go_on_with_a_run(tmp_path: Path) -> None:
    open_run_directory(load_config(flags={"out": tmp_path}))
    config = load_config(flags={"out": tmp_path, "resume": True, "sampler": "tpe"})
    open_run_directory(config)
    assert load_config(tmp_path / "config.yaml").sampler == "tpe"
    assert load_config(flags={"out": tmp_path, "resume": True}).sampler == "tpe"


def test_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    config = load_config(flags={"out": tmp_path / "new", "resume": True, "task": "digits"})
    assert open_run_directory(config) == (tmp_path / "new", False)


def test_resume_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    write(tmp_path / "diary.txt", "dear diary")
    with pytest.raises(UsageError, match="holds no run"):
        open_run_directory(load_config(flags={"out": tmp_path, "resume": True}))


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [claim_run_directory(load_config())[1] for _ in range(2)]
    assert names == [Path("results/digits-resnet8-1"), Path("results/digits-resnet8-2")]


def test_a_failed_start_leaves_nothing_and_a_run_stays(tmp_path: Path) -> None:
    directory, _ = open_run_directory(load_config(flags={"out": tmp_path / "a"}))
    discard_unstarted(directory)
    assert not directory.exists()
    directory, _ = open_run_directory(load_config(flags={"out": tmp_path / "b"}))
    write(directory / "study.db", "")
    discard_unstarted(directory)
    assert directory.exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("0.5h", 1800), ("45", 45), ("2 m", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "1w", "nan", "10mm", "inf"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_counts() -> None:
    assert [parse_count(text) for text in ("1_000", "2k", "1.5M", "3G")] == [1000, 2000, 1_500_000, 3_000_000_000]


@pytest.mark.parametrize(
    "flags",
    [
        {"objectives": "error", "max_size_mb": 2},
        {"objectives": "error"},
        {"objectives": "latency_ms", "max_drop": 1},
        {"objectives": "latency_ms,size_bytes", "max_drop": 1},
        {"objectives": "latency_ms,size_bytes,macs,energy_mj", "max_drop": 0},
        {"objectives": "error,peak_memory_bytes,energy_mj,macs"},
    ],
)
def test_one_to_four_objectives(flags: dict[str, object]) -> None:
    assert load_config(flags=flags).objectives == tuple(str(flags["objectives"]).split(","))


def test_only_flags_and_keywords_were_given(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "time_budget: 5m\nseed: 3\n")
    config = load_config(file, {"seed": 4, "trials": None})
    assert [key for key in ("time_budget", "seed", "trials", "task") if config.gave(key)] == ["seed"]
    assert config.model_copy(update={"out": tmp_path}).gave("seed")
    assert RunConfig.create(time_budget="5m").gave("time_budget")


def lender(folder: Path) -> Path:
    flags = {"out": folder, "task": "fashion-mnist", "threads": 1, "seed": 3, "freeze": ["conv1"]}
    asked = {"max_drop": 1, "objectives": "latency_ms", "time_budget": "7m"}
    open_run_directory(load_config(flags={**flags, **asked}))
    return folder


def test_a_run_lends_what_it_is_of_and_not_what_was_asked_of_it(tmp_path: Path) -> None:
    config = load_config(flags={"reuse": lender(tmp_path / "first"), "max_size_mb": 0.1, "time_budget": "0s"})
    assert (config.task, config.model, config.seed, config.freeze) == ("fashion-mnist", "resnet20", 3, ("conv1",))
    assert (config.max_drop, config.max_size_mb, config.time_budget) == (None, 0.1, 0.0)
    assert config.objectives == ("error", "latency_ms", "size_bytes")


@pytest.mark.parametrize(("key", "value"), [("threads", 2), ("task", "digits"), ("freeze", ["fc"]), ("batch", 8)])
def test_a_run_does_not_answer_for_another_target_or_task(tmp_path: Path, key: str, value: object) -> None:
    first = lender(tmp_path / "first")
    with pytest.raises(UsageError, match=rf"--{key}: .* differs from .* in .*config\.yaml; what was measured there"):
        load_config(flags={"reuse": first, key: value})


def test_the_configuration_of_a_run_that_reused_another_stands_alone(tmp_path: Path) -> None:
    first = lender(tmp_path / "first")
    open_run_directory(load_config(flags={"reuse": first, "out": tmp_path / "second", "max_drop": 2}))
    first.rename(tmp_path / "gone")
    assert load_config(tmp_path / "second" / "config.yaml").task == "fashion-mnist"
    resumed = load_config(flags={"out": tmp_path / "second", "resume": True})
    assert resumed.reuse == first
    with pytest.raises(UsageError, match=r"--reuse: .* differs from"):
        load_config(flags={"out": tmp_path / "second", "resume": True, "reuse": tmp_path / "gone"})
