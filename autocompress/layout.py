"""The memory layout that a convolutional network trains fastest in, where that is safe."""

from __future__ import annotations

import torch
from torch import nn

from autocompress.plan import ModelGraph

NARROW = 8
"""Input channels below which a strided 1 x 1 convolution must not be trained channels-last.

oneDNN's kernel for its weight gradient on processors with AVX2 but no AVX-512 works on 8 channels at a time and, where
there are fewer, writes beyond its buffer (torch 2.13: wrong gradients, or a corrupted heap).
"""


def training_layout(graph: ModelGraph) -> torch.memory_format:
    """Channels last, unless a layer of the graph cannot be trained so."""
    for layer in graph.compressible:
        if layer.op != "Conv":
            continue
        shape = graph.tensors[layer.inputs[1]].shape
        strides = layer.attributes.get("strides", ())
        strided = isinstance(strides, tuple | list) and any(step != 1 for step in strides)
        if strided and all(size == 1 for size in shape[2:]) and shape[1] < NARROW:
            return torch.contiguous_format
    return torch.channels_last


def training_layout_of(model: nn.Module) -> torch.memory_format:
    """The same for a module that was not read into a graph."""
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.stride == (1, 1):
            continue
        if layer.in_channels // layer.groups < NARROW:
            return torch.contiguous_format
    return torch.channels_last


def laid_out(inputs: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Images ``[N, C, H, W]`` in a layout; other inputs as they are."""
    return inputs.contiguous(memory_format=layout) if inputs.dim() == 4 else inputs
