"""Multiply-accumulates as fvcore counts them on the module itself: an independent check of the graph's own count."""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from torch import nn

from autocompress.tasks.vision import import_torchvision


def count_macs(module: nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> tuple[int, dict[str, int]]:
    """MACs of one sample, and the operators fvcore has no count for with how often each occurs.

    What fvcore calls flops are multiply-accumulates.  It also counts normalisation and pooling, which the graph's
    own count leaves out.

    >>> count_macs(nn.Linear(8, 4), (torch.zeros(2, 8),))
    (32, {})
    """
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        sample = tuple(value[:1] for value in example_inputs)
        analysis = FlopCountAnalysis(copy.deepcopy(module).eval(), sample)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        level = logging.getLogger("fvcore").level
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        try:
            total = int(analysis.total())
        finally:
            logging.getLogger("fvcore").setLevel(level)
    return total, {str(name): int(count) for name, count in sorted(analysis.unsupported_ops().items())}
