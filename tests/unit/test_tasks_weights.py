"""Checkpoints: what loads, what is refused and why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.errors import UsageError
from autocompress.tasks.models import resnet8
from autocompress.tasks.weights import load_weights, read_state_dict


@pytest.fixture
def source() -> nn.Module:
    torch.manual_seed(3)
    return resnet8(channels=1)


@pytest.fixture
def target() -> nn.Module:
    torch.manual_seed(4)
    return resnet8(channels=1)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_safetensors_round_trip(tmp_path: Path, source: nn.Module, target: nn.Module) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_nested_and_prefixed_checkpoints_load(
    tmp_path: Path, source: nn.Module, target: nn.Module, prefix: str, key: str | None
) -> None:
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_missing_and_misshaped_tensors_are_named_and_counted(
    tmp_path: Path, source: nn.Module, target: nn.Module
) -> None:
    state = source.state_dict()
    state["conv9.weight"] = state.pop("conv1.weight")
    state["fc.weight"] = torch.zeros(7, 64)
    torch.save(state, tmp_path / "w.pt")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_weights(target, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing: conv1.weight" in message
    assert "1 not in the model: conv9.weight" in message
    assert "fc.weight is (7, 64) but the model's is (10, 64)" in message
    assert "nearest to 'conv1.weight': 'conv9.weight'" in message
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_long_list_of_problems_is_cut(tmp_path: Path, target: nn.Module) -> None:
    torch.save({"something": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"\.\.\. \(\d+ in all\)") as caught:
        load_weights(target, tmp_path / "w.pt")
    assert len(str(caught.value)) < 600


class Payload:
    """What a hostile checkpoint does: its unpickling would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "pwned")}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"Python objects.*torch\.save\(model\.state_dict\(\), PATH\)"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="Python objects"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="weights"):
        read_state_dict(tmp_path / name)


def test_a_missing_file_and_a_file_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not exist"):
        read_state_dict(tmp_path / "none.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="without tensors"):
        read_state_dict(tmp_path / "w.pt")
