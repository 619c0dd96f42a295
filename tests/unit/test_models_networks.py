"""Networks: shapes, names, scaling, lookup by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.tasks import models
from autocompress.tasks.networks import architecture, check_fit, comes_trained


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("layers", "name"), [(8, "resnet8"), (20, "resnet20"), (56, "resnet56")])
def test_residual_networks_have_the_layers_they_are_named_after(layers: int, name: str) -> None:
    network = architecture(name, 10, 3).build()
    weighted = [
        path
        for path, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in path
    ]
    assert len(weighted) == layers


def test_resnet20_has_the_published_number_of_parameters() -> None:
    shortcuts = (16 * 32 + 64) + (32 * 64 + 128)  # the published network pads instead of convolving
    assert parameters(models.resnet20(classes=10, channels=3)) == 269_722 + shortcuts


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "mobilenetv2"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_networks_take_small_images(name: str, channels: int, size: int) -> None:
    network = architecture(name, 7, channels).build().eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_width_scales_channels_in_multiples_of_four() -> None:
    assert models.resnet8(width=0.5).layer3[0].conv1.out_channels == 32  # type: ignore[union-attr,index]
    assert models.resnet8(width=0.01).conv1.out_channels == 4  # type: ignore[union-attr]
    assert parameters(models.mobilenetv2(width=0.5)) < 0.5 * parameters(models.mobilenetv2())


def test_a_shallower_network_has_a_subset_of_the_names() -> None:
    full = set(models.resnet20().state_dict())
    shallow = set(models.resnet20(depth=1 / 3).state_dict())
    assert shallow < full
    assert {name.split(".")[0] for name in shallow} == {name.split(".")[0] for name in full}
    assert set(models.resnet20(depth=0.01).state_dict()) == shallow


def test_an_unknown_network_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'resnet2O'; nearest: 'resnet20'"):
        architecture("resnet2O", 10, 3)
    with pytest.raises(UsageError, match=r"nearest: 'shufflenet_v2_x1_\d'"):
        architecture("shufflenet_v2_x1", 10, 3)


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_torchvision_networks_are_fitted_to_classes_and_channels(name: str) -> None:
    found = architecture(name, 6, 1)
    assert found.build().eval()(torch.zeros(2, 1, 64, 64)).shape == (2, 6)
    assert found.accepts == ({"width"} if name == "mobilenet_v2" else set())


def test_torchvision_width_is_passed_on() -> None:
    found = architecture("mobilenet_v3_small", 6, 3)
    assert parameters(found.build(width=0.5)) < parameters(found.build())


def test_a_network_that_cannot_take_the_images_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match=r"'vit_b_32' fails on images of shape \(1, 28, 28\).*input_size"):
        check_fit(architecture("vit_b_32", 10, 1), torch.zeros(2, 1, 28, 28), 10)


USER_MODULE = """
import torch
from torch import nn

def plain(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def scalable(classes=10, channels=1, width=1.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, int(8 * width)), nn.Linear(int(8 * width), classes))

def loaded():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for p in net.parameters():
        nn.init.constant_(p, 0.5)
    return net

def wrong():
    return "resnet"

seven = 7
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return "my_networks"


def test_a_users_function_gets_the_keywords_it_takes(user_module: str) -> None:
    assert architecture(f"{user_module}:plain", 5, 1).build()(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    scalable = architecture(f"{user_module}:scalable", 5, 1)
    assert scalable.accepts == {"width"}
    assert scalable.build(width=2.0)[1].out_features == 16  # type: ignore[index]


def test_a_users_function_that_loads_weights_is_told_from_one_that_does_not(user_module: str) -> None:
    assert comes_trained(architecture(f"{user_module}:loaded", 10, 1))
    assert not comes_trained(architecture(f"{user_module}:plain", 10, 1))


def test_mistakes_in_a_users_reference_are_explained(user_module: str) -> None:
    with pytest.raises(UsageError, match=r"unknown attribute of my_networks 'plane'; nearest: 'plain'"):
        architecture(f"{user_module}:plane", 10, 1)
    with pytest.raises(UsageError, match=r"returned a str; it must return a torch\.nn\.Module"):
        architecture(f"{user_module}:wrong", 10, 1).build()
    with pytest.raises(UsageError, match="is a int, not a function"):
        architecture(f"{user_module}:seven", 10, 1)
    with pytest.raises(UsageError, match="no module named 'no_such_networks'"):
        architecture("no_such_networks:f", 10, 1)
    with pytest.raises(UsageError, match=r"expected one tensor \(2, 10\)"):
        check_fit(architecture(f"{user_module}:plain", 5, 1), torch.zeros(2, 1, 8, 8), 10)
