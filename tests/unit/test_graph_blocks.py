"""Residual blocks that leave whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.graph.blocks import drop_blocks, find_blocks
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.tasks.models import resnet8


class TwoBranches(nn.Module):
    """A sum of two branches with weights: neither can be left out alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.left(x) + self.right(x)).mean((2, 3))


def test_a_resnet8_has_one_block_whose_shortcut_is_the_identity() -> None:
    graph, _ = read_model(resnet8(channels=1).eval(), (torch.rand(2, 1, 16, 16),))
    assert [block.name for block in find_blocks(graph)] == ["layer1.0"]


def test_what_is_left_computes_the_module_without_the_block() -> None:
    torch.manual_seed(0)
    module = resnet8(channels=1).eval()
    x = torch.rand(3, 1, 16, 16)
    graph, weights = read_model(module, (x,))
    smaller = drop_blocks(graph, ["layer1.0"])
    module.layer1 = nn.Sequential()
    with torch.no_grad():
        torch.testing.assert_close(build_module(smaller, weights)(x), module(x), atol=1e-5, rtol=1e-4)
    assert not any("layer1" in layer.name for layer in smaller.compressible)
    assert "layer1.0.conv1" not in {group.id for group in smaller.groups}
    assert smaller.macs() < graph.macs()
    assert {m.tensor for group in smaller.groups for m in group.members} <= smaller.tensors.keys()


def test_a_sum_of_two_branches_is_no_block() -> None:
    graph, _ = read_model(TwoBranches().eval(), (torch.rand(2, 1, 8, 8),))
    assert find_blocks(graph) == ()


def test_an_unknown_block_is_named_with_the_known_ones() -> None:
    graph, _ = read_model(resnet8(channels=1).eval(), (torch.rand(2, 1, 16, 16),))
    with pytest.raises(ValueError, match=r"layer9.*blocks: layer1\.0"):
        drop_blocks(graph, ["layer9"])
