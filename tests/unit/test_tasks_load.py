"""Built-in tasks: splits, training once, the cache, and the errors of wrong names."""

from __future__ import annotations

import gzip
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.errors import UsageError
from autocompress.tasks import builtin, load_task, training
from autocompress.tasks.base import DataRequest, quality
from autocompress.tasks.splits import SPLITS, Normalisation


@pytest.fixture(scope="module", autouse=True)
def short_training() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RECIPES", {"digits": training.Recipe(epochs=1, learning_rate=0.05)})
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine are slower than one
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, short_training: None) -> Path:
    """A cache that holds a trained original of digits."""
    directory = tmp_path_factory.mktemp("cache")
    load_task("digits", cache_dir=directory)
    return directory


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often something is trained from here on."""
    calls: list[int] = []
    original = training.train

    def counted(*args: object, **kwargs: object) -> None:
        calls.append(1)
        original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", counted)
    return calls


def test_digits_splits_are_whole_disjoint_and_balanced(tmp_path: Path) -> None:
    data = builtin.digits(DataRequest(None, tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 999,
        "calibration": 128,
        "validation": 300,
        "test": 370,
    }
    digests = {name: set(split.sample_digests()) for name, split in data.splits.items()}
    assert sum(len(d) for d in digests.values()) == 1797
    assert all(not digests[a] & digests[b] for a, b in itertools.combinations(SPLITS, 2))
    for split in data.splits.values():
        share = torch.bincount(split.targets, minlength=10) / len(split)
        assert share.min() > 0.08
    assert data.splits["train"].inputs.shape == (999, 1, 32, 32)
    assert abs(float(data.splits["train"].inputs.mean())) < 0.01
    assert builtin.digits(DataRequest(None, tmp_path)).fingerprint == data.fingerprint


def test_the_original_is_trained_once_and_the_same_everywhere(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trainings(monkeypatch)
    first = load_task("digits", cache_dir=cache)
    assert not calls
    state = torch.random.get_rng_state()
    elsewhere = load_task("digits", cache_dir=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    assert len(calls) == 1
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, elsewhere.model.state_dict()[name]), name
    assert first.fingerprint == elsewhere.fingerprint
    assert not list(tmp_path.rglob("*.part"))


def test_another_seed_is_another_original(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: None)
    first = load_task("digits", cache_dir=cache)
    other = load_task("digits", cache_dir=cache, seed=1)
    assert not torch.equal(first.model.get_parameter("conv1.weight"), other.model.get_parameter("conv1.weight"))


def test_a_damaged_cache_is_made_again(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    cached = min(tmp_path.rglob("digits-resnet8-*.safetensors"))
    good = cached.read_bytes()
    for damaged in tmp_path.rglob("*.safetensors"):
        damaged.write_bytes(good[:100])
    load_task("digits", cache_dir=tmp_path)
    assert len(good) in {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}


def test_what_a_task_offers(cache: Path) -> None:
    task = load_task("digits", cache_dir=cache)
    assert (task.name, task.model_name, task.input_names) == ("digits", "resnet8", ("x",))
    assert (task.input_size, task.normalisation) == (32, Normalisation((0.3056,), (0.3236,)))
    assert task.accepts == {"width", "depth"}
    assert task.factory is not None
    assert not task.model.training
    assert task.example_inputs[0].shape == (2, 1, 32, 32)
    batch = next(iter(task.train))
    assert batch.target is not None
    outputs = task.forward(task.factory(width=0.5), batch)
    assert outputs.shape == (len(batch), 10)
    assert task.loss(outputs, batch.target).ndim == 0
    scores = task.score(torch.eye(10)[:3], torch.tensor([0, 1, 9]))
    assert scores.tolist() == [1.0, 1.0, 0.0]
    assert 0.0 <= quality(task, task.model) <= 1.0
    with pytest.raises(UsageError, match="nearest: 'validation'"):
        task.split("valid")


def test_weights_are_loaded_instead_of_training(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_task("digits", cache_dir=cache)
    torch.save(trained.model.state_dict(), tmp_path / "mine.pt")
    calls = trainings(monkeypatch)
    task = load_task("digits", weights=tmp_path / "mine.pt", cache_dir=tmp_path / "other")
    assert not calls
    assert torch.equal(task.model(task.example_inputs[0]), trained.model(trained.example_inputs[0]))


def test_input_size_and_normalisation_can_be_set(tmp_path: Path) -> None:
    normalisation = Normalisation((0.5,), (0.5,))
    data = builtin.digits(DataRequest(None, tmp_path, 16, normalisation))
    assert data.splits["test"].inputs.shape == (370, 1, 16, 16)
    assert (data.input_size, data.normalisation) == (16, normalisation)
    assert data.fingerprint != builtin.digits(DataRequest(None, tmp_path)).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "digit"}, "unknown task 'digit'; nearest: 'digits'"),
        ({"task": "fashion"}, "nearest: 'fashion-mnist'"),
        ({"task": "digits", "model": "resnet9"}, "unknown model 'resnet9'; nearest: 'resnet"),
        ({"task": "digits", "weights": "absent.pt"}, "'absent.pt' do not exist"),
        ({"task": "digits", "data": "absent"}, "'absent' is not a directory"),
        ({"task": "digits", "input_size": 2}, "input_size 2 is too small"),
        ({"task": "no_such_module:f"}, "no module named 'no_such_module'"),
    ],
)
def test_wrong_requests_are_explained(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(**arguments, cache_dir=tmp_path)  # type: ignore[arg-type]


def write_idx(path: Path, array: np.ndarray, compress: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".gz" if compress else "").write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize(("below", "compress"), [(".", True), ("FashionMNIST/raw", False)])
def test_fashion_mnist_is_read_from_a_directory(tmp_path: Path, below: str, compress: bool) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 6000), ("t10k", 50)):
        images = generator.integers(0, 256, (count, 8, 8))
        write_idx(tmp_path / below / f"{part}-images-idx3-ubyte", images, compress)
        write_idx(tmp_path / below / f"{part}-labels-idx1-ubyte", generator.integers(0, 10, count), compress)
    data = builtin.fashion_mnist(DataRequest(tmp_path, tmp_path / "cache"))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 488,
        "calibration": 512,
        "validation": 5000,
        "test": 50,
    }


def test_a_named_directory_without_the_data_is_an_error(tmp_path: Path) -> None:
    for task in ("fashion-mnist", "cifar10", "cifar100"):
        with pytest.raises(UsageError, match=r"no (Fashion-MNIST|CIFAR10|CIFAR100) in .*leave data out to download it"):
            load_task(task, data=tmp_path, cache_dir=tmp_path)


def test_a_failed_download_is_one_clear_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("Network is unreachable")

    with pytest.raises(UsageError, match=r"X is not in .*, and downloading it failed \(OSError: Network is unreach"):
        builtin._download(fail, "X", [tmp_path])


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"<html>")
    (tmp_path / "b").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))
    for name, message in (("a", "not an IDX file"), ("b", "incomplete")):
        with pytest.raises(UsageError, match=message):
            builtin._read_idx(tmp_path / name)


def test_listing_names_loads_no_torch() -> None:
    code = (
        "import sys; from autocompress.tasks import load_task; from autocompress.tasks.registry import MODELS, TASKS; "
        "print(*TASKS, *MODELS); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "digits" in done.stdout
    assert "resnet20" in done.stdout
