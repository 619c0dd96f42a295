"""Whatever is wrong with what was asked: exit code 2, one clear error with the nearest name, nothing left behind."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine, Result, files_of


@dataclass(frozen=True)
class Case:
    """Options, and what the error must say; ``OWN`` stands for the example's task, ``{name}`` for a file made here."""

    options: tuple[str, ...]
    says: tuple[str, ...]


OWN = "OWN"
CASES = {
    "task": Case(("--task", "digit"), ("--task", "'digit'", "nearest: 'digits'", "fashion-mnist")),
    "module": Case(("--task", "own_modle:task"), ("no module named 'own_modle'",)),
    "function": Case(("--task", "own_model:tsk"), ("'tsk'", "nearest: 'task'")),
    "model": Case(("--task", "digits", "--model", "resnet9"), ("--model", "'resnet9'", "nearest: 'resnet")),
    "own task with a model": Case((OWN, "--model", "resnet8"), ("brings its own model", "resnet8")),
    "hardware": Case((OWN, "--hardware", "lokal"), ("--hardware", "'lokal'", "nearest: 'local'")),
    "hardware file": Case((OWN, "--hardware", "{broken.yaml}"), ("broken.yaml",)),
    "space": Case((OWN, "--space", "defualt"), ("--space", "'defualt'", "nearest: 'default'")),
    "space file": Case((OWN, "--space", "{space.yaml}"), ("space.yaml", "nearest: 'keep'")),
    "freeze": Case((OWN, "--freeze", "feature.0"), ("--freeze", "'feature.0'", "nearest: 'features.0'")),
    "objective": Case((OWN, "--objectives", "error,latency"), ("--objectives", "nearest: 'latency_ms'")),
    "runtime": Case((OWN, "--runtime", "onnxrt"), ("--runtime", "'onnxrt'", "onnxruntime")),
    "device": Case((OWN, "--device", "gpu"), ("--device", "'gpu'", "'cuda'")),
    "number": Case((OWN, "--trials", "many"), ("--trials", "integer")),
    "zero trials": Case((OWN, "--trials", "0"), ("--trials", "greater than or equal to 1")),
    "negative budget": Case((OWN, "--max-latency-ms", "-1"), ("--max-latency-ms", "greater than 0")),
    "duration": Case((OWN, "--time-budget", "soon"), ("--time-budget", "'soon'")),
    "flag": Case((OWN, "--max-latency", "1"), ("--max-latency", "--max-latency-ms")),
    "configuration": Case(("{config.yaml}",), ("config.yaml:trails", "nearest: 'trials'")),
    "missing configuration": Case(("absent.yaml",), ("absent.yaml",)),
    "energy": Case((OWN, "--max-energy-mj", "1"), ("energy",)),
    "resume without a run": Case((OWN, "--resume"), ("--resume", "--out")),
    "missing weights": Case((OWN, "--weights", "absent.pt"), ("--weights", "absent.pt")),
    "weights of another kind": Case((OWN, "--weights", "{config.yaml}"), ("--weights", ".safetensors")),
    "broken weights": Case((OWN, "--weights", "{broken.safetensors}"), ("--weights", "broken.safetensors")),
    "pickle": Case((OWN, "--weights", "{pickle.pt}"), ("--weights", "pickle.pt", "state_dict")),
    "weights of another model": Case((OWN, "--weights", "{other.pt}"), ("--weights", "do not fit the model")),
    "missing data": Case(("--task", "digits", "--data", "absent"), ("--data", "absent")),
    "missing images": Case(("--task", "imagefolder:absent", "--model", "resnet8"), ("absent",)),
    "images without a model": Case(("--task", "imagefolder:absent"), ("--model",)),
    "empty data set": Case(("--task", "cifar10", "--data", "{empty}"), ("--data", "empty")),
}


class Harmful:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("unpickled"),))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "broken.yaml").write_text("kernels: [", encoding="utf-8")
    (folder / "space.yaml").write_text("kep: [0.5]", encoding="utf-8")
    (folder / "config.yaml").write_text("trails: 3", encoding="utf-8")
    (folder / "broken.safetensors").write_bytes(b"not tensors")
    with (folder / "pickle.pt").open("wb") as file:
        pickle.dump(Harmful(), file)
    torch.save(torch.nn.Linear(3, 3).state_dict(), folder / "other.pt")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def results(run: Run, cli: CommandLine, files: Path) -> Mapping[str, tuple[Result, Path]]:
    """All cases, two at a time: most of what they take is starting Python."""
    out = files / "out"

    def attempt(name: str) -> tuple[Result, Path]:
        words: list[str] = []
        for option in CASES[name].options:
            given = files / option[1:-1] if option.startswith("{") else option
            words += cli.own_task if option == OWN else [str(given)]
        directory = out / name.replace(" ", "-")
        # Without --out the run directory is made below the working directory, which must stay empty too.
        place = [] if name in ("task", "resume without a run", "freeze") else ["--out", str(directory)]
        return cli("search", *words, *place), directory

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(attempt, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input(results: Mapping[str, tuple[Result, Path]], name: str) -> None:
    result, directory = results[name]
    assert result.code == 2, result.err
    assert result.out == ""
    for text in CASES[name].says:
        assert text in result.err
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1 or name == "flag", result.err
    assert not directory.exists()


def test_nothing_is_left_in_the_working_directory(results: Mapping[str, tuple[Result, Path]], cli: CommandLine) -> None:
    assert len(results) == len(CASES)
    assert files_of(cli.cwd) == set()
    assert not list(cli.cwd.glob("results/*"))
