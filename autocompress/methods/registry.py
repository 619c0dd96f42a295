"""The names of the compression methods.  Imports no torch, so that listing them is instant."""

from __future__ import annotations

from autocompress.registry import Registry

METHODS = Registry(
    "methods",
    {
        "pruning": "autocompress.graph.rewrite:rewrite",
        "quantization": "autocompress.methods.rounding:round_with_compensation",
        "student": "autocompress.search.bases:build_student",
        "distillation": "autocompress.methods.distillation:distill",
    },
)
"""What a plan can do to a model; each entry is the function that does it."""

SUMMARIES = {
    "pruning": "removes channels that leave together, residual streams included",
    "quantization": "int8 compute a layer, weights stored in 8 or 4 bits, rounding that makes up for its own error",
    "student": "starts from a narrower model, with the original's best channels or fresh weights",
    "distillation": "recovers a candidate from the original's outputs, its number formats simulated",
}

RANGE_METHODS = Registry(
    "ranges",
    {
        "minmax": "autocompress.methods.calibration:minmax",
        "percentile": "autocompress.methods.calibration:percentile",
        "mse": "autocompress.methods.calibration:least_squares",
        "entropy": "autocompress.methods.calibration:entropy",
    },
)
"""How the range of a quantized activation is chosen; each entry takes a sample and bits and gives (low, high)."""
