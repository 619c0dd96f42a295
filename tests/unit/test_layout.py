"""Networks that must not be trained channels-last are told apart, and train the same twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.layout import laid_out, training_layout, training_layout_of
from tests.graphs import GraphMaker, resnet


@pytest.mark.parametrize(("channels", "safe"), [(4, False), (8, True)])
def test_a_narrow_strided_shortcut_keeps_a_network_contiguous(channels: int, safe: bool) -> None:
    wanted = torch.channels_last if safe else torch.contiguous_format
    graph, _ = resnet((channels, 2 * channels), blocks=1)
    assert training_layout(graph) == wanted
    assert training_layout_of(nn.Sequential(nn.Conv2d(channels, 16, 1, stride=2))) == wanted


def test_narrow_layers_without_stride_and_depthwise_ones_are_no_reason() -> None:
    maker = GraphMaker()
    x = maker.conv(maker.input("image", (3, 8, 8)), 4, "point", kernel=1)
    maker.conv(x, 4, "wide", stride=2)
    assert training_layout(maker.build(("image",), ("wide_out",))) == torch.channels_last


def test_only_images_have_a_layout() -> None:
    images, rows = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    assert laid_out(images, torch.channels_last).is_contiguous(memory_format=torch.channels_last)
    assert laid_out(rows, torch.channels_last) is rows
